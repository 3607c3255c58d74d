"""Records of a sweep's trials, and the table, recipes and plots made from them."""

import csv
import dataclasses
import io
import random
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import yaml
from PIL import Image

from paml.compare.space import Trial, best_trial, count_states
from paml.compare.study import MIN_TRIALS_FOR_IMPORTANCE, plot_trials
from paml.compare.sweep import Sweep, claim_sweep, next_point, read_trials, write_trial
from paml.compare.sweep_report import as_csv, as_note, as_text, best_recipe, format_plan, report_files
from paml.errors import SettingsError
from paml.settings import settings_from_values
from paml.training.settings import TrainSettings, flatten
from tests.helpers.sweeps import SPACE, plan, tiny_sweep

METHODS: dict[str, Any] = {
    "AN": {"loss.name": "an"},
    "LL-R": {"loss.name": "ll-r", "space": {"loss.reject_rate_step": [0.01, 0.1]}},
}


def example_trials(sweep: Sweep, count: int) -> list[Trial]:
    """Trials whose score depends on the loss and the reject rate alone; every third was stopped early."""
    rng, trials = random.Random(3), []
    for number in range(1, count + 1):
        method = sweep.method(number) if sweep.settings.methods else ""
        point = {axis.name: axis.sample(rng) for axis in sweep.settings.axes(method)}
        values = sweep.values(method, point)
        score = 0.3 + 0.2 * (values["loss.name"] == "ll-ct") + 4 * point.get("loss.reject_rate_step", 0.0)
        scores = (score / 2,) if number % 3 == 0 else (score / 2, score, score * 0.9)
        state = "finished" if number % 3 else "stopped"
        trials.append(Trial(number, point, state, scores, seconds=30.0 * number, method=method))
    return trials


def test_records_are_read_back(tmp_path: Path):
    sweep = plan(tiny_sweep(tmp_path, tmp_path / "runs"))
    claim_sweep(sweep)
    point = example_trials(sweep, 4)[3].point
    trials = [*example_trials(sweep, 3), Trial(4, point, "failed", error="it broke", permanent=True)]
    for trial in trials:
        write_trial(sweep, trial)
    write_trial(sweep, dataclasses.replace(trials[1], state="running", scores=()))
    write_trial(sweep, trials[1])
    assert list(read_trials(sweep).values()) == trials
    claim_sweep(sweep)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"\bseed was 0 .* 1"),
        ({"space": {"loss.name": ["ll-r"]}, "trials": 1}, "space was .* now .*ll-r"),
        ({"space": dict(reversed(SPACE.items()))}, "space was "),
        ({"scheduler": "median"}, "scheduler was 'asha' .* 'median'"),
        ({"common": {"batch_size": 4}}, "batch_size was 8 .* 4"),
    ],
)
def test_another_sweep_in_the_folder_is_rejected(tmp_path: Path, change: dict[str, Any], message: str):
    claim_sweep(plan(tiny_sweep(tmp_path, tmp_path / "runs")))
    claim_sweep(plan(tiny_sweep(tmp_path, tmp_path / "runs", trials=60, max_failures=0, cpus_per_run=2)))
    with pytest.raises(SettingsError, match=message):
        claim_sweep(plan(tiny_sweep(tmp_path, tmp_path / "runs") | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": {"boost.train": {"uniform": [0.5, 5]}}}, "space: 'boost.train': .*0.5"),
        ({"space": {"loss.name": ["ll-r", "ll-x"]}}, "space: 'loss.name': .*ll-x"),
        ({"space": {"batch_size": ["many"]}}, "space: 'batch_size'"),
        ({"methods": {"x": {"loss.name": "ll-x"}}, "space": {"boost.train": [1]}}, "method 'x': .*ll-x"),
        ({"methods": {"x": {"space": {"batch_size": ["many"]}}}}, "space: 'batch_size'"),
    ],
)
def test_invalid_values_are_rejected_before_training(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        plan(tiny_sweep(tmp_path, tmp_path / "runs", search="optuna", **change))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("search", ["random", "optuna", "grid"])
def test_points_depend_on_settings_and_trials_alone(tmp_path: Path, search: str):
    space = {"loss.name": ["ll-r", "ll-ct", "ll-cp"], "boost.train": {"uniform": [1, 9], "step": 0.5}}
    sweep = plan(tiny_sweep(tmp_path, tmp_path / "runs", search=search, space=space, trials=20))
    trials: dict[int, Trial] = {}
    for number in range(1, 21):
        point = next_point(sweep, number, trials)
        assert point == next_point(sweep, number, dict(trials))
        assert point is not None
        trials[number] = Trial(number, point, "finished", (point["boost.train"],))
    for number in (1, 20):
        training = sweep.training(number, "", trials[number].point).settings
        assert training.boost.eval == training.boost.train == trials[number].point["boost.train"]
        assert training.data.test_split is None
    assert len({repr(trial.point) for trial in trials.values()}) == 20 or search == "optuna"


@pytest.mark.parametrize("search", ["random", "optuna", "grid"])
def test_each_method_has_its_own_trials(tmp_path: Path, search: str):
    space = {"boost.train": [1, 2, 5]}
    sweep = plan(tiny_sweep(tmp_path, tmp_path / "runs", search=search, space=space, methods=METHODS, trials=3))
    trials: dict[int, Trial] = {}
    for number in range(1, 7):
        method = sweep.method(number)
        assert method == ("AN", "LL-R")[(number - 1) % 2]
        point = next_point(sweep, number, trials)
        assert point is not None
        assert point.keys() == {"boost.train"} | ({"loss.reject_rate_step"} if method == "LL-R" else set())
        trials[number] = Trial(number, point, "finished", (0.1 * number,), method=method)
        assert sweep.training(number, method, point).settings.loss.name == {"AN": "an", "LL-R": "ll-r"}[method]
        write_trial(sweep, trials[number])
    assert read_trials(sweep) == trials
    files = report_files(sweep, list(trials.values()))
    assert {"best-AN.yaml", "best-LL-R.yaml"} <= set(files)
    table = files["trials.txt"].decode().splitlines()
    assert [line.split()[:2] for line in table[2:]] == [
        ["AN", "5"], ["AN", "3"], ["AN", "1"], ["LL-R", "6"], ["LL-R", "4"], ["LL-R", "2"],
    ]  # fmt: skip


def test_table_and_best_trial(tmp_path: Path):
    sweep = plan(tiny_sweep(tmp_path, tmp_path / "runs", trials=11))
    trials = [
        *example_trials(sweep, 9),
        Trial(10, example_trials(sweep, 10)[9].point, "stopped", (0.99,)),
        Trial(11, example_trials(sweep, 11)[10].point, "failed", error="out of luck"),
    ]
    best = best_trial(trials)
    assert best is not None
    assert best.state == "finished"
    assert best.score == max(trial.score for trial in trials if trial.state == "finished")
    assert best.epoch == 2
    assert best_trial(trials[9:]) == trials[9]
    assert best_trial(trials[10:]) is None
    assert count_states(trials) == {"finished": 6, "stopped": 4, "failed": 1}
    lines = as_text(sweep, trials).splitlines()
    assert len(lines) == 2 + 11
    assert lines[2].split()[:2] == ["10", "99.00"]
    assert lines[-1].split()[:2] == ["11", "-"]
    rows = list(csv.DictReader(io.StringIO(as_csv(sweep, trials))))
    scores = [float(row["val_mAP"] or -1) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert rows[-1]["error"] == "out of luck"
    assert {row["boost.train, boost.eval"] for row in rows} <= {"[1, 1]", "[1, 5]", "[3, 3]", "[5, 5]"}


def test_best_recipe_starts_with_command_and_score(tmp_path: Path):
    sweep = plan(tiny_sweep(tmp_path, tmp_path / "runs", trials=9))
    trials = example_trials(sweep, 9)
    best = best_trial(trials)
    assert best is not None
    text = best_recipe(sweep, best, trials, "somewhere/best.yaml")
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert head[0] == "# paml train --config somewhere/best.yaml"
    assert f"val mAP {100 * best.score:.2f} in epoch 2" in head[2]
    recipe = settings_from_values(TrainSettings, flatten(yaml.safe_load(text)), "recipe")
    assert recipe.data.test_split == "test"
    trained = sweep.training(best.number, "", best.point).settings
    for field in dataclasses.fields(recipe):
        if field.name not in ("run", "data"):
            assert getattr(recipe, field.name) == getattr(trained, field.name)


def test_plan_shows_trials_space_and_budget(tmp_path: Path):
    sweep = plan(tiny_sweep(tmp_path, tmp_path / "runs", trials=40))
    text = format_plan(sweep, {}, {"": 3})
    assert "40 trials by random search, 40 to be trained" in text
    assert "loss.reject_rate_step: log_uniform from 0.001 to 0.1" in text
    assert "epochs: 42 to 120" in text
    trials = {trial.number: trial for trial in example_trials(sweep, 4)}
    text = format_plan(sweep, trials, {"": 3})
    assert "36 to be trained" in text
    trials = {trial.number: trial for trial in example_trials(sweep, 40)}
    assert "epochs: 0 to 0" in format_plan(sweep, trials, {"": 3})


def test_plots(tmp_path: Path):
    sweep = plan(tiny_sweep(tmp_path, tmp_path / "runs", trials=60))
    axes, style = sweep.settings.axes(""), dict(mpl.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot_trials(axes, example_trials(sweep, 1)) == {}
        few = plot_trials(axes, example_trials(sweep, MIN_TRIALS_FOR_IMPORTANCE - 1))
        plots = plot_trials(axes, example_trials(sweep, 20))
    assert dict(mpl.rcParams) == style
    assert set(few) == {"parallel_coordinates.png", "score_by_setting.png"}
    assert set(plots) == {*few, "importance.png"}
    for data in plots.values():
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        assert pixels.shape[0] > 300
        assert (pixels < 128).mean() > 0.002
    single = plan(tiny_sweep(tmp_path, tmp_path / "runs", space={"loss.reject_rate_step": [0.01, 0.1]}, trials=2))
    equal = [Trial(number, {"loss.reject_rate_step": 0.01}, "finished", (0.5,)) for number in range(12)]
    assert len(plot_trials(single.settings.axes(""), equal)) == 2


def test_note_of_a_finished_sweep(tmp_path: Path):
    """Results, failures and how to continue."""
    sweep = plan(tiny_sweep(tmp_path, tmp_path / "runs", trials=31))
    trials = example_trials(sweep, 30)
    trials.append(Trial(31, trials[0].point, "failed", error="it ``broke``\n\n# as a heading", permanent=True))
    best = best_trial(trials)
    assert best is not None
    note = as_note(sweep, trials, "paml tune --config a.yaml", done=True)
    first, second, *_ = note.split("\n\n")
    assert first.startswith(f"**Best: validation mAP {100 * best.score:.2f}**")
    assert f"epoch {best.epoch} of trial {best.number}" in first
    assert all(f"`{name}`" in first for name in best.point)
    assert "31 of 31: 20 finished, 10 stopped early, 1 failed" in second
    assert "(paml:charts)" in second
    assert f"`paml train --config {sweep.folder}/best.yaml`" in note
    assert "`paml tune --config a.yaml`" in note
    assert "**Trial 31 failed:** `it ''broke'' # as a heading`" in note
    assert all(f"- `{axis}`" in note for axis in sweep.settings.axes(""))
    assert "best 20 of 31" in note
    assert len(note) < 8000  # MLflow would cut a longer one


def test_note_of_a_running_sweep_mentions_no_recipe(tmp_path: Path):
    sweep = plan(tiny_sweep(tmp_path, tmp_path / "runs", trials=6))
    assert "0 of 6" in as_note(sweep, [], "paml tune", done=False)
    running = dataclasses.replace(example_trials(sweep, 1)[0], state="running")
    note = as_note(sweep, [running], "paml tune", done=False)
    assert "best.yaml" not in note
    assert "of trial 1, running, with" in note
    assert "1 of 6: 1 running" in note
