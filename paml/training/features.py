"""Caches the output of the frozen front of the model (model.train_from), which all runs with that front share.

Each split, and each mirrored one, has a folder named by a digest of everything that determines its values.
`features.f16` is float16 [n, h, w, C] in the order of the manifest; features.json, written last, has its size and
SHA-256. float16 has a relative rounding error of 2^-11 at most, bfloat16 would have 2^-8; values above the range of
float16 (65504) are refused.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator

import numpy as np
import torch

from paml import storage
from paml.data.device import Normalizer
from paml.data.loader import Batch, Loader
from paml.data.plan import EpochPlan, Samples
from paml.data.readers import CachedFeatures, decode_images
from paml.data.settings import features_folder
from paml.errors import SettingsError
from paml.models import CamClassifier
from paml.parsing import PARSE_ERRORS, check_not_symlink, open_no_follow, parse_json_object
from paml.tasks import file_lock
from paml.training.data import RunData, Split, split_loader, split_reader
from paml.training.hooks import NoProgress, RunHooks
from paml.training.settings import TrainSettings
from paml.training.world import World

SCHEMA_VERSION = 1
BATCH = 32
"""Images per forward pass. Constant, because it may affect the last bit of a feature."""

Features = tuple[np.ndarray, dict[int, str]]
"""float16 [n, h, w, C], and the manifest positions of unreadable images with the reasons."""


def with_features(
    settings: TrainSettings,
    data: RunData,
    model: CamClassifier,
    world: World,
    hooks: RunHooks,
) -> RunData:
    """The data with features instead of images, computed if they are not cached; unchanged without `model.train_from`.

    All workers call it, other runs may do so at the same time: a file is computed by the process that locks it first,
    and the workers of a node divide the files among themselves. Nodes that are done wait in the next collective of the
    run, at most workers.collective_timeout_seconds: fill a large cache with one worker first.
    Raises SettingsError if the disk is too full or a feature exceeds float16, DataError for too many bad images.
    """
    if settings.model.train_from is None:
        return data
    front = _Front(settings, data.image_size, model, world, hooks)
    files = [_FeatureFile(front, split, mirrored=False) for split in data.splits]
    if settings.data.flip_prob > 0:
        files.insert(1, _FeatureFile(front, data.train, mirrored=True))
    features = _open_all(files, front)
    splits = []
    for split in data.splits:
        plain, bad = features[split.name, False]
        mirrored, bad_mirrored = features.get((split.name, True), (plain, bad))
        splits.append(dataclasses.replace(split, features=CachedFeatures(plain, mirrored, bad | bad_mirrored)))
    return dataclasses.replace(data, **dict(zip(("train", "validation", "test"), splits, strict=False)))


class _Front:
    """The frozen front of a model, and what all files of its features share."""

    def __init__(
        self, settings: TrainSettings, image_size: int, model: CamClassifier, world: World, hooks: RunHooks
    ) -> None:
        self.settings, self.image_size, self.world = settings, image_size, world
        self.log, self.progress = hooks.log, hooks.progress if world.first else NoProgress
        self.network = model.front.eval()
        self.normalize = Normalizer(model.info.mean, model.info.std, world.device)
        self.folder = features_folder(settings.data)
        blank = torch.zeros(1, 3, image_size, image_size, device=world.device)
        with torch.inference_mode():
            _, channels, height, width = self.network(blank).shape
        self.shape = (height, width, channels)
        self.identity = {
            "schema_version": SCHEMA_VERSION,
            "backbone": settings.model.backbone,
            "layer": settings.model.train_from,
            "output_stride": settings.model.output_stride,
            "image_size": image_size,
            "pixel_mean": list(model.info.mean),
            "pixel_std": list(model.info.std),
            "weights": _digest_of(self.network),
        }

    def features(self, batch: Batch, mirrored: bool) -> np.ndarray:
        """float16 [b, h, w, C]."""
        if not len(batch):
            return np.zeros((0, *self.shape), np.float16)
        images = batch.images.to(self.world.device)
        flips = torch.full((len(images),), mirrored, device=self.world.device)
        with torch.inference_mode():
            features = self.network(self.normalize(images, flips)).permute(0, 2, 3, 1).half()
        if not bool(features.isfinite().all()):
            raise SettingsError(
                f"the features before {self.settings.model.train_from} exceed the range of float16, for example among "
                f"the images after {batch.keys()[0]}: set another model.train_from or other model.weights"
            )
        return features.cpu().numpy()


def _open_all(files: list["_FeatureFile"], front: _Front) -> dict[tuple[str, bool], Features]:
    """Features by name of the split and whether mirrored. Computes those that are missing.

    Files that another process is computing come last, when they have to be waited for.
    """
    features = {file.key: opened for file in files if (opened := file.open()) is not None}
    missing = [file for file in files if file.key not in features]
    if missing:
        _check_disk_space(missing, front)
    for wait in (False, True):
        for file in missing:
            if file.key in features:
                continue
            with file.locked(wait) as locked:
                if locked:
                    features[file.key] = file.open() or file.compute()
    return features


def _check_disk_space(missing: list["_FeatureFile"], front: _Front) -> None:
    needed = sum(file.size for file in missing)
    storage.ensure_writable(front.folder)
    written = 0  # by another process that computes the same files
    for file in missing:
        with contextlib.suppress(FileNotFoundError):
            written += sum(entry.stat().st_size for entry in os.scandir(file.folder) if entry.name.startswith("."))
    free = shutil.disk_usage(front.folder).free + written
    if free < needed:
        raise SettingsError(
            f"the features of {front.settings.model.train_from} need {needed:,} bytes ({needed / 1e9:.1f} GB), but "
            f"the disk of {front.folder} has {free:,} bytes free: set data.features_dir to a larger disk, use a "
            "later model.train_from or a smaller data.image_size, or set data.flip_prob to 0"
        )


class _FeatureFile:
    """The features of a split, plain or mirrored, in a folder of their own."""

    def __init__(self, front: _Front, split: Split, *, mirrored: bool) -> None:
        self.front, self.split, self.mirrored = front, split, mirrored
        self.key, self.title = (split.name, mirrored), f"{split.name}{', mirrored' if mirrored else ''}"
        self.identity = front.identity | {"manifest": split.manifest.digest, "mirrored": mirrored}
        digest = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()
        self.folder = os.path.join(front.folder, digest[:32])
        self.path, self.about_path = (os.path.join(self.folder, f"features.{suffix}") for suffix in ("f16", "json"))
        self.shape = len(split.manifest), *front.shape
        self.size = 2 * math.prod(self.shape)

    def open(self) -> Features | None:
        """The file as a memory map; None if it does not exist or is damaged."""
        try:
            for file in (self.about_path, self.path):
                check_not_symlink(self.folder)
                os.close(open_no_follow(file, os.O_RDONLY))
            about = parse_json_object(storage.read_bytes(self.about_path))
            intact = storage.sha256_of(self.path) == (about["sha256"], about["size"])
            bad = {int(position): str(reason) for position, reason in about["bad"].items()}
            intact = intact and all(0 <= position < self.shape[0] for position in bad)
        except FileNotFoundError:
            return None
        except PARSE_ERRORS:
            intact, bad = False, {}
        if not intact or os.path.getsize(self.path) != self.size:
            self.front.log(f"the features in {self.folder} are damaged and will be recomputed")
            return None
        if bad and self._any_readable(np.array(sorted(bad))):
            self.front.log(f"unreadable images of {self.split.name} have been repaired: recomputing its features")
            return None
        return np.memmap(self.path, np.float16, mode="r", shape=self.shape), bad

    def _any_readable(self, index: np.ndarray) -> bool:
        pixels = np.empty((len(index), self.front.image_size, self.front.image_size, 3), np.uint8)
        return len(decode_images(split_reader(self.front.settings.data, self.split), index, pixels)) < len(index)

    @contextlib.contextmanager
    def locked(self, wait: bool) -> Iterator[bool]:
        """Lock the folder and yield whether it is locked."""
        os.makedirs(self.folder, exist_ok=True)
        check_not_symlink(self.folder)
        if wait:
            self.front.log(f"waiting for another process to compute the features of {self.title} in {self.folder}")
        with file_lock(os.path.join(self.folder, "lock"), wait=wait) as locked:
            if locked:
                storage.remove_temporaries(self.folder)  # of a process that died
            yield locked is not False

    def compute(self) -> Features:
        """Write the file and open it."""
        front, count, started = self.front, self.shape[0], time.monotonic()
        about = f"{count:,} images ({self.title}; {self.size / 1e9:.3f} GB)"
        front.log(f"computing the features of {about} in {self.folder}")
        digest, bad = hashlib.sha256(), dict[int, str]()
        progress = front.progress(f"features of {self.title}", count)
        try:
            with storage.replacing(self.path) as temporary, open(temporary, "wb") as file:
                for batch in self._images():
                    first, end = batch.step * BATCH, min(count, (batch.step + 1) * BATCH)
                    rows = np.zeros((end - first, *front.shape), np.float16)
                    rows[batch.index - first] = front.features(batch, self.mirrored)
                    unreadable = np.setdiff1d(np.arange(first, end), batch.index).tolist()
                    bad |= {position: sample.reason for position, sample in zip(unreadable, batch.bad, strict=True)}
                    file.write(content := rows.tobytes())
                    digest.update(content)
                    progress.update(end - first)
        finally:
            progress.close()
        facts = {"size": self.size, "sha256": digest.hexdigest(), "bad": bad, "of": self.identity}
        storage.write_bytes(self.about_path, json.dumps(facts, indent=1).encode())
        front.log(f"computed the features of {self.title} in {time.monotonic() - started:.1f} s")
        return np.memmap(self.path, np.float16, mode="r", shape=self.shape), bad

    def _images(self) -> Loader:
        """All images in the order of the manifest, without labels."""
        count, front = self.shape[0], self.front
        samples = Samples(np.arange(count), np.full(count, -1), np.asarray(self.split.manifest.shard))
        order = np.concatenate([np.arange(slot, count, BATCH) for slot in range(BATCH)])
        split = dataclasses.replace(self.split, samples=samples)
        return split_loader(front.settings.data, split, EpochPlan(order, BATCH), front.image_size, front.world)


def _digest_of(front: torch.nn.Module) -> str:
    """SHA-256 of the names and values of the weights. BatchNorm's batch counters do not affect the output."""
    digest = hashlib.sha256()
    for name, value in front.state_dict().items():
        if "num_batches_tracked" not in name:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().contiguous().cpu().numpy())
    return digest.hexdigest()
