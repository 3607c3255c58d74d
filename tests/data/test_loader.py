"""Batches of a worker against a slow reference, damaged samples, and the first step."""

import re
import shutil
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from paml.data import readers
from paml.data.augment import Augmentation
from paml.data.decode import decode_into, decode_rgb
from paml.data.device import Normalizer, scatter_states, to_device
from paml.data.loader import LabelSource, LabelTriples, Loader, LoaderOptions
from paml.data.plan import join, plan_epoch, worker_slots
from paml.errors import DataError
from paml.labels import NEGATIVE, POSITIVE, UNOBSERVED, LabelTable, is_probe
from paml.labels.overlay import LabelOverlay
from paml.shards import Manifest, ShardReader
from paml.shards.cache import ShardCache
from paml.shards.manifest import SCHEMA, write_manifest
from tests.helpers.prepared import CLASSES, SIZE, key_of, true_classes

K = len(CLASSES)


def loader_of(
    root: Path,
    *,
    workers: int = 1,
    rank: int = 0,
    overlay: LabelOverlay | None = None,
    min_crop_area: float = 1.0,
    start: int = 0,
    **options: Any,
) -> Loader:
    manifest = Manifest.open(root / "shards" / "train")
    table = LabelTable.open(root / "labels" / "train.arrow")
    full = LabelTable.open(root / "labels" / "train-full.arrow")
    samples = join(manifest, table)
    rows = full.rows_of(manifest.keys())[samples.index]
    return Loader(
        ShardReader(manifest),
        samples,
        LabelSource(table, full, rows, overlay, probe_fraction=0.2, seed=3),
        plan_epoch(samples, batch_size=8, epoch=2, seed=3, window=16),
        LoaderOptions(**{"image_size": SIZE, "threads": 2, **options}),
        slots=worker_slots(8, rank, workers),
        start=start,
        augmentation=Augmentation(seed=3, epoch=2, flip_prob=0.5, min_crop_area=min_crop_area),
    )


def dense(triples: LabelTriples, images: int) -> np.ndarray:
    return scatter_states(triples, images, K).numpy()


def test_batches_equal_a_slow_reference(prepared: Path) -> None:
    overlay = LabelOverlay(K)
    loader = loader_of(prepared, overlay=overlay)
    manifest = loader.reader.manifest
    numbers = {key_of("train", number): number for number in range(46)}
    pairs = [(index, cls) for index in range(46) for cls in range(K)][::17]
    table, corrected = loader.labels.table, set()
    for index, cls in pairs:
        row = table.rows_of([manifest.key(index)])
        if cls not in table.lookup(row).cls:
            corrected.add((index, cls))
    overlay.add(np.array([index * K + cls for index, cls in corrected]))
    assert corrected
    seen, hidden = 0, 0
    for step, batch in enumerate(loader):
        assert batch.step == step
        labels, probe, truth = (dense(t, len(batch)) for t in (batch.labels, batch.probe, batch.truth))  # type: ignore
        for image, key in enumerate(batch.keys()):
            index = int(batch.index[image])
            assert manifest.key(index) == key
            np.testing.assert_array_equal(batch.images[image].numpy(), decode_rgb(loader.reader.read(index)))
            np.testing.assert_array_equal(truth[image] == POSITIVE, true_classes("train", numbers[key]))
            assert (truth[image] != UNOBSERVED).all()
            row = table.rows_of([key])
            triples = table.lookup(row)
            states = dict(zip(triples.cls.tolist(), triples.state.tolist(), strict=True))
            for cls in range(K):
                visible, in_probe = states.get(cls, UNOBSERVED), UNOBSERVED
                if cls in states and is_probe(table.key_hashes(row), np.array([cls]), 0.2, 3)[0]:
                    visible, in_probe = UNOBSERVED, states[cls]
                if (index, cls) in corrected:
                    visible = POSITIVE
                assert labels[image, cls] == visible
                assert probe[image, cls] == in_probe
                hidden += in_probe != UNOBSERVED
            seen += 1
        np.testing.assert_array_equal(
            batch.flips.numpy(), Augmentation(seed=3, epoch=2, flip_prob=0.5).flips(batch.index)
        )
        np.testing.assert_array_equal(batch.slots.numpy(), np.arange(len(batch)))
    assert seen == 46
    assert 10 < hidden < 80


def test_each_image_is_cropped_as_planned(prepared: Path) -> None:
    for batch in (loader := loader_of(prepared, min_crop_area=0.3)):
        crops = Augmentation(seed=3, epoch=2, min_crop_area=0.3).crops(batch.index)
        assert crops is not None
        wanted = np.zeros((SIZE, SIZE, 3), np.uint8)
        for index, crop, pixels in zip(batch.index.tolist(), crops, batch.images.numpy(), strict=True):
            decode_into(loader.reader.read(index), wanted, crop)
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
def test_parts_of_all_workers_form_the_batches_of_one(workers: int, prepared: Path) -> None:
    """46 images in batches of 8: the last batch has six, none for the last of eight workers."""
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
def test_threads_and_prefetching_do_not_change_batches(threads: int, prefetch: int, prepared: Path) -> None:
    plain = list(loader_of(prepared))
    others = list(loader_of(prepared, threads=threads, prefetch=prefetch))
    for one, other in zip(plain, others, strict=True):
        torch.testing.assert_close(one.images, other.images, rtol=0, atol=0)


def test_threads_are_reused_and_stop_when_the_iteration_ends_early(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(list(loader_of(prepared, threads=2))) > 1
    before = set(threading.enumerate())
    calls: list[int] = []
    decode = readers.decode_into

    def counting(*arguments: Any) -> None:
        calls.append(1)
        decode(*arguments)

    monkeypatch.setattr(readers, "decode_into", counting)
    batches = iter(loader_of(prepared, threads=2, prefetch=3))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    decoded = len(calls)
    time.sleep(0.2)
    assert len(calls) == decoded
    assert {thread for thread in threading.enumerate() if thread.name.startswith("decode")} <= before


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy with a flipped byte in one image and a truncated JPEG whose checksum matches."""
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
    batch = pa.RecordBatch.from_pydict({"key": manifest.keys(), "crc32": crc, **columns}, schema=SCHEMA)
    write_manifest(str(folder), batch, manifest.shards, settings=manifest.settings, report=manifest.report)
    return tmp_path / "copy", {names[0]: "CRC-32", names[1]: "truncated|broken|cannot load"}


def test_bad_samples_are_reported_and_not_replaced(damaged: tuple[Path, dict[str, str]]) -> None:
    root, reasons = damaged
    loader = loader_of(root, max_bad_fraction=0.1)
    whole = {batch.step: batch for batch in loader_of(root, max_bad_fraction=0.1)}
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


def test_too_many_bad_samples_are_an_error(damaged: tuple[Path, dict[str, str]]) -> None:
    root, reasons = damaged
    with pytest.raises(DataError, match=r"data.max_bad_fraction = 0.03 allows 1.4") as caught:
        list(loader_of(root, max_bad_fraction=0.03))
    assert all(key in str(caught.value) for key in reasons)
    assert len(list(loader_of(root, max_bad_fraction=0.05))) == 6


def test_image_without_a_table_row_has_no_labels(prepared: Path) -> None:
    loader = loader_of(prepared)
    loader.samples.row[3] = -1
    states = np.concatenate([dense(batch.labels, len(batch)) for batch in loader])
    indices = np.concatenate([batch.index for batch in loader])
    assert (states[indices == 3] == UNOBSERVED).all()
    assert (states[indices == 4] != UNOBSERVED).any()


def test_device_batch_is_normalized_mirrored_and_scattered(prepared: Path) -> None:
    batch = next(iter(loader_of(prepared)))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    normalize = Normalizer(mean, std, torch.device("cpu"))
    data = to_device(batch, K, normalize, torch.device("cpu"))
    assert data.images_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert 0 < int(batch.flips.sum()) < len(batch)
    for image in range(len(batch)):
        pixels = batch.images[image].numpy().astype(np.float64) / 255
        if batch.flips[image]:
            pixels = pixels[:, ::-1]
        wanted = ((pixels - mean) / std).transpose(2, 0, 1)
        np.testing.assert_allclose(data.images_BCHW[image].numpy(), wanted, atol=2e-6)
    assert data.state_BK.dtype == torch.int8
    assert {POSITIVE, NEGATIVE, UNOBSERVED} == set(data.state_BK.unique().tolist())
    assert data.truth_BK is not None
    observed = data.state_BK != UNOBSERVED
    assert (data.truth_BK[observed] == data.state_BK[observed]).all()
    assert (data.state_BK[data.probe_BK != UNOBSERVED] == UNOBSERVED).all()


def test_node_fetches_only_the_shards_it_needs_and_its_workers_share_them(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("moto.server")
    from paml import storage
    from tests.helpers.fault_proxy import faulty_s3

    with faulty_s3(fraction=0.0) as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PAML_CACHE", str(tmp_path / "manifest"))
        folder = f"{s3.make_bucket('photos')}/train"
        for file in (prepared / "shards" / "train").iterdir():
            storage.copy(str(file), f"{folder}/{file.name}")
        manifest = Manifest.open(folder)
        alone = [batch.images for batch in loader_of(prepared)]

        def part(rank: int, node: str) -> tuple[list[torch.Tensor], Loader]:
            loader = loader_of(prepared, workers=4, rank=rank)
            loader.reader = ShardReader(manifest, ShardCache(tmp_path / node))
            return [batch.images for batch in loader], loader

        def needed(*loaders: Loader) -> set[int]:
            return {
                int(shard)
                for loader in loaders
                for step in range(loader.plan.steps)
                for shard in loader.samples.shard[loader.plan.batch(step, loader.slots)[1]]
            }

        parts = [part(rank, f"node-{rank // 2}") for rank in range(4)]
        for step, whole in enumerate(alone):
            torch.testing.assert_close(torch.cat([images[step] for images, _ in parts]), whole, rtol=0, atol=0)
        for node in (0, 1):
            own = [loader for _, loader in parts[2 * node : 2 * node + 2]]
            shards = needed(*own)
            assert sum(loader.reader.cache.traffic.bytes_fetched for loader in own) == sum(
                manifest.shards[s].bytes for s in shards
            )
            assert sum(loader.reader.cache.traffic.misses for loader in own) == len(shards)
            assert own[1].reader.cache.traffic.hits >= len(needed(own[0]) & needed(own[1]))
            assert not any(loader.reader.cache.traffic.ranges for loader in own)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_batch_on_a_gpu_equals_the_cpu(prepared: Path) -> None:
    batch = next(iter(loader_of(prepared, pin_memory=True)))
    pair = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        normalize = Normalizer((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), device)
        pair.append(to_device(batch, K, normalize, device))
    for one, other in zip(*pair, strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-6, atol=1e-6)
