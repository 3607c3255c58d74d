"""The gallery of rejected labels: what it shows is what was kept, whatever the names are, within its bounds."""

import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paml.explain.gallery import (
    EPOCHS_SHOWN,
    IN_PAGE,
    SIDE,
    ShownClass,
    ShownEpoch,
    ShownLabel,
    draw_gallery,
    gallery_html,
    shown_epochs,
)
from paml.labels.states import POSITIVE
from paml.training.data import open_data
from paml.training.loop import train
from paml.training.settings import TrainSettings
from paml.training.world import World
from tests.helpers.prepared import tiny_settings
from tests.helpers.runs import quiet

EVIL = "</style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&$\\frac{"


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    data = {"train_truth": "labels/train-full.arrow"}
    settings = tiny_settings(prepared, tmp_path_factory.mktemp("gallery"), data=data, epochs=7)
    train(settings, World(), quiet())
    return settings


def test_it_shows_some_epochs_with_their_labels_and_truth(trained: TrainSettings) -> None:
    split = open_data(trained.data).train
    assert split.truth is not None
    shown = shown_epochs(f"{trained.run.storage}/{trained.run.name}", split, 7, trained.seed)
    assert [one.epoch for one in shown] == [2, 4, 5, 7]  # of those after the warm-up
    assert len(shown) == EPOCHS_SHOWN
    for one in shown:
        assert one.false_negatives is not None
        assert one.rejected == sum(cls.rejected for cls in one.classes) > one.false_negatives
        assert [cls.rejected for cls in one.classes] == sorted((cls.rejected for cls in one.classes), reverse=True)
        losses = [label.loss for label in one.strongest]
        assert losses == sorted(losses, reverse=True)
        assert len(one.strongest) == len(one.drawn) == min(IN_PAGE, one.rejected)
        for label in one.strongest + one.drawn:
            row = split.truth.rows_of([label.key])
            full = split.truth.lookup(np.asarray(row))
            assert label.truth == (full.state[full.cls == split.table.classes.index(label.mid)] == POSITIVE).all()
            assert label.loss == pytest.approx(-np.log(1 - label.chance))


def test_where_the_truth_is_not_known_none_is_shown(trained: TrainSettings) -> None:
    partial = dataclasses.replace(trained.data, train_truth=None)
    split = open_data(partial).train
    shown = shown_epochs(f"{trained.run.storage}/{trained.run.name}", split, 7, trained.seed)
    page = gallery_html("run", shown)
    assert "truly positive" not in page
    assert page.count("truth not known") == sum(len(one.strongest) + len(one.drawn) for one in shown) > 0


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


def noisy(seed: int, name: str) -> ShownLabel:
    """A picture that no JPEG makes small."""
    pixels = np.random.default_rng(seed).integers(0, 256, (448, 300, 3), dtype=np.uint8)
    return ShownLabel(pixels, f"key{seed}{name}", f"/m/{name}", name, 1.5, seed % 2 == 0)


def full(epoch: int, name: str) -> ShownEpoch:
    labels = [noisy(place, name) for place in range(IN_PAGE)]
    classes = [ShownClass(f"/m/{name}", name, 10, 5) for _ in range(40)]
    return ShownEpoch(epoch, 400, 200, labels, labels, classes)


def test_no_name_can_leave_its_place_and_the_page_is_bounded() -> None:
    page = gallery_html(EVIL, [full(epoch, EVIL) for epoch in range(1, 1 + EPOCHS_SHOWN)])
    tags = Tags(page)
    assert "script" not in tags.names
    assert tags.names.count("img") == 2 * IN_PAGE * EPOCHS_SHOWN
    assert tags.names.count("style") == 1
    assert EVIL in tags.text
    assert len(page.encode()) < 4_000_000
    import base64

    (first, *_) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert max(Image.open(io.BytesIO(base64.b64decode(first))).size) == SIDE


@pytest.mark.parametrize("epochs", [1, EPOCHS_SHOWN])
def test_the_figure_takes_any_name_and_any_number_of_epochs(epochs: int, tmp_path: Path) -> None:
    shown = [full(epoch, EVIL) for epoch in range(epochs)]
    shown.append(dataclasses.replace(full(9, "a"), strongest=[], drawn=[], classes=[], false_negatives=None))
    draw_gallery(shown[:EPOCHS_SHOWN], str(tmp_path / "figure.png"))
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.width > 1000
    assert (tmp_path / "figure.png").stat().st_size < 3_000_000
