"""What the demo shows must hold for other seeds too."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from jobs import demo
from paml.training.loop import Watcher, train
from paml.training.settings import TrainSettings, flatten, unflatten
from paml.training.world import World


def _best_test_map(root: Path, data: Path, seed: int, options: list[str]) -> float:
    """Test mAP of the epoch that validation chose, by the demo's recipe with its options, in this process."""
    flat = flatten(yaml.safe_load((demo.ROOT / demo.RECIPE).read_text()))
    flat |= dict(yaml.safe_load(option.removeprefix("--").replace("=", ": ")).popitem() for option in options)
    flat |= {
        "seed": seed,
        "data.root": str(data),
        "run.storage": str(root),
        "model.weights": str(demo.make_weights()),
    }
    settings = unflatten(TrainSettings, flat)
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, name=settings.loss.name))
    result = train(settings, World(), Watcher())
    return result.test[f"{settings.boost.eval:g}"].map


@pytest.mark.parametrize(
    "seed", [pytest.param(1, marks=pytest.mark.slow), *(pytest.param(seed, marks=pytest.mark.soak) for seed in (0, 2))]
)
@pytest.mark.timeout(3600)
def test_llr_with_boostlu_beats_an(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DATA", tmp_path)
    data = demo.make_data(seed)
    maps = {title: _best_test_map(tmp_path / "runs", data, seed, options) for title, options in demo.ROWS.items()}
    assert maps["LL-R + BoostLU"] > maps["AN"], maps
