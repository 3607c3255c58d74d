"""The gallery of rejected labels shows what the run stored, escapes every name and has a bounded size."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paml.explain.gallery import (
    IMAGE_SIDE,
    MAX_EPOCHS,
    MAX_LABELS,
    GalleryClass,
    GalleryEpoch,
    GalleryLabel,
    gallery_epochs,
    gallery_html,
)
from paml.labels.states import POSITIVE
from paml.training.data import open_data
from paml.training.loop import train
from paml.training.settings import TrainSettings
from paml.training.world import World
from tests.helpers.prepared import tiny_settings
from tests.helpers.runs import quiet

MALICIOUS = "</style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&$\\frac{"


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    data = {"train_truth": "labels/train-full.arrow"}
    settings = tiny_settings(prepared, tmp_path_factory.mktemp("gallery"), data=data, epochs=7)
    train(settings, World(), quiet())
    return settings


def test_the_gallery_shows_some_epochs_with_their_labels_and_truth(trained: TrainSettings) -> None:
    split = open_data(trained.data).train
    assert split.truth is not None
    epochs = gallery_epochs(f"{trained.run.storage}/{trained.run.name}", split, 7, trained.seed)
    assert [one.epoch for one in epochs] == [2, 4, 5, 7]  # of those after the warm-up
    assert len(epochs) == MAX_EPOCHS
    for one in epochs:
        assert one.false_negatives is not None
        assert one.rejected == sum(cls.rejected for cls in one.classes) > one.false_negatives
        assert [cls.rejected for cls in one.classes] == sorted((cls.rejected for cls in one.classes), reverse=True)
        losses = [label.loss for label in one.strongest]
        assert losses == sorted(losses, reverse=True)
        assert len(one.strongest) == len(one.sampled) == min(MAX_LABELS, one.rejected)
        for label in one.strongest + one.sampled:
            row = split.truth.rows_of([label.key])
            full = split.truth.lookup(np.asarray(row))
            assert label.truth == (full.state[full.cls == split.table.classes.index(label.mid)] == POSITIVE).all()
            assert label.loss == pytest.approx(-np.log(1 - label.probability))


def test_without_ground_truth_the_page_shows_no_false_negatives(trained: TrainSettings) -> None:
    split = open_data(dataclasses.replace(trained.data, train_truth=None)).train
    epochs = gallery_epochs(f"{trained.run.storage}/{trained.run.name}", split, 7, trained.seed)
    page = gallery_html("run", epochs)
    assert "truly positive</em>" not in page
    assert "false negatives</th>" not in page
    assert page.count("truth unknown") == sum(len(one.strongest) + len(one.sampled) for one in epochs) > 0


class Tags(HTMLParser):
    """Names of all elements, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.names.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def noise_label(seed: int, name: str) -> GalleryLabel:
    """An image that JPEG compresses badly."""
    pixels = np.random.default_rng(seed).integers(0, 256, (448, 300, 3), dtype=np.uint8)
    return GalleryLabel(pixels, f"key{seed}{name}", f"/m/{name}", name, 1.5, seed % 2 == 0)


def full_epoch(epoch: int, name: str) -> GalleryEpoch:
    labels = [noise_label(seed, name) for seed in range(MAX_LABELS)]
    classes = [GalleryClass(f"/m/{name}", name, 10, 5) for _ in range(40)]
    return GalleryEpoch(epoch, 400, 200, labels, labels, classes)


def test_names_are_escaped_and_the_page_size_is_bounded() -> None:
    page = gallery_html(MALICIOUS, [full_epoch(epoch, MALICIOUS) for epoch in range(1, 1 + MAX_EPOCHS)])
    tags = Tags(page)
    assert "script" not in tags.names
    assert tags.names.count("img") == 2 * MAX_LABELS * MAX_EPOCHS
    assert tags.names.count("style") == 1
    assert MALICIOUS in tags.text
    assert len(page.encode()) < 4_000_000
    (first, *_) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert max(Image.open(io.BytesIO(base64.b64decode(first))).size) == IMAGE_SIDE
