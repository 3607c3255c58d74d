"""The demo's result holds for other seeds too."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from paml import demo
from paml.recipes import find_recipe
from paml.settings import flatten, unflatten
from paml.training.hooks import RunHooks
from paml.training.loop import train
from paml.training.settings import TrainSettings
from paml.training.world import World


def best_test_map(root: Path, data: Path, weights: Path, seed: int, options: list[str]) -> float:
    """Test mAP of the epoch that validation chose, by the demo's recipe with these options, in this process."""
    flat = flatten(yaml.safe_load(Path(find_recipe("demo")).read_text()))
    flat |= dict(yaml.safe_load(option.removeprefix("--").replace("=", ": ")).popitem() for option in options)
    flat |= {"seed": seed, "data.root": str(data), "run.storage": str(root), "model.weights": str(weights)}
    settings = unflatten(TrainSettings, flat)
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, name=settings.loss.name))
    result = train(settings, World(), RunHooks())
    return result.test[f"{settings.boost.eval:g}"].map


@pytest.mark.parametrize(
    "seed", [pytest.param(1, marks=pytest.mark.slow), *(pytest.param(seed, marks=pytest.mark.soak) for seed in (0, 2))]
)
@pytest.mark.timeout(3600)
def test_llr_with_boostlu_beats_an(seed: int, tmp_path: Path):
    data, weights = demo.prepare_scenes(tmp_path, seed), demo.pretrain_backbone(tmp_path)
    maps = {
        title: best_test_map(tmp_path / "runs", data, weights, seed, options) for title, options in demo.METHODS.items()
    }
    assert maps["LL-R + BoostLU"] > maps["AN"], maps
