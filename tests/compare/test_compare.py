"""A comparison from its settings to its tables, also after stops and failures."""

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from paml.compare.curves import Curve, draw_curves, read_curves
from paml.compare.grid import plan_grid, slug
from paml.compare.table import SeedScore, as_csv, as_text, table_rows, training_hours
from paml.distributed.cluster import CONTINUE
from paml.distributed.compare import run_compare
from paml.distributed.many_runs import TrainingProgress
from paml.errors import SettingsError
from paml.labels.table import LabelTable
from paml.metrics import average_precision_by_class, five_groups, read_pairs, scores
from paml.runs.folder import is_finished, read_result
from paml.runs.journal import Event
from paml.settings import settings_from_values
from paml.training.hooks import RunHooks
from paml.training.settings import TrainSettings
from tests.helpers.grids import METHODS, tiny_base, tiny_grid


def rows_of(folder: Path, name: str = "table-partial.csv") -> dict[str, dict[str, str]]:
    """Row -> its numbers."""
    with (folder / "comparison" / name).open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def width_of(path: Path) -> int:
    with Image.open(path) as image:
        image.load()
        return image.width


@pytest.fixture(scope="module")
def compared(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished comparison, for reading only."""
    folder = tmp_path_factory.mktemp("compared")
    assert run_compare(tiny_grid(prepared, folder, seeds=(3,), published="coco")) == 0
    return folder


def test_tables(compared: Path):
    rows = rows_of(compared)
    assert list(rows) == ["full labels", "AN", "AN + boost at inference", "LL-R + BoostLU"]
    runs = sorted(path.parent.name for path in compared.glob("*/result.json"))
    assert runs == sorted(f"{name}-seed3" for name in ("full-labels", "partial-an", "partial-LL-R-BoostLU"))
    for row in rows.values():
        assert 0 < float(row["low"]) < float(row["high"]) <= 1
        assert float(row["hours"]) > 0
    assert float(rows["AN"]["gap"]) == 0
    assert float(rows["full labels"]["gap"]) == 1
    assert rows["AN"]["difference"] == ""
    assert float(rows["AN"]["published"]) == pytest.approx(0.6492)
    text = (compared / "comparison" / "table-partial.txt").read_text()
    assert "gap closed" in text
    assert "Published on coco" in text
    latex = (compared / "comparison" / "table-partial.tex").read_text()
    assert latex.count(r" \\") == 5
    assert r"\textbf{" in latex
    settings = yaml.safe_load((compared / "comparison" / "artifacts" / "settings.yaml").read_text())
    assert list(settings["methods"]) == list(METHODS)


def test_learning_curves_use_the_alpha_of_each_row(compared: Path, prepared: Path):
    grid = plan_grid(tiny_grid(prepared, compared, seeds=(3,)), "")
    curves = {curve.name: curve for curve in read_curves(grid.tables["partial"].values())}
    assert list(curves) == list(rows_of(compared))
    history = read_result(grid.trainings["partial-an-seed3"].folder).history
    assert curves["AN"].maps.tolist() == [[metrics["val/mAP"] for metrics in history]]
    assert curves["AN + boost at inference"].maps.tolist() == [[metrics["val/mAP_alpha_5"] for metrics in history]]
    assert curves["AN"].best == max(metrics["val/mAP"] for metrics in history)
    assert width_of(compared / "comparison" / "learning_curves-partial.png") > 500


def test_learning_curves_of_many_rows_and_seeds_of_different_lengths(tmp_path: Path):
    maps = np.random.default_rng(0).random((20, 2, 5))
    maps[3, 1, 3:] = np.nan
    curves = [Curve(f"row {i}", seeds) for i, seeds in enumerate(maps)]
    draw_curves(curves, ["row 0", "absent"], "many", str(tmp_path / "curves.png"))
    assert width_of(tmp_path / "curves.png") > 500
    assert curves[3].best == max(np.nanmean(maps[3], axis=0))


def test_stored_pairs_reproduce_the_scores(compared: Path):
    for alpha in ("1", "5"):
        pairs, facts = read_pairs(
            str(compared / "partial-an-seed3" / "artifacts" / f"test_pairs_alpha_{alpha}.parquet")
        )
        result = json.loads((compared / "partial-an-seed3" / "result.json").read_text())
        assert scores(*pairs[:3], int(facts["num_classes"])).map == result["test"][alpha]["map"]
        assert len(np.unique(pairs.image.numpy())) == 18


def test_all_rows_are_grouped_by_the_same_labels(compared: Path, prepared: Path):
    """G1 to G5 of the row trained on full labels are over the same classes as those of the other rows."""
    positives, negatives = LabelTable.open(prepared / "labels" / "train.arrow").class_counts()
    group_of = five_groups(positives + negatives)
    folder = compared / "full-labels-seed3"
    pairs, facts = read_pairs(str(folder / "artifacts" / "test_pairs_alpha_1.parquet"))
    per_class = average_precision_by_class(*pairs[:3], int(facts["num_classes"]))
    row = rows_of(compared)["full labels"]
    own = json.loads((folder / "result.json").read_text())["test"]["1"]["groups"]
    for number in range(1, 6):
        assert float(row[f"G{number}"]) == pytest.approx(np.nanmean(per_class[group_of == number]))
    assert [own[f"G{number}"] for number in range(1, 6)] != pytest.approx([float(row[f"G{n}"]) for n in range(1, 6)])
    assert "class groups of AN" in (compared / "comparison" / "table-partial.txt").read_text()


def test_a_finished_comparison_trains_nothing(compared: Path, prepared: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in compared.glob("*/result.json")}
    table = (compared / "comparison" / "table-partial.csv").read_text()
    assert run_compare(tiny_grid(prepared, compared, seeds=(3,), published="coco")) == 0
    assert "3 trainings (3 finished)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in compared.glob("*/result.json")} == before
    assert (compared / "comparison" / "table-partial.csv").read_text() == table


def test_a_comparison_continues_with_the_fitted_reject_rate(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    alone: dict[str, Any] = {"baseline_row": None, "upper_bound_row": None, "compare_to": None}
    fitted = {"LL-R": {"loss.name": "ll-r", "loss.reject_rate_step": None}}
    assert run_compare(tiny_grid(prepared, tmp_path, methods=fitted, **alone)) == 0
    assert "fitted to the data" in capsys.readouterr().out
    assert run_compare(tiny_grid(prepared, tmp_path, methods=fitted, **alone)) == 0
    assert "1 trainings (1 finished)" in capsys.readouterr().out
    another = {"LL-R": {"loss.name": "ll-r", "loss.reject_rate_step": 0.123}}
    with pytest.raises(SettingsError, match=r"loss\.reject_rate_step: .*0\.123"):
        run_compare(tiny_grid(prepared, tmp_path, methods=another, **alone))


def test_stopped_and_failed_trainings(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compared: Path
):
    """One training fails and is named, one is stopped between epochs. Repeating the command gives the same scores."""
    import paml.runs.train as run_module

    run_loop = run_module.run_loop

    def faulty(settings, world, hooks: RunHooks, **options):
        if settings.loss.name == "full":
            raise RuntimeError("an injected failure")
        if settings.loss.name == "ll-r":

            def stop(metrics: dict) -> None:
                raise KeyboardInterrupt

            hooks = dataclasses.replace(hooks, on_epoch_end=stop)
        return run_loop(settings, world, hooks, **options)

    monkeypatch.setattr(run_module, "run_loop", faulty)
    with pytest.raises(SystemExit):
        run_compare(tiny_grid(prepared, tmp_path, seeds=(3,)))
    output = capsys.readouterr()
    assert "full-labels-seed3: FAILED: RuntimeError: an injected failure" in output.out
    assert CONTINUE in output.err
    assert not (tmp_path / "partial-LL-R-BoostLU-seed3" / "result.json").exists()

    def failing(settings, *arguments, **options):
        return (faulty if settings.loss.name == "full" else run_loop)(settings, *arguments, **options)

    monkeypatch.setattr(run_module, "run_loop", failing)
    assert run_compare(tiny_grid(prepared, tmp_path, seeds=(3,))) == 1
    output = capsys.readouterr()
    assert "partial-LL-R-BoostLU-seed3: resuming at epoch 2" in output.out
    assert "1 trainings failed" in output.err
    rows = rows_of(tmp_path)
    assert (rows["full labels"]["seeds"], rows["full labels"]["missing"]) == ("0", "1")
    assert rows["LL-R + BoostLU"]["gap"] == ""

    monkeypatch.setattr(run_module, "run_loop", run_loop)
    assert run_compare(tiny_grid(prepared, tmp_path, seeds=(3,))) == 0
    assert rows_of(tmp_path)["LL-R + BoostLU"]["gap"] != ""
    resumed, reference = (
        plan_grid(tiny_grid(prepared, folder, seeds=(3,)), "/").trainings for folder in (tmp_path, compared)
    )
    for name, training in resumed.items():
        assert is_finished(training.folder)
        test_scores = read_result(training.folder).to_json()["test"]
        assert test_scores == read_result(reference[name].folder).to_json()["test"]


def test_numbers_of_a_table(prepared: Path, tmp_path: Path):
    """Means, spread and gap over the seeds, and the difference over the seeds that both rows have."""

    def scored(*maps: float) -> dict[int, SeedScore]:
        replicates = np.linspace(-0.01, 0.01, 101)
        return {
            seed: SeedScore({"map": map_, "G1": map_, "epoch": 2, "precision": 0.5, "hours": 0.1}, map_ + replicates)
            for seed, map_ in enumerate(maps)
            if not math.isnan(map_)
        }

    rows = {"full labels": scored(0.8, 0.9), "AN": scored(0.6, 0.5), "one": scored(0.7, math.nan), "none": {}}
    settings = tiny_grid(prepared, tmp_path, seeds=(0, 1))
    table = table_rows(rows, 2, settings)
    full, an, one, none = (table.loc[name] for name in rows)
    assert full["map"] == pytest.approx(0.85)
    assert full["spread"] == pytest.approx(np.std([0.8, 0.9], ddof=1))
    assert (full["gap"], an["gap"], one["gap"]) == pytest.approx((1, 0, 0.5))
    assert (one["difference"], one["difference_low"], one["difference_high"]) == pytest.approx((0.1, 0.1, 0.1))
    assert (an["low"], an["high"]) == pytest.approx((0.5405, 0.5595))
    assert (one["seeds"], one["missing"], none["missing"]) == (1, 1, 2)
    assert math.isnan(none["map"])
    text = as_text(table, settings, ["a note"])
    assert "50 %" in text
    assert text.endswith("a note")
    assert "rej. recall" not in text
    assert as_csv(table).splitlines()[-1].startswith("none,0,2,,")


def test_hours_exclude_interruptions():
    def event(kind: str, minutes: int, value: str | float = "") -> Event:
        return Event(kind=kind, time_ms=minutes * 60_000, key="" if kind == "status" else "a", value=value)

    killed = [event("status", 0, "RUNNING"), event("metric", 30, 0.5)]
    resumed = [event("status", 600, "RUNNING"), event("status", 660, "FINISHED"), event("tag", 900)]
    assert training_hours(killed + resumed) == pytest.approx(1.5)
    assert training_hours(killed) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": METHODS | {"x": {"loss.name": "ll-x"}}}, "method 'x': .*'ll-x'"),
        ({"methods": METHODS | {"x": {"loss.nam": "an"}}}, "method 'x': .*'loss.nam'.*loss.name"),
        ({"methods": METHODS | {"x": {"batch_size": "many"}}}, r"method 'x': .*batch_size"),
        ({"methods": METHODS | {"x": {"rows": {"AN": 1}}}}, "row 'AN'"),
        ({"methods": METHODS | {"x": {"rows": {"A": 1, "B": 1}}}}, "method 'x': rows"),
        ({"methods": METHODS | {"a n": {}, "a-n": {}}}, "partial-a-n"),
        ({"methods": METHODS | {"x": {"metrics.no_positives": "zero"}}}, "metrics.no_positives"),
        ({"methods": {}}, "methods"),
        ({"baseline_row": "nothing"}, "baseline_row is 'nothing'; .*full labels, AN"),
        ({"baseline_row": "LL-R + BoostLU"}, "baseline_row is 'LL-R . BoostLU'"),
        ({"seeds": (1, 1)}, "seeds is"),
        ({"base": "no/such.yaml"}, "no/such.yaml"),
    ],
)
def test_invalid_settings_are_rejected_before_training(prepared: Path, tmp_path: Path, changes: dict, message: str):
    with pytest.raises(SettingsError, match=message):
        run_compare(tiny_grid(prepared, tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_runs_with_other_settings_are_rejected(prepared: Path, compared: Path):
    with pytest.raises(SettingsError, match=r"full-labels-seed3: .*epochs"):
        run_compare(tiny_grid(prepared, compared, seeds=(3,), common={"epochs": 3}))


def test_regimes_share_trainings_that_set_their_labels(prepared: Path, tmp_path: Path):
    labels = {"partial": "labels/train.arrow", "full": "labels/train-full.arrow"}
    grid = plan_grid(tiny_grid(prepared, tmp_path, labels=labels, seeds=(0, 1)), "/")
    assert list(grid.tables) == ["partial", "full"]
    assert len(grid.trainings) == 2 * 5
    assert grid.tables["full"]["full labels"].trainings == grid.tables["partial"]["full labels"].trainings
    assert grid.trainings["full-an-seed1"].settings.data.train_labels == "labels/train-full.arrow"
    assert grid.trainings["full-an-seed1"].settings.boost.scored == (1.0, 5.0)
    assert slug("LL-R + BoostLU") == "LL-R-BoostLU"
    values = tiny_base(prepared) | {"optimizer.learning_rate": "1e-4"}
    assert settings_from_values(TrainSettings, values, "x").optimizer.learning_rate == 1e-4


def test_progress_estimates_the_remaining_time():
    now = [0.0]
    progress = TrainingProgress(4, finished=1, clock=lambda: now[0])
    assert progress.format_line("a: epoch 1/4") == "[1/4 runs] a: epoch 1/4"
    now[0], progress.done = 600, 1
    assert progress.format_line("b: epoch 1/4") == "[2/4 runs, 20 min 0 s left] b: epoch 1/4"
    progress.done = 3
    assert progress.format_line("c: done") == "[4/4 runs] c: done"
