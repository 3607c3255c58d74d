"""Batches of a worker against a slow reference, damaged samples, and where an epoch starts."""

import re
import shutil
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paml.data import decoders
from paml.data.decode import decode_into, decode_rgb
from paml.data.device import Normaliser, scatter_states, to_device
from paml.data.loader import LabelSource, LabelTriples, Loader
from paml.data.plan import draw_crops, draw_flips, join, plan_epoch, worker_slots
from paml.errors import DataError
from paml.labels import NEGATIVE, POSITIVE, UNOBSERVED, LabelTable, is_probe
from paml.labels.overlay import LabelOverlay
from paml.shards import Manifest, ShardReader
from paml.shards.cache import ShardCache
from paml.shards.manifest import make_batch, write_manifest
from tests.helpers.prepared import CLASSES, SIZE, key_of, true_classes

K = len(CLASSES)


def loader_of(root: Path, *, workers: int = 1, rank: int = 0, batch: int = 8, **options) -> Loader:
    manifest = Manifest.open(root / "shards" / "train")
    table = LabelTable.open(root / "labels" / "train.arrow")
    full = LabelTable.open(root / "labels" / "train-full.arrow")
    samples = join(manifest, table)
    rows = full.rows_of(manifest.keys())[samples.index]
    labels = LabelSource(
        table, full, rows, options.pop("overlay", None), options.pop("probe", 0.2), options.get("seed", 3)
    )
    chosen = {"epoch": 2, "seed": 3, "flip": 0.5, "threads": 2} | options
    plan = plan_epoch(samples, batch_size=batch, epoch=chosen["epoch"], seed=chosen["seed"], window=16)
    slots = worker_slots(batch, rank, workers)
    return Loader(
        reader=ShardReader(manifest), samples=samples, labels=labels, plan=plan, slots=slots, image_size=SIZE, **chosen
    )


def dense(triples: LabelTriples, images: int) -> np.ndarray:
    return scatter_states(triples, images, K).numpy()


def test_labels_truth_probe_pixels_and_flips_equal_a_slow_reference(prepared: Path) -> None:
    overlay = LabelOverlay(K)
    loader = loader_of(prepared, overlay=overlay)
    manifest = loader.reader.manifest
    numbers = {key_of("train", number): number for number in range(46)}
    unobserved = [(place, cls) for place in range(46) for cls in range(K)][::17]
    table, corrected = loader.labels.table, set()
    for place, cls in unobserved:
        row = table.rows_of([manifest.key(place)])
        if cls not in table.lookup(row).cls:
            corrected.add((place, cls))
    overlay.add(np.array([place * K + cls for place, cls in corrected]))
    assert corrected
    seen, hidden = 0, 0
    for step, batch in enumerate(loader):
        assert batch.step == step
        labels, probe, truth = (dense(t, len(batch)) for t in (batch.labels, batch.probe, batch.truth))  # type: ignore
        for place, key in enumerate(batch.keys()):
            index = int(batch.index[place])
            assert manifest.key(index) == key
            np.testing.assert_array_equal(batch.images[place].numpy(), decode_rgb(loader.reader.read(index)))
            np.testing.assert_array_equal(truth[place] == POSITIVE, true_classes("train", numbers[key]))
            assert (truth[place] != UNOBSERVED).all()
            row = table.rows_of([key])
            found = table.lookup(row)
            states = dict(zip(found.cls.tolist(), found.state.tolist(), strict=True))
            for cls in range(K):
                kept, away = states.get(cls, UNOBSERVED), UNOBSERVED
                if cls in states and is_probe(table.key_hashes(row), np.array([cls]), 0.2, 3)[0]:
                    kept, away = UNOBSERVED, states[cls]
                if (index, cls) in corrected:
                    kept = POSITIVE
                assert labels[place, cls] == kept
                assert probe[place, cls] == away
                hidden += away != UNOBSERVED
            seen += 1
        np.testing.assert_array_equal(batch.flips.numpy(), draw_flips(3, 2, batch.index, 0.5))
        np.testing.assert_array_equal(batch.slots.numpy(), np.arange(len(batch)))
    assert seen == 46
    assert 10 < hidden < 80


def test_each_picture_is_cropped_as_drawn(prepared: Path) -> None:
    for batch in (loader := loader_of(prepared, crop=0.3)):
        parts = draw_crops(3, 2, batch.index, 0.3)
        wanted = np.zeros((SIZE, SIZE, 3), np.uint8)
        for index, part, pixels in zip(batch.index.tolist(), parts, batch.images.numpy(), strict=True):
            decode_into(loader.reader.read(index), wanted, part)
            np.testing.assert_array_equal(pixels, wanted)
            assert (pixels != decode_rgb(loader.reader.read(index))).any()


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6])
def test_starting_at_a_step_gives_the_same_batches(start: int, prepared: Path) -> None:
    whole, later = list(loader_of(prepared)), list(loader_of(prepared, start=start))
    assert len(later) == len(whole) - start == len(loader_of(prepared, start=start))
    for one, other in zip(whole[start:], later, strict=True):
        assert one.step == other.step
        torch.testing.assert_close(one.images, other.images, rtol=0, atol=0)
        torch.testing.assert_close(one.flips, other.flips, rtol=0, atol=0)
        np.testing.assert_array_equal(one.index, other.index)


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
def test_workers_together_see_the_batches_of_one(workers: int, prepared: Path) -> None:
    """46 images in batches of 8: six in the last one, so that the last of eight workers has none there."""
    alone = list(loader_of(prepared))
    shares = [list(loader_of(prepared, workers=workers, rank=rank)) for rank in range(workers)]
    for step, batch in enumerate(alone):
        parts = [share[step] for share in shares]
        torch.testing.assert_close(torch.cat([part.images for part in parts]), batch.images, rtol=0, atol=0)
        torch.testing.assert_close(torch.cat([part.flips for part in parts]), batch.flips, rtol=0, atol=0)
        torch.testing.assert_close(torch.cat([part.slots for part in parts]), batch.slots, rtol=0, atol=0)
        states = np.concatenate([dense(part.labels, len(part)) for part in parts])
        np.testing.assert_array_equal(states, dense(batch.labels, len(batch)))
    assert [len(share[-1]) for share in shares].count(0) == (2 if workers == 8 else 1 if workers == 4 else 0)


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (4, 2), (1, 50)])
def test_threads_and_prefetching_change_nothing(threads: int, prefetch: int, prepared: Path) -> None:
    plain = list(loader_of(prepared))
    others = list(loader_of(prepared, threads=threads, prefetch=prefetch))
    for one, other in zip(plain, others, strict=True):
        torch.testing.assert_close(one.images, other.images, rtol=0, atol=0)


def test_the_threads_of_an_epoch_serve_the_next_and_are_idle_when_it_is_left_early(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(list(loader_of(prepared, threads=2))) > 1
    begun = set(threading.enumerate())
    under_way: list[int] = []
    whole = decoders.decode_into

    def counting(*given: Any) -> None:
        under_way.append(1)
        whole(*given)

    monkeypatch.setattr(decoders, "decode_into", counting)
    batches = iter(loader_of(prepared, threads=2, prefetch=3))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    decoded = len(under_way)
    time.sleep(0.2)
    assert len(under_way) == decoded
    assert {thread for thread in threading.enumerate() if thread.name.startswith("decode")} <= begun


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy in which one image has a flipped byte and another is a cut JPEG whose checksum agrees."""
    shutil.copytree(prepared, tmp_path / "copy")
    folder = tmp_path / "copy" / "shards" / "train"
    manifest = Manifest.open(folder)
    flipped, cut = 5, 17
    for index in (flipped, cut):
        path = Path(manifest.shard_path(int(manifest.shard[index])))
        data = bytearray(path.read_bytes())
        begin, size = int(manifest.offset[index]), int(manifest.size[index])
        if index == flipped:
            data[begin + size // 2] ^= 0x10
        else:
            data[begin + size // 2 : begin + size] = bytes(size - size // 2)
        path.write_bytes(data)
    names = manifest.key(flipped), manifest.key(cut)
    crc = np.array(manifest.crc32)
    cut_bytes = Path(manifest.shard_path(int(manifest.shard[cut]))).read_bytes()
    crc[cut] = zlib.crc32(cut_bytes[int(manifest.offset[cut]) :][: int(manifest.size[cut])])
    columns = {name: getattr(manifest, name) for name in ("shard", "offset", "size", "width", "height")}
    batch = make_batch(keys=manifest.keys(), crc32=crc, **columns)
    write_manifest(str(folder), batch, manifest.shards, settings=manifest.settings, report=manifest.report)
    return tmp_path / "copy", {names[0]: "CRC-32", names[1]: "truncated|broken|cannot load"}


def test_bad_samples_are_counted_named_and_replaced_by_nothing(damaged: tuple[Path, dict[str, str]]) -> None:
    root, reasons = damaged
    loader = loader_of(root, max_bad_share=0.1)
    whole = {batch.step: batch for batch in loader_of(root, max_bad_share=0.1)}
    bad = {}
    used: list[str] = []
    for batch in loader:
        used += batch.keys()
        assert len(batch.images) == len(batch.slots) == len(batch.flips) == len(batch.index)
        bad |= {sample.key: sample.reason for sample in batch.bad}
        if batch.bad:
            full = 8 if batch.step < 5 else 6
            assert len(batch) == full - len(batch.bad)
            assert set(batch.slots.tolist()) < set(range(full))
            slots = dict(zip(batch.keys(), batch.slots.tolist(), strict=True))
            _, planned = loader.plan.batch(batch.step, (0, 8))
            for slot, sample in enumerate(planned):
                key = loader.reader.manifest.key(int(loader.samples.index[sample]))
                assert slots.get(key, slot) == slot
            np.testing.assert_array_equal(dense(batch.labels, len(batch)), dense(whole[batch.step].labels, len(batch)))
    assert set(bad) == set(reasons) == {sample.key for sample in loader.bad}
    assert len(used) == len(set(used)) == 44
    assert not set(used) & set(bad)
    for key, reason in reasons.items():
        assert re.search(reason, bad[key]), bad[key]


def test_a_run_stops_past_the_share_of_bad_samples(damaged: tuple[Path, dict[str, str]]) -> None:
    root, reasons = damaged
    with pytest.raises(DataError, match=r"cannot be used, more than data.max_bad_share = 0.03 allows \(1.4") as caught:
        list(loader_of(root, max_bad_share=0.03))
    assert all(key in str(caught.value) for key in reasons)
    assert len(list(loader_of(root, max_bad_share=0.05))) == 6


def test_an_image_unknown_to_the_table_has_no_labels(prepared: Path) -> None:
    loader = loader_of(prepared)
    loader.samples.row[3] = -1
    states = np.concatenate([dense(batch.labels, len(batch)) for batch in loader])
    places = np.concatenate([batch.index for batch in loader])
    assert (states[places == 3] == UNOBSERVED).all()
    assert (states[places == 4] != UNOBSERVED).any()


def test_the_device_batch_is_normalised_mirrored_and_scattered(prepared: Path) -> None:
    batch = next(iter(loader_of(prepared)))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    normalise = Normaliser(mean, std, torch.device("cpu"))
    data = to_device(batch, K, normalise, torch.device("cpu"))
    assert data.images_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert 0 < int(batch.flips.sum()) < len(batch)
    for place in range(len(batch)):
        pixels = batch.images[place].numpy().astype(np.float64) / 255
        if batch.flips[place]:
            pixels = pixels[:, ::-1]
        wanted = ((pixels - mean) / std).transpose(2, 0, 1)
        np.testing.assert_allclose(data.images_BCHW[place].numpy(), wanted, atol=2e-6)
    assert data.state_BK.dtype == torch.int8
    assert {POSITIVE, NEGATIVE, UNOBSERVED} == set(data.state_BK.unique().tolist())
    assert data.truth_BK is not None
    observed = data.state_BK != UNOBSERVED
    assert (data.truth_BK[observed] == data.state_BK[observed]).all()
    assert (data.state_BK[data.probe_BK != UNOBSERVED] == UNOBSERVED).all()


def test_a_node_fetches_only_the_shards_of_its_part_and_workers_of_a_node_share_them(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("moto.server")
    from paml import storage
    from tests.helpers.fault_proxy import faulty_s3

    with faulty_s3(share=0.0) as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PAML_CACHE", str(tmp_path / "manifest"))
        folder = f"{s3.make_bucket('photos')}/train"
        for file in (prepared / "shards" / "train").iterdir():
            storage.upload(str(file), f"{folder}/{file.name}")
        manifest = Manifest.open(folder)
        alone = [batch.images for batch in loader_of(prepared)]

        def share(rank: int, node: str, processes: int) -> tuple[list[torch.Tensor], Loader]:
            loader = loader_of(prepared, workers=4, rank=rank, processes=processes)
            loader.reader = ShardReader(manifest, ShardCache(tmp_path / node))
            return [batch.images for batch in loader], loader

        def needed(*loaders: Loader) -> set[int]:
            return {
                int(shard)
                for loader in loaders
                for step in range(loader.plan.steps)
                for shard in loader.samples.shard[loader.plan.batch(step, loader.slots)[1]]
            }

        found = [share(rank, f"node-{rank // 2}", rank // 3) for rank in range(4)]
        for step, whole in enumerate(alone):
            torch.testing.assert_close(torch.cat([images[step] for images, _ in found]), whole, rtol=0, atol=0)
        for node in (0, 1):
            own = [loader for _, loader in found[2 * node : 2 * node + 2]]
            shards = needed(*own)
            assert sum(loader.traffic.bytes_fetched for loader in own) == sum(manifest.shards[s].bytes for s in shards)
            assert sum(loader.traffic.misses for loader in own) == len(shards)
            assert own[1].traffic.hits >= len(needed(own[0]) & needed(own[1]))
            assert not any(loader.traffic.ranges for loader in own)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_batch_on_a_gpu_equals_that_of_the_cpu(prepared: Path) -> None:
    batch = next(iter(loader_of(prepared, pin=True)))
    pair = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        normalise = Normaliser((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), device)
        pair.append(to_device(batch, K, normalise, device))
    for one, other in zip(*pair, strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-6, atol=1e-6)
