"""Panels of labels show the maps of the scored weights, boosted as in scoring."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from paml.explain.panel import PanelRow, boosted_map, choose_labels, draw_map_panel
from paml.models import BoostSettings, ModelSettings, build_model
from paml.runs.spec import OpenRun
from paml.training.settings import TrainSettings


@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_the_mean_of_a_map_is_the_logit(alpha: float) -> None:
    settings = TrainSettings(
        model=ModelSettings(backbone="resnet18", weights=None, output_stride=16),
        boost=BoostSettings(train=1.0, eval=1.0),
    )
    model = build_model(settings.model, 5, seed=3).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    run = OpenRun("x", "folder", "step-000000001", alpha, settings, model, [])
    scores, logit = boosted_map(run, pixels, 2)
    assert scores.shape == (4, 4)
    assert logit == pytest.approx(float(scores.mean()), abs=1e-5)
    mean, std = torch.tensor(model.info.mean), torch.tensor(model.info.std)
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        assert logit == pytest.approx(float(model(images, alpha)[0, 2]), abs=1e-4)


def test_each_class_is_chosen_once_before_any_is_chosen_again() -> None:
    priority = np.array([0.9, 0.8, 0.7, 0.1, 0.75])
    assert choose_labels(priority, np.array([1, 1, 2, 3, 2]), 4) == [0, 4, 3, 1]
    assert choose_labels(priority, np.array([1, 1, 2, 3, 2]), 9) == [0, 4, 3, 1, 2]


def test_a_map_of_zeros_can_be_drawn(tmp_path: Path) -> None:
    row = PanelRow(np.zeros((32, 32, 3), np.uint8), "cat", [(np.zeros((2, 2)), 0.0), (np.zeros((2, 2)), -3.0)])
    draw_map_panel(["full", "AN"], [row], str(tmp_path / "panel.png"))
    with Image.open(tmp_path / "panel.png") as panel:
        assert panel.size[0] > 500


def test_a_strongly_boosted_map_does_not_change_how_the_others_look(tmp_path: Path) -> None:
    scores = np.array([[-1.0, 0.5], [0.0, 1.0]])
    panels = []
    for factor in (1, 100):
        row = PanelRow(
            np.full((32, 32, 3), 128, np.uint8), "cat", [(scores, 0.0), (scores, 0.0), (scores * factor, 0.0)]
        )
        path = tmp_path / f"{factor}.png"
        draw_map_panel(["full", "AN", "LL-R + BoostLU"], [row], str(path))
        with Image.open(path) as panel:
            panels.append(np.asarray(panel.convert("RGB")))
    equal, boosted = panels
    half = equal.shape[1] // 2  # the image and the first map
    assert np.array_equal(equal[:, :half], boosted[:, :half])
    assert not np.array_equal(equal, boosted)
