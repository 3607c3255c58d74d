"""Successive halving: its arithmetic, and a search from settings to recipes."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from paml.compare.grid import read_training
from paml.compare.halving import Rung, best_of, candidates, draw, history_of, rungs
from paml.distributed.search_run import run_search
from paml.errors import SettingsError
from paml.training.checkpoint import committed, read_checkpoint
from paml.training.loop import run_folder_of, train
from paml.training.settings import flatten
from paml.training.world import World
from tests.helpers.grids import tiny_search
from tests.helpers.prepared import tiny_settings
from tests.helpers.runs import quiet


def test_rungs():
    assert rungs(9, 9, 1, 3) == [Rung(1, 3), Rung(3, 1), Rung(9, 1)]
    assert rungs(10, 6, 1, 2) == [Rung(1, 5), Rung(2, 3), Rung(4, 2), Rung(6, 1)]
    assert rungs(1, 6, 1, 3) == [Rung(6, 1)]
    assert rungs(5, 2, 3, 3) == [Rung(2, 1)]
    assert rungs(9, 9, 1, 3, head_epochs=25) == [Rung(26, 3), Rung(28, 1), Rung(34, 1)]


def test_draw():
    space = {"boost.train, boost.eval": [[1, 5], 5], "epochs": [1, 2, 3]}
    whole = draw(space, 6, 0)
    assert len(whole) == 6
    assert whole[0] == {"boost.train": 1, "boost.eval": 5, "epochs": 1}
    assert whole[-1] == {"boost.train": 5, "boost.eval": 5, "epochs": 3}
    some = draw(space, 4, 7)
    assert len(some) == 4
    assert some == draw(space, 4, 7)
    assert all(one in whole for one in some)
    assert draw({}, 3, 0) == [{}]
    with pytest.raises(SettingsError, match="names 2 settings"):
        draw({"a, b": [[1, 2, 3]]}, 3, 0)


def test_best_within_a_rung():
    history = [{"epoch": e, "val/map": value} for e, value in ((1, 0.2), (2, 0.3), (3, 0.3), (4, 0.9))]
    assert best_of(history, 3) == (0.3, 2)
    assert best_of(history, 9) == (0.9, 4)
    assert best_of([], 2)[0] == -1
    after_head = [figures | {"train/head_only": float(figures["epoch"] == 2)} for figures in history]
    assert best_of(after_head, 2) == (0.2, 1)
    assert best_of(after_head, 3) == (0.3, 3)


def test_broken_off_and_taken_up_is_the_unbroken_run(prepared: Path, tmp_path: Path):
    """Bit for bit, with a schedule that depends on the length of the whole."""
    changes = {"optimiser": {"schedule": "cosine"}, "epochs": 3}
    whole = tiny_settings(prepared, tmp_path / "whole", **changes)
    parts = tiny_settings(prepared, tmp_path / "parts", **changes)
    wanted = train(whole, World(), quiet())
    for last in (1, 1, 2):
        found = train(parts, World(), quiet(), last_epoch=last)
        assert len(found.history) == last
        assert found.test == {}
    found = train(parts, World(), quiet(), last_epoch=3)
    assert found.test[f"{parts.boost.eval:g}"].map == wanted.test[f"{parts.boost.eval:g}"].map
    weights = []
    for settings in (whole, parts):
        folder = run_folder_of(settings)
        weights.append(read_checkpoint(folder, committed(folder)[-1]).tensors["weights"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_search(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = tiny_search(prepared, tmp_path)
    assert run_search(settings) == 0
    said = capsys.readouterr().out
    found = candidates(settings, "/")
    assert [len(own) for own in found.values()] == [3, 3]
    for own in found.values():
        assert sorted(len(history_of(each)) for each in own) == [1, 2, 4]
        for each in own:
            assert each.training.settings.data.test_split is None
    assert not list(tmp_path.glob("*/result.json"))
    assert not list(tmp_path.rglob("test_pairs*"))
    for method, own in found.items():
        path = tmp_path / "search" / f"{method}.yaml"
        recipe = read_training(flatten(yaml.safe_load(path.read_text())), "recipe")
        (winner,) = [each for each in own if len(history_of(each)) == 4]
        assert recipe.data.test_split == "test"
        assert recipe.run.name == f"{method}-best"
        unlike = {"run", "data"}
        for field in dataclasses.fields(recipe):
            if field.name not in unlike:
                assert getattr(recipe, field.name) == getattr(winner.training.settings, field.name)
        assert f"train {path} to score the test split" in said

    assert run_search(settings) == 0
    assert "to epoch" not in capsys.readouterr().out


def test_the_head_alone_decides_nothing(prepared: Path, tmp_path: Path):
    base = tiny_search(prepared, tmp_path).base
    assert isinstance(base, dict)
    settings = tiny_search(
        prepared,
        tmp_path,
        base=base | {"epochs": 2, "linear_init.epochs": 2},
        methods={"an": {"loss.name": "an"}},
        space={"optimiser.learning_rate": [1e-9, 1e-3]},
    )
    assert run_search(settings) == 0
    (own,) = candidates(settings, "/").values()
    assert sorted(len(history_of(each)) for each in own) == [3, 4]
    after_one = {each.values["optimiser.learning_rate"]: history_of(each)[2]["val/map"] for each in own}
    (winner,) = [each.values["optimiser.learning_rate"] for each in own if len(history_of(each)) == 4]
    assert after_one[winner] == max(after_one.values())
    value, epoch = best_of(history_of(next(each for each in own if len(history_of(each)) == 4)), 4)
    assert epoch in (3, 4)
    assert f"val mAP {100 * value:.2f} in epoch {epoch}" in (tmp_path / "search" / "an.yaml").read_text()


def test_mistakes_are_named_before_anything_is_trained(prepared: Path, tmp_path: Path):
    with pytest.raises(SettingsError, match=r"no setting 'loss\.rate'; like it are"):
        run_search(tiny_search(prepared, tmp_path, space={"loss.rate": [1]}))
    with pytest.raises(SettingsError, match=r"method 'an': .*alpha must be at least 1"):
        run_search(tiny_search(prepared, tmp_path, space={"boost.train": [0.5]}))
    with pytest.raises(SettingsError, match=r"method 'an': its configurations differ in epochs"):
        run_search(tiny_search(prepared, tmp_path, space={"linear_init.epochs": [0, 1]}))
    assert not list(tmp_path.iterdir())
