"""What a sweep notes of its trials, and the table, the recipe and the pictures that it makes of them."""

import csv
import dataclasses
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from paml.compare.grid import read_training
from paml.compare.pictures import LEAST_FOR_IMPORTANCE, draw_pictures, importance
from paml.compare.trials import (
    Sweep,
    Trial,
    as_csv,
    as_note,
    as_text,
    best_recipe,
    best_trial,
    claim_sweep,
    counted,
    next_point,
    read_trials,
    said_plan,
    write_trial,
)
from paml.errors import SettingsError
from paml.training.settings import flatten
from tests.helpers.sweeps import SPACE, planned, tiny_sweep


def made_up(sweep: Sweep, count: int) -> list[Trial]:
    """Trials whose score depends on the scheme and the reject rate alone; every third was stopped early."""
    rng, found = random.Random(3), []
    for number in range(1, count + 1):
        point = {axis.name: axis.draw(rng) for axis in sweep.axes}
        score = 0.3 + 0.2 * (point["loss.name"] == "ll-ct") + 4 * point["loss.reject_rate_step"]
        scores = (score / 2,) if number % 3 == 0 else (score / 2, score, score * 0.9)
        found.append(Trial(number, point, "finished" if number % 3 else "stopped", scores, seconds=30.0 * number))
    return found


def test_records_come_back(tmp_path: Path):
    sweep = planned(tiny_sweep(tmp_path, tmp_path / "runs"))
    claim_sweep(sweep)
    trials = [*made_up(sweep, 3), Trial(4, made_up(sweep, 4)[3].point, "failed", error="it broke", lasting=True)]
    for trial in trials:
        write_trial(sweep, trial)
    write_trial(sweep, dataclasses.replace(trials[1], state="running", scores=()))
    write_trial(sweep, trials[1])
    assert list(read_trials(sweep).values()) == trials
    claim_sweep(sweep)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"space": {"loss.name": ["ll-r"]}, "trials": 1}, "space: .* then, .*ll-r.* now"),
        ({"space": dict(reversed(SPACE.items()))}, "space: .* then, "),
        ({"scheduler": "median"}, "scheduler: 'asha' then, 'median' now"),
        ({"common": {"batch_size": 4}}, "batch_size of the base: 8 then, 4 now"),
    ],
)
def test_another_sweep_is_not_taken_up(tmp_path: Path, change: dict[str, Any], message: str):
    claim_sweep(planned(tiny_sweep(tmp_path, tmp_path / "runs")))
    claim_sweep(planned(tiny_sweep(tmp_path, tmp_path / "runs", trials=60, max_failures=0, cpus_per_run=2)))
    with pytest.raises(SettingsError, match=message):
        claim_sweep(planned(tiny_sweep(tmp_path, tmp_path / "runs") | change))


def test_values_that_a_training_refuses_are_named_before_anything_is_trained(tmp_path: Path):
    for space, message in (
        ({"boost.train": {"uniform": [0.5, 5]}}, "space: 'boost.train': .*alpha must be at least 1"),
        ({"loss.name": ["ll-r", "ll-x"]}, "space: 'loss.name': .*allowed are"),
        ({"batch_size": ["many"]}, "space: 'batch_size'"),
    ):
        with pytest.raises(SettingsError, match=message):
            planned(tiny_sweep(tmp_path, tmp_path / "runs", space=space, search="optuna"))
    assert not (tmp_path / "runs").exists()


def test_points_do_not_depend_on_who_asks(tmp_path: Path):
    for search in ("random", "optuna", "grid"):
        space = {"loss.name": ["ll-r", "ll-ct", "ll-cp"], "boost.train": {"uniform": [1, 9], "step": 0.5}}
        sweep = planned(tiny_sweep(tmp_path, tmp_path / "runs", search=search, space=space, trials=20))
        points = []
        trials: dict[int, Trial] = {}
        for number in range(1, 21):
            point = next_point(sweep, number, trials)
            assert point == next_point(sweep, number, dict(trials))
            assert point is not None
            points.append(point)
            trials[number] = Trial(number, point, "finished", (point["boost.train"],))
            training = sweep.training(number, point).settings
            assert training.boost.eval == training.boost.train == point["boost.train"]
            assert training.data.test_split is None
        assert len({repr(point) for point in points}) == 20 or search == "optuna"
    assert next_point(sweep, 21, trials) is None


def test_table_and_best(tmp_path: Path):
    sweep = planned(tiny_sweep(tmp_path, tmp_path / "runs"))
    trials = [
        *made_up(sweep, 9),
        Trial(10, made_up(sweep, 10)[9].point, "stopped", (0.99,)),
        Trial(11, made_up(sweep, 11)[10].point, "failed", error="out of luck"),
    ]
    best = best_trial(trials)
    assert best is not None
    assert best.state == "finished"
    assert best.score == max(trial.score for trial in trials if trial.state == "finished")
    assert best.epoch == 2
    assert best_trial(trials[9:]) == trials[9]
    assert best_trial(trials[10:]) is None
    assert counted(trials) == {"finished": 6, "stopped": 4, "failed": 1}
    lines = as_text(sweep, trials).splitlines()
    assert len(lines) == 2 + 11
    assert lines[2].split()[:2] == ["10", "99.00"]
    assert lines[-1].split()[:2] == ["11", "-"]
    rows = list(csv.DictReader(io.StringIO(as_csv(sweep, trials))))
    assert [float(row["val_map"] or -1) for row in rows] == sorted(
        (float(r["val_map"] or -1) for r in rows), reverse=True
    )
    assert rows[-1]["error"] == "out of luck"
    assert {row["boost.train, boost.eval"] for row in rows} <= {"[1, 1]", "[1, 5]", "[3, 3]", "[5, 5]"}


def test_the_best_recipe_is_that_trial_and_opens_with_its_command_and_score(tmp_path: Path):
    sweep = planned(tiny_sweep(tmp_path, tmp_path / "runs"))
    trials = made_up(sweep, 9)
    best = best_trial(trials)
    assert best is not None
    text = best_recipe(sweep, best, trials, "somewhere/best.yaml")
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert head[0] == "# python jobs/train_openimages.py --config somewhere/best.yaml"
    assert f"val mAP {100 * best.score:.2f} in epoch 2" in head[2]
    recipe = read_training(flatten(yaml.safe_load(text)), "recipe")
    assert recipe.data.test_split == "test"
    wanted = sweep.training(best.number, best.point).settings
    for field in dataclasses.fields(recipe):
        if field.name not in ("run", "data"):
            assert getattr(recipe, field.name) == getattr(wanted, field.name)


def test_plan_tells_trials_space_and_budget(tmp_path: Path):
    sweep = planned(tiny_sweep(tmp_path, tmp_path / "runs", trials=40))
    said = said_plan(sweep, {}, epochs=3)
    assert "40 trials by random search, 40 to be trained" in said
    assert "loss.reject_rate_step: log_uniform from 0.001 to 0.1" in said
    assert "epochs: 42 to 120" in said
    trials = {trial.number: trial for trial in made_up(sweep, 4)}
    said = said_plan(sweep, trials, epochs=3)
    assert "36 to be trained" in said
    assert "hours of one trial at a time, by 4 trials so far: 0.3 to 0.9" in said
    whole = {trial.number: trial for trial in made_up(sweep, 40)}
    assert "epochs: 0 to 0" in said_plan(sweep, whole, epochs=3)


def test_importance_finds_what_matters(tmp_path: Path):
    sweep = planned(tiny_sweep(tmp_path, tmp_path / "runs"))
    found, trust = importance(sweep.axes, made_up(sweep, 60))
    means = {name: mean for name, (mean, _) in found.items()}
    assert set(sorted(means, key=lambda name: -means[name])[:2]) == {"loss.name", "loss.reject_rate_step"}
    idle = max(means["optimiser.learning_rate"], means["boost.train, boost.eval"])
    assert 2 * idle < min(means["loss.name"], means["loss.reject_rate_step"])
    assert 0.3 < trust <= 1


def test_pictures(tmp_path: Path):
    sweep = planned(tiny_sweep(tmp_path, tmp_path / "runs"))
    assert draw_pictures(sweep, made_up(sweep, 1)) == {}
    few = draw_pictures(sweep, made_up(sweep, LEAST_FOR_IMPORTANCE - 1))
    assert set(few) == {"parallel_coordinates.png", "score_by_setting.png"}
    pictures = draw_pictures(sweep, made_up(sweep, 20))
    assert set(pictures) == {*few, "importance.png"}
    for data in pictures.values():
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        assert pixels.shape[0] > 300
        assert (pixels < 128).mean() > 0.002
    alone = planned(tiny_sweep(tmp_path, tmp_path / "runs", space={"loss.reject_rate_step": [0.01, 0.1]}, trials=2))
    same = [Trial(number, {"loss.reject_rate_step": 0.01}, "finished", (0.5,)) for number in (1, 2)]
    assert len(draw_pictures(alone, same)) == 2


def test_the_note_says_what_came_of_it_what_failed_and_how_to_go_on(tmp_path: Path):
    sweep = planned(tiny_sweep(tmp_path, tmp_path / "runs", trials=31))
    trials = made_up(sweep, 30)
    point = trials[0].point
    trials.append(Trial(31, point, "failed", error="it ``broke``\n\n# as a heading", lasting=True))
    best = best_trial(trials)
    assert best is not None
    note = as_note(sweep, trials, "python jobs/tune_openimages.py --config a.yaml", "runs/sweep/best.yaml")
    first, second, third, fourth, *_ = note.split("\n\n")
    assert first.startswith(
        f"**Best: validation mAP {100 * best.score:.2f}** in epoch {best.epoch} of trial {best.number}"
    )
    assert all(f"`{name}`" in first for name in best.point)
    charts = "[Their charts](paml:charts), one over the other."
    assert second == f"**Trials:** 31 of 31: 20 finished, 10 stopped early, 1 failed. {charts}"
    assert "train_openimages.py --config runs/sweep/best.yaml" in third
    assert "`python jobs/tune_openimages.py --config a.yaml`" in fourth
    assert "**Trial 31 failed:** `it ''broke'' # as a heading`" in note
    assert all(f"- `{axis}`" in note for axis in sweep.axes)
    assert "the best 20 of 31" in note
    assert len(note) < 8000  # of more MLflow would show but the beginning


def test_the_note_of_a_sweep_under_way_promises_nothing(tmp_path: Path):
    sweep = planned(tiny_sweep(tmp_path, tmp_path / "runs", trials=6))
    assert as_note(sweep, [], "python a", None).startswith("No trial has a score yet.\n\n**Trials:** 0 of 6. [Their")
    under_way = dataclasses.replace(made_up(sweep, 1)[0], state="running")
    note = as_note(sweep, [under_way], "python a", None)
    assert "best.yaml" not in note
    assert "of trial 1, under way, with" in note
    assert "**Trials:** 1 of 6: 1 under way." in note
