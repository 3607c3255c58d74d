"""Training from a named layer: what the frozen front gives for every image, computed once for all runs that ask.

Each pair of split and flip has a folder named by a digest of all that decides its numbers. `features.f16` holds
float16 [n, h, w, C] in the manifest's order, and features.json, written last, its size and SHA-256. float16 rounds a
feature by 2^-11 of itself at most, bfloat16 would by 2^-8; what passes its range (65504) is refused.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from paml import storage
from paml.data.cached import CachedFeatures
from paml.data.decoders import decode_span
from paml.data.device import Normaliser
from paml.data.loader import Batch, LabelSource, Loader
from paml.data.plan import EpochPlan, Samples
from paml.data.settings import DataSettings
from paml.errors import SettingsError
from paml.models import CamClassifier
from paml.reading import MISSHAPEN, open_own, own_folder, parse_object
from paml.training.data import RunData, Split, shards_ahead, split_reader
from paml.training.settings import TrainSettings
from paml.training.world import World

SCHEMA_VERSION = 1
BATCH = 32
"""Images that go through the front together: a constant, since it may decide the last bit."""

_Rows = tuple[np.ndarray, dict[int, str]]
"""Features float16 [n, h, w, C], and the places of images that could not be used, each with the reason."""


def features_folder(settings: DataSettings) -> str:
    """Where features are kept. Raises SettingsError for a place that is not on a disk."""
    if settings.features_dir is not None:
        if storage.is_remote(settings.features_dir):
            raise SettingsError(f"data.features_dir is {settings.features_dir}; it must be a local folder")
        return settings.features_dir
    root = settings.root
    if storage.is_remote(root):
        root = settings.cache_dir or storage.cache_folder()
    return os.path.join(root, "features")


def with_features(
    settings: TrainSettings,
    data: RunData,
    model: CamClassifier,
    world: World,
    *,
    say: Callable[[str], None],
    bar: Callable,
) -> RunData:
    """The data with features in the place of images, computed where no file holds them yet; without
    `model.train_from` the data as they are.

    All workers may call it at once, and other runs too: each file is made by whoever locks it first, and workers of
    one node share the files out among themselves. Others wait; a node that has its files already does so in the run's
    next collective, for workers.collective_timeout_seconds at most: begin a large cache with one worker.
    Raises SettingsError where the disk has too little
    room or a feature is no float16, DataError for too many bad images.
    """
    if settings.model.train_from is None:
        return data
    maker = _Maker(settings, data.image_size, model, world, say if world.first else lambda text: None, bar)
    splits = data.splits
    wanted = [(split, False) for split in splits]
    if settings.data.flip > 0:
        wanted.insert(1, (data.train, True))
    made = maker.open_all(wanted)
    with_rows = []
    for split in splits:
        (plain, bad), (mirrored, also_bad) = (
            made[split.name, False],
            made.get((split.name, True), made[split.name, False]),
        )
        with_rows.append(dataclasses.replace(split, features=CachedFeatures(plain, mirrored, bad | also_bad)))
    return dataclasses.replace(data, **dict(zip(("train", "validation", "test"), with_rows, strict=False)))


class _Maker:
    """Opens the files of one front, and makes those that are not there."""

    def __init__(
        self,
        settings: TrainSettings,
        image_size: int,
        model: CamClassifier,
        world: World,
        say: Callable[[str], None],
        bar: Callable,
    ) -> None:
        self.settings, self.image_size, self.world, self.say, self.bar = settings, image_size, world, say, bar
        self.front = model.front.eval()
        self.normalise = Normaliser(settings.model.pixel_mean, settings.model.pixel_std, world.device)
        self.folder = features_folder(settings.data)
        blank = torch.zeros(1, 3, image_size, image_size, device=world.device)
        with torch.inference_mode():
            _, channels, height, width = self.front(blank).shape
        self.shape = (height, width, channels)
        self.facts = {
            "schema_version": SCHEMA_VERSION,
            "backbone": settings.model.backbone,
            "layer": settings.model.train_from,
            "output_stride": settings.model.output_stride,
            "image_size": image_size,
            "pixel_mean": list(settings.model.pixel_mean),
            "pixel_std": list(settings.model.pixel_std),
            "weights": _digest_of(self.front),
        }

    def open_all(self, wanted: list[tuple[Split, bool]]) -> dict[tuple[str, bool], _Rows]:
        """By name of the split and whether mirrored: what is there, what nobody makes yet, what others have made."""
        found: dict[tuple[str, bool], _Rows] = {}
        missing: list[tuple[Split, bool]] = []
        for split, mirrored in wanted:
            rows = self._open(split, mirrored)
            if rows is None:
                missing.append((split, mirrored))
            else:
                found[split.name, mirrored] = rows
        if missing:
            self._need_room(missing)
        for wait in (False, True):
            for split, mirrored in missing:
                if (split.name, mirrored) in found:
                    continue
                with self._locked(split, mirrored, wait) as ours:
                    if ours:
                        rows = self._open(split, mirrored) or self._make(split, mirrored)
                        found[split.name, mirrored] = rows
        return found

    def _place(self, split: Split, mirrored: bool) -> tuple[str, dict]:
        """(folder, all that decides the numbers)."""
        facts = self.facts | {"manifest": split.manifest.digest, "mirrored": mirrored}
        return os.path.join(self.folder, hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]), facts

    def _open(self, split: Split, mirrored: bool) -> _Rows | None:
        """The file mapped into memory; None where there is none, or not a whole one."""
        folder, _ = self._place(split, mirrored)
        path, shape = os.path.join(folder, "features.f16"), (len(split.manifest), *self.shape)
        try:
            for own in (os.path.join(folder, "features.json"), path):
                own_folder(folder)
                os.close(open_own(own, os.O_RDONLY))
            about = parse_object(storage.read_bytes(os.path.join(folder, "features.json")))
            whole = storage.sha256_of(path) == (about["sha256"], about["size"])
            bad = {int(place): str(reason) for place, reason in about["bad"].items()}
            whole = whole and all(0 <= place < shape[0] for place in bad)
        except FileNotFoundError:
            return None
        except MISSHAPEN:
            whole, bad = False, {}
        if not whole or os.path.getsize(path) != 2 * math.prod(shape):
            self.say(f"the features in {folder} are damaged and will be computed anew")
            return None
        if bad and len(self._still_bad(split, np.array(sorted(bad)))) < len(bad):
            self.say(f"bad images of {split.name} have been mended: its features will be computed anew")
            return None
        return np.memmap(path, np.float16, mode="r", shape=shape), bad

    def _still_bad(self, split: Split, index: np.ndarray) -> list[tuple[int, str]]:
        pixels = np.empty((len(index), self.image_size, self.image_size, 3), np.uint8)
        return decode_span(split_reader(self.settings.data, split), index, pixels)

    def _need_room(self, missing: list[tuple[Split, bool]]) -> None:
        needed = sum(2 * len(split.manifest) * math.prod(self.shape) for split, _ in missing)
        storage.ensure_writable(self.folder)
        begun = 0  # what another process has written of the same already
        for folder in (self._place(*one)[0] for one in missing):
            with contextlib.suppress(FileNotFoundError):
                begun += sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name.startswith("."))
        free = shutil.disk_usage(self.folder).free + begun
        if free < needed:
            raise SettingsError(
                f"the features of {self.settings.model.train_from} need {needed:,} bytes ({needed / 1e9:.1f} GB) in "
                f"{self.folder}, whose disk has {free:,} bytes free: set data.features_dir to a larger disk, a later "
                "model.train_from, a smaller data.image_size, or data.flip 0, which needs no mirrored ones"
            )

    @contextlib.contextmanager
    def _locked(self, split: Split, mirrored: bool, wait: bool) -> Iterator[bool]:
        """Whether the file is ours to make. Where a disk knows no locks all make it, and the last one stays."""
        folder, _ = self._place(split, mirrored)
        os.makedirs(folder, exist_ok=True)
        own_folder(folder)
        with open(open_own(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT), "w") as lock:
            try:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not wait:
                        yield False
                        return
                    self.say(f"waiting for another process to compute the features of {split.name} in {folder}")
                    fcntl.flock(lock, fcntl.LOCK_EX)
                for entry in os.scandir(folder):
                    if entry.name.startswith("."):  # of a process that died over it
                        os.unlink(entry.path)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
            yield True

    def _make(self, split: Split, mirrored: bool) -> _Rows:
        folder, facts = self._place(split, mirrored)
        path, title = os.path.join(folder, "features.f16"), f"{split.name}{', mirrored' if mirrored else ''}"
        count = len(split.manifest)
        size, started = 2 * count * math.prod(self.shape), time.monotonic()
        self.say(f"computing the features of {count:,} images ({title}; {size / 1e9:.3f} GB) in {folder}")
        digest, bad = hashlib.sha256(), dict[int, str]()
        bar = self.bar(f"features of {title}", count)
        try:
            with storage.replacing(path) as temporary, open(temporary, "wb") as file:
                for batch in self._images(split):
                    first, last = batch.step * BATCH, min(count, (batch.step + 1) * BATCH)
                    rows = np.zeros((last - first, *self.shape), np.float16)
                    rows[batch.index - first] = self._features(batch, mirrored)
                    missing = np.setdiff1d(np.arange(first, last), batch.index)
                    bad |= {int(p): sample.reason for p, sample in zip(missing, batch.bad, strict=True)}
                    file.write(written := rows.tobytes())
                    digest.update(written)
                    bar.update(last - first)
        finally:
            bar.close()
        about = {"size": size, "sha256": digest.hexdigest(), "bad": bad, "of": facts}
        storage.write_bytes(os.path.join(folder, "features.json"), json.dumps(about, indent=1).encode())
        self.say(f"computed the features of {title} in {time.monotonic() - started:.1f} s")
        return np.memmap(path, np.float16, mode="r", shape=(count, *self.shape)), bad

    def _images(self, split: Split) -> Loader:
        """All images of the manifest in its order, without labels."""
        data, count = self.settings.data, len(split.manifest)
        samples = Samples(np.arange(count), np.full(count, -1), np.asarray(split.manifest.shard))
        order = np.concatenate([np.arange(slot, count, BATCH) for slot in range(BATCH)])
        return Loader(
            reader=split_reader(data, split),
            samples=samples,
            labels=LabelSource(split.table),
            plan=EpochPlan(order, BATCH),
            slots=(0, BATCH),
            image_size=self.image_size,
            threads=data.decode_threads,
            processes=data.loader_processes,
            prefetch=data.prefetch,
            shards_ahead=shards_ahead(data, split.manifest),
            max_bad_share=data.max_bad_share,
            pin=self.world.device.type == "cuda",
        )

    def _features(self, batch: Batch, mirrored: bool) -> np.ndarray:
        """float16 [b, h, w, C]."""
        if not len(batch):
            return np.zeros((0, *self.shape), np.float16)
        images, device = batch.images.to(self.world.device), self.world.device
        flips = torch.full((len(images),), mirrored, device=device)
        with torch.inference_mode():
            features = self.front(self.normalise(images, flips)).permute(0, 2, 3, 1).half()
        if not bool(features.isfinite().all()):
            raise SettingsError(
                f"features before {self.settings.model.train_from} pass the range of float16, e.g. among those of "
                f"{batch.keys()[0]}: take another model.train_from, or other model.weights"
            )
        return features.cpu().numpy()


def _digest_of(front: torch.nn.Module) -> str:
    """SHA-256 over names and values of the weights; BatchNorm's counts of batches change nothing."""
    digest = hashlib.sha256()
    for name, value in front.state_dict().items():
        if "num_batches_tracked" not in name:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().contiguous().cpu().numpy())
    return digest.hexdigest()
