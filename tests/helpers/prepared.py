"""A tiny prepared data folder (shards, tables, full labels), and settings to train on it."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paml.data.settings import DataSettings
from paml.labels import NEGATIVE, POSITIVE, table_from_triples
from paml.losses import LossSettings
from paml.models import BoostSettings, ModelSettings
from paml.shards import ShardSettings, write_shards
from paml.training.checkpoint import CheckpointSettings
from paml.training.optimizer import OptimizerSettings
from paml.training.settings import RunSettings, TrainSettings, WorkerSettings

SIZE = 32
CLASSES = tuple(f"/m/{number:02d}" for number in range(12))
COUNTS = {"train": 46, "validation": 24, "test": 18}


def key_of(split: str, number: int) -> str:
    """16 hex digits, like an ImageID."""
    return f"{list(COUNTS).index(split) + 1:02x}{number:014x}"


def true_classes(split: str, number: int) -> np.ndarray:
    """bool[K]: two or three classes per image, none of them rare."""
    chosen = np.random.default_rng([number, len(split)]).permutation(len(CLASSES))[: 2 + number % 2]
    return np.isin(np.arange(len(CLASSES)), chosen)


def jpeg_image(split: str, number: int, size: int = SIZE) -> bytes:
    """A JPEG with a block for each of its classes, in a color and position of the class."""
    rng = np.random.default_rng([number, len(split), 7])
    pixels = rng.integers(80, 120, (size, size, 3))
    block = size // 4
    for cls in np.flatnonzero(true_classes(split, number)):
        y, x = block * (cls // 4), block * (cls % 4)
        pixels[y : y + block, x : x + block] = np.random.default_rng(cls).integers(0, 256, 3)
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def prepare_tiny(root: Path, *, size: int = SIZE, counts: dict[str, int] = COUNTS) -> Path:
    """Write shards and tables. Training labels: a third of the truth; validation and test: all of it."""
    for split, count in counts.items():
        keys = [key_of(split, number) for number in range(count)]
        truth = np.stack([true_classes(split, number) for number in range(count)])
        source = [(key, jpeg_image(split, number, size)) for number, key in enumerate(keys)]
        write_shards(source, root / "shards" / split, ShardSettings(size=size, samples_per_shard=10), workers=1)
        seen = np.ones_like(truth)
        if split == "train":
            seen = np.random.default_rng(5).random(truth.shape) < 1 / 3
            seen[np.arange(count), truth.argmax(1)] = True
            write_states(root / "labels" / "train-full.arrow", keys, truth, np.ones_like(truth))
        write_states(root / "labels" / f"{split}.arrow", keys, truth, seen)
    return root


def write_states(path: Path, keys: list[str], truth: np.ndarray, seen: np.ndarray) -> None:
    """Write a label table of the pairs in bool[N, K] `seen`; they are positive if `truth` is."""
    image, cls = np.nonzero(seen)
    state = np.where(truth[image, cls], POSITIVE, NEGATIVE)
    classes = [f"/m/{number:02d}" for number in range(truth.shape[1])]
    path.parent.mkdir(parents=True, exist_ok=True)
    table_from_triples(keys, classes, None, image, cls, state, str(path))


def tiny_settings(root: Path, storage: Path, **changes: Any) -> TrainSettings:
    """Settings of a run of seconds: a small network with BatchNorm, 6 steps of 8 images per epoch. Parts are dicts."""
    parts: dict[str, Any] = {
        "run": RunSettings(storage=str(storage), name="tiny", trackers=[]),
        "data": DataSettings(
            root=str(root), train_truth=None, decode_threads=1, probe_fraction=0.05, shuffle_window=16
        ),
        "model": ModelSettings(backbone="shufflenet_v2_x0_5", feature_layer="stage3", weights=None, output_stride=8),
        "boost": BoostSettings(train=5.0, eval=5.0),
        "loss": LossSettings(name="ll-r", reject_rate_step=0.05),
        "optimizer": OptimizerSettings(learning_rate=1e-3),
        "checkpoint": CheckpointSettings(),
        "workers": WorkerSettings(num_workers=0),
    }
    plain = {"epochs": 2, "batch_size": 8, "precision": "fp32", "seed": 3}
    for name, change in changes.items():
        if isinstance(change, dict):
            parts[name] = dataclasses.replace(parts[name], **change)
        else:
            plain[name] = change
    return TrainSettings(**parts, **plain)
