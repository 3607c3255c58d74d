"""Invariant 3 through real loaders: each sample once an epoch, the same global batches for all ways to compute them."""

import dataclasses
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from paml import storage
from paml.data.decoders import LoaderProcessError
from paml.data.loader import Batch, LabelSource, Loader
from paml.data.plan import join, plan_epoch, worker_slots
from paml.labels import LabelTable
from paml.shards import Manifest, ShardReader, index_shards
from tests.helpers.prepared import key_of, picture, write_states

SIZE = 16
SHARDS = (1, 17, 3, 9)
"""Images of each: uneven, and fewer shards than the batch has slots."""
BATCH, WORKERS, EPOCHS = 8, (1, 2, 3, 5, 8), 3
COUNT, STEPS = sum(SHARDS), -(-sum(SHARDS) // BATCH)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("uneven")
    numbers = iter(range(COUNT))
    for shard, images in enumerate(SHARDS):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for number in itertools.islice(numbers, images):
                data = picture("train", number, SIZE)
                member = tarfile.TarInfo(f"{key_of('train', number)}.jpg")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    index_shards(root, root)
    truth = np.random.default_rng(0).random((COUNT, 12)) < 0.3
    write_states(root / "labels", [key_of("train", n) for n in range(COUNT)], truth, np.ones_like(truth))
    return root


def loader_of(root: Path, *, workers: int = 1, rank: int = 0, epoch: int = 1, **chosen: int) -> Loader:
    manifest, table = Manifest.open(root), LabelTable.open(str(root / "labels"))
    samples = join(manifest, table)
    return Loader(
        reader=ShardReader(manifest),
        samples=samples,
        labels=LabelSource(table, probe=0.2),
        plan=plan_epoch(samples, batch_size=BATCH, epoch=epoch, seed=5, window=12),
        slots=worker_slots(BATCH, rank, workers),
        image_size=SIZE,
        epoch=epoch,
        flip=0.5,
        crop=0.5,
        **{"threads": 1, **chosen},
    )


@dataclasses.dataclass(frozen=True)
class Seen:
    """All that training gets of one image."""

    step: int
    slot: int
    key: str
    pixels: str
    flip: bool
    labels: tuple[tuple[int, int], ...]
    hidden: tuple[tuple[int, int], ...]


def seen(batch: Batch) -> Iterator[Seen]:
    for place, key in enumerate(batch.keys()):
        states = []
        for triples in (batch.labels, batch.probe):
            own = triples.image == place
            states.append(tuple(zip(triples.cls[own].tolist(), triples.state[own].tolist(), strict=True)))
        pixels = hashlib.sha256(batch.images[place].numpy().tobytes()).hexdigest()
        yield Seen(batch.step, int(batch.slots[place]), key, pixels, bool(batch.flips[place]), states[0], states[1])


def epoch_of(root: Path, workers: int, **chosen: int) -> list[Seen]:
    """What all workers together see, in the order of the global batches."""
    found = []
    for rank in range(workers):
        batches = list(loader_of(root, workers=workers, rank=rank, **chosen))
        assert [batch.step for batch in batches] == list(range(chosen.get("start", 0), STEPS))
        found += [image for batch in batches for image in seen(batch)]
    return sorted(found, key=lambda image: (image.step, image.slot))


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[int, list[Seen]]:
    """Each epoch as one worker with one thread sees it."""
    return {epoch: epoch_of(root, 1, epoch=epoch) for epoch in range(1, EPOCHS + 1)}


def test_one_worker_sees_every_sample_once_with_pixels_of_its_own(alone: dict[int, list[Seen]]) -> None:
    keys = sorted(key_of("train", number) for number in range(COUNT))
    for epoch in alone.values():
        assert sorted(image.key for image in epoch) == keys
        assert len({image.pixels for image in epoch}) == COUNT
        assert [(image.step, image.slot) for image in epoch] == [divmod(n, BATCH) for n in range(COUNT)]
        assert 5 < sum(image.flip for image in epoch) < COUNT - 5
    orders = [[image.key for image in epoch] for epoch in alone.values()]
    assert orders[0] != orders[1] != orders[2]
    crops = {(image.key, image.pixels) for epoch in alone.values() for image in epoch}
    assert len(crops) == EPOCHS * COUNT


@pytest.mark.parametrize("workers", WORKERS)
def test_all_workers_and_starts_give_the_same_global_batches(
    workers: int, root: Path, alone: dict[int, list[Seen]]
) -> None:
    for epoch, start in itertools.product(alone, range(STEPS + 1)):
        wanted = [image for image in alone[epoch] if image.step >= start]
        assert epoch_of(root, workers, epoch=epoch, start=start) == wanted


@pytest.mark.parametrize(("workers", "processes"), [(1, 3), (3, 1)])
def test_processes_give_the_same_global_batches(
    workers: int, processes: int, root: Path, alone: dict[int, list[Seen]]
) -> None:
    assert epoch_of(root, workers, epoch=2, processes=processes) == alone[2]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "processes"), [(2, 3), (5, 3), (8, 1)])
def test_all_workers_and_processes_give_the_same_global_batches(
    workers: int, processes: int, root: Path, alone: dict[int, list[Seen]]
) -> None:
    assert epoch_of(root, workers, epoch=3, processes=processes) == alone[3]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_processes_start_at_every_step(processes: int, root: Path, alone: dict[int, list[Seen]]) -> None:
    for start in range(STEPS + 1):
        wanted = [image for image in alone[3] if image.step >= start]
        assert epoch_of(root, 2, epoch=3, start=start, processes=processes) == wanted


def children() -> set[int]:
    """Loader processes of this one."""
    own = psutil.Process().children()
    return {child.pid for child in own if any("paml.data.decoders" in part for part in child.cmdline())}


def gone(pids: set[int]) -> bool:
    for _ in range(200):
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.timeout(60)
def test_a_dead_loader_process_is_an_error_that_names_it(root: Path) -> None:
    batches = iter(loader_of(root, processes=2, prefetch=1))
    next(batches)
    pids = children()
    assert len(pids) == 2
    killed = min(pids)
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(
        LoaderProcessError, match=rf"loader process \d of 2 \(pid {killed}\) died by signal 9 \(SIGKILL"
    ):
        list(batches)
    assert gone(pids)


def test_leaving_an_epoch_early_ends_its_processes(root: Path) -> None:
    batches = iter(loader_of(root, processes=2))
    next(batches)
    pids = children()
    batches.close()  # type: ignore[attr-defined]
    assert pids
    assert gone(pids)


ORPHANS = """
import sys, time
from pathlib import Path
from tests.data.test_every_sample import children, loader_of
batches = iter(loader_of(Path(sys.argv[1]), processes=2))
next(batches)
print(*children(), flush=True)
time.sleep(60)
"""


def test_loader_processes_end_with_a_killed_parent(root: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS, str(root)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = {int(pid) for pid in parent.stdout.readline().split()}
        parent.kill()
    assert len(pids) == 2
    assert gone(pids)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_missing_shard_stops_the_loader_and_is_named(processes: int, root: Path, tmp_path: Path) -> None:
    for file in root.iterdir():
        if file.name != "1.tar":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(storage.StorageError, match=r"the shard .*1\.tar of the manifest is gone: put it back"):
        list(loader_of(tmp_path, processes=processes))


@pytest.mark.parametrize("processes", [0, 1])
def test_a_damaged_image_is_named_and_only_it_is_lost(
    processes: int, root: Path, tmp_path: Path, alone: dict[int, list[Seen]]
) -> None:
    for file in root.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = Manifest.open(tmp_path)
    data = bytearray((tmp_path / "1.tar").read_bytes())
    data[int(manifest.offset[7]) + 100] ^= 4
    (tmp_path / "1.tar").write_bytes(data)
    loader = loader_of(tmp_path, processes=processes, max_bad_share=1)
    found = [image for batch in loader for image in seen(batch)]
    assert found == [image for image in alone[1] if image.key != manifest.key(7)]
    assert [sample.key for sample in loader.bad] == [manifest.key(7)]
    assert "1.tar: bytes" in loader.bad[0].reason
    assert "fail their CRC-32" in loader.bad[0].reason


@pytest.mark.parametrize("processes", [0, 2])
def test_memory_is_used_again_only_when_nobody_refers_to_it(processes: int, root: Path) -> None:
    kept: list[tuple[torch.Tensor, bytes]] = []
    for batch in loader_of(root, processes=processes, prefetch=1):
        part = batch.images[1:2] if len(batch) > 1 else batch.images
        kept.append((part, part.numpy().tobytes()))
    for part, content in kept:
        assert part.numpy().tobytes() == content
    assert len({part.untyped_storage().data_ptr() for part, _ in kept}) == STEPS
    part = content = batch = None
    kept.clear()
    used = {batch.images.untyped_storage().data_ptr() for batch in loader_of(root, processes=processes, prefetch=1)}
    assert len(used) < STEPS
