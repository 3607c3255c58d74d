"""Invariant 3 with real loaders: each sample once per epoch, the same global batches for any number of workers."""

import dataclasses
import hashlib
import itertools
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from paml import storage
from paml.data.augment import Augmentation
from paml.data.loader import Batch, LabelSource, Loader, LoaderOptions
from paml.data.plan import join, plan_epoch, worker_slots
from paml.labels import LabelTable
from paml.shards import Manifest, ShardReader, index_shards
from tests.helpers.prepared import jpeg_image, key_of, write_states

SIZE = 16
SHARDS = (1, 17, 3, 9)
"""Images per shard: uneven, and fewer shards than slots."""
BATCH, WORKERS, EPOCHS = 8, (1, 2, 3, 5, 8), 3
COUNT, STEPS = sum(SHARDS), -(-sum(SHARDS) // BATCH)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("uneven")
    numbers = iter(range(COUNT))
    for shard, images in enumerate(SHARDS):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for number in itertools.islice(numbers, images):
                data = jpeg_image("train", number, SIZE)
                member = tarfile.TarInfo(f"{key_of('train', number)}.jpg")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    index_shards(root, root)
    truth = np.random.default_rng(0).random((COUNT, 12)) < 0.3
    write_states(root / "labels", [key_of("train", n) for n in range(COUNT)], truth, np.ones_like(truth))
    return root


def loader_of(root: Path, *, workers: int = 1, rank: int = 0, epoch: int = 1, start: int = 0, **options: int) -> Loader:
    manifest, table = Manifest.open(root), LabelTable.open(str(root / "labels"))
    samples = join(manifest, table)
    return Loader(
        ShardReader(manifest),
        samples,
        LabelSource(table, probe_fraction=0.2),
        plan_epoch(samples, batch_size=BATCH, epoch=epoch, seed=5, window=12),
        LoaderOptions(**{"threads": 1, **options}),
        slots=worker_slots(BATCH, rank, workers),
        start=start,
        augmentation=Augmentation(epoch=epoch, flip_prob=0.5, min_crop_area=0.5),
    )


@dataclasses.dataclass(frozen=True)
class SeenImage:
    """What training receives of one image."""

    step: int
    slot: int
    key: str
    pixels: str
    flip: bool
    labels: tuple[tuple[int, int], ...]
    hidden: tuple[tuple[int, int], ...]


def seen(batch: Batch) -> Iterator[SeenImage]:
    for image, key in enumerate(batch.keys()):
        states = []
        for triples in (batch.labels, batch.probe):
            mask = triples.image == image
            states.append(tuple(zip(triples.cls[mask].tolist(), triples.state[mask].tolist(), strict=True)))
        pixels = hashlib.sha256(batch.images[image].numpy().tobytes()).hexdigest()
        yield SeenImage(batch.step, int(batch.slots[image]), key, pixels, bool(batch.flips[image]), *states)


def epoch_of(root: Path, workers: int, **options: int) -> list[SeenImage]:
    """The images of all workers, in the order of the global batches."""
    images = []
    for rank in range(workers):
        batches = list(loader_of(root, workers=workers, rank=rank, **options))
        assert [batch.step for batch in batches] == list(range(options.get("start", 0), STEPS))
        images += [image for batch in batches for image in seen(batch)]
    return sorted(images, key=lambda image: (image.step, image.slot))


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[int, list[SeenImage]]:
    """Each epoch, read by one worker with one thread."""
    return {epoch: epoch_of(root, 1, epoch=epoch) for epoch in range(1, EPOCHS + 1)}


def test_one_worker_sees_every_sample_once_per_epoch(alone: dict[int, list[SeenImage]]) -> None:
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
def test_global_batches_are_the_same_for_all_workers_and_starts(
    workers: int, root: Path, alone: dict[int, list[SeenImage]]
) -> None:
    for epoch, start in itertools.product(alone, range(STEPS + 1)):
        wanted = [image for image in alone[epoch] if image.step >= start]
        assert epoch_of(root, workers, epoch=epoch, start=start) == wanted


def test_missing_shard_stops_the_loader_and_is_named(root: Path, tmp_path: Path) -> None:
    for file in root.iterdir():
        if file.name != "1.tar":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(storage.StorageError, match=r"1\.tar .*does not exist"):
        list(loader_of(tmp_path))


def test_only_the_damaged_image_is_lost(root: Path, tmp_path: Path, alone: dict[int, list[SeenImage]]) -> None:
    for file in root.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = Manifest.open(tmp_path)
    data = bytearray((tmp_path / "1.tar").read_bytes())
    data[int(manifest.offset[7]) + 100] ^= 4
    (tmp_path / "1.tar").write_bytes(data)
    loader = loader_of(tmp_path, max_bad_fraction=1)
    images = [image for batch in loader for image in seen(batch)]
    assert images == [image for image in alone[1] if image.key != manifest.key(7)]
    assert [sample.key for sample in loader.bad] == [manifest.key(7)]
    assert "1.tar: CRC-32" in loader.bad[0].reason


def test_buffers_are_reused_only_when_unreferenced(root: Path) -> None:
    parts: list[tuple[torch.Tensor, bytes]] = []
    for batch in loader_of(root, prefetch=1):
        part = batch.images[1:2] if len(batch) > 1 else batch.images
        parts.append((part, part.numpy().tobytes()))
    for part, content in parts:
        assert part.numpy().tobytes() == content
    assert len({part.untyped_storage().data_ptr() for part, _ in parts}) == STEPS
    part = content = batch = None
    parts.clear()
    used = {batch.images.untyped_storage().data_ptr() for batch in loader_of(root, prefetch=1)}
    assert len(used) < STEPS
