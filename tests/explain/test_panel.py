"""The demo's picture: maps come from the scored weights, as boosted in scoring."""

import numpy as np
import pytest
import torch

from paml.explain.panel import RunOnPanel, boosted_map
from paml.models import BoostSettings, ModelSettings, build_model
from paml.training.loop import Result
from paml.training.settings import TrainSettings


@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_map_averages_to_the_logit(alpha: float) -> None:
    settings = TrainSettings(
        model=ModelSettings(backbone="resnet18", weights=None, output_stride=16),
        boost=BoostSettings(train=1.0, eval=alpha),
    )
    model = build_model(settings.model, 5, seed=3).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    run = RunOnPanel("x", "nowhere", settings, Result({}, {}, []))
    scores, logit = boosted_map(run, model, pixels, 2)
    assert scores.shape == (4, 4)
    assert logit == pytest.approx(float(scores.mean()), abs=1e-5)
    mean, std = torch.tensor(settings.model.pixel_mean), torch.tensor(settings.model.pixel_std)
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        assert logit == pytest.approx(float(model(images, alpha)[0, 2]), abs=1e-4)
