"""A page of the labels that a run rejected: images by epoch, and the most rejected classes.

The page is one file: it needs no server and runs no script.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

import numpy as np

from paml.data.decode import decode_rgb
from paml.errors import PamlError
from paml.html import content_policy, jpeg_thumbnail
from paml.labels.states import POSITIVE
from paml.shards.reader import ShardReader
from paml.training.data import Split
from paml.training.rejected import EpochRejections, load_rejected

MAX_EPOCHS = 4
MAX_LABELS = 12
"""Labels of the highest loss that are shown of an epoch, and random ones."""
MAX_CLASSES = 40
IMAGE_SIDE = 192
MAX_IMAGE_BYTES = 24_000
"""Keeps the page below 4 MB."""


@dataclass(frozen=True)
class GalleryLabel:
    """A rejected label and its image."""

    pixels: np.ndarray
    """uint8 [H, W, 3]."""
    key: str
    mid: str
    name: str
    logit: float
    truth: bool | None
    """Whether the label is truly positive; None if unknown."""

    @property
    def loss(self) -> float:
        """The loss of the label as a negative, -log(1 - p)."""
        return float(np.logaddexp(0.0, self.logit))

    @property
    def probability(self) -> float:
        """Sigmoid of the logit."""
        return 1.0 - math.exp(-self.loss)

    def jpeg_base64(self) -> str:
        """The thumbnail as a base64-encoded JPEG."""
        return base64.b64encode(jpeg_thumbnail(self.pixels, IMAGE_SIDE, MAX_IMAGE_BYTES)).decode()


class GalleryClass(NamedTuple):
    """How many labels of a class an epoch rejected."""

    mid: str
    name: str
    rejected: int
    false_negatives: int | None
    """Truly positive labels among them; None if unknown."""


class GalleryEpoch(NamedTuple):
    """The rejections of an epoch."""

    epoch: int
    rejected: int
    false_negatives: int | None
    strongest: list[GalleryLabel]
    """Labels of the highest loss, in descending order."""
    sampled: list[GalleryLabel]
    """A uniform random sample of all rejected labels."""
    classes: list[GalleryClass]
    """The classes with the most rejected labels, in descending order."""


def gallery_epochs(run_folder: str, split: Split, epochs: int, seed: int) -> list[GalleryEpoch]:
    """Up to MAX_EPOCHS epochs that rejected labels, evenly spaced from the first to the last.

    split: the training images with their labels. epochs: length of the run. Unreadable images are skipped.
    """
    stored = {epoch: one for epoch in range(1, epochs + 1) if (one := load_rejected(run_folder, epoch, seed))}
    if not stored:
        return []
    positions = np.linspace(0, len(stored) - 1, min(len(stored), MAX_EPOCHS)).round().astype(int)
    chosen = [list(stored)[position] for position in np.unique(positions).tolist()]
    reader = ShardReader(split.manifest)
    return [_gallery_epoch(epoch, stored[epoch], split, reader) for epoch in chosen]


def _gallery_epoch(epoch: int, stored: EpochRejections, split: Split, reader: ShardReader) -> GalleryEpoch:
    rejected, false_negatives = stored.by_class
    names, mids, truth_known = split.table.names, split.table.classes, split.truth is not None
    classes = [
        GalleryClass(mids[cls], names[cls], int(rejected[cls]), int(false_negatives[cls]) if truth_known else None)
        for cls in np.argsort(-rejected, kind="stable")[:MAX_CLASSES].tolist()
        if rejected[cls]
    ]
    strongest, sampled = (
        [label for i in order[:MAX_LABELS].tolist() if (label := _gallery_label(stored, i, split, reader))]
        for order in (stored.highest_loss(), stored.random_sample())
    )
    total = int(false_negatives.sum()) if truth_known else None
    return GalleryEpoch(epoch, int(rejected.sum()), total, strongest, sampled, classes)


def _gallery_label(stored: EpochRejections, position: int, split: Split, reader: ShardReader) -> GalleryLabel | None:
    image, cls = divmod(int(stored.codes[position]), split.table.num_classes)
    try:
        pixels = decode_rgb(reader.read(image))
    except (PamlError, OSError):
        return None
    key, mid, name = split.manifest.key(image), split.table.classes[cls], split.table.names[cls]
    states = []
    if split.truth is not None:
        row = split.truth.rows_of([key])
        labels = split.truth.lookup(row[row >= 0])
        states = labels.state[labels.cls == cls].tolist()
    truth = states[0] == POSITIVE if states else None
    return GalleryLabel(pixels, key, mid, name, float(stored.logits[position]), truth)


def gallery_html(title: str, epochs: Sequence[GalleryEpoch]) -> str:
    """A self-contained page of images, probabilities, losses and classes of each epoch, the last epoch first."""
    from jinja2 import Environment

    source = resources.files("paml.explain").joinpath("gallery.html").read_text("utf-8")
    policy = content_policy(source.split("<style>", 1)[1].split("</style>", 1)[0])
    template = Environment(autoescape=True).from_string(source)
    return template.render(title=title, epochs=list(reversed(epochs)), policy=policy)
