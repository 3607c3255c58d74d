"""A comparison from its settings to its tables, stopped, taken up again and with trainings that fail."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from paml.compare.curves import Curve, curves_of, draw_curves
from paml.compare.grid import plan_grid, read_training, slug
from paml.compare.progress import Progress
from paml.compare.table import Scored, as_csv, as_text, finished, hours_of, result_of, table_lines
from paml.distributed.compare_run import run_compare
from paml.errors import SettingsError
from paml.labels.table import LabelTable
from paml.metrics import average_precision_by_class, five_groups, read_pairs, scores
from paml.tracking import Event
from paml.training.loop import Watcher
from tests.helpers.grids import METHODS, tiny_base, tiny_grid


def rows_of(folder: Path, name: str = "table-partial.csv") -> dict[str, dict[str, str]]:
    """Row -> its figures."""
    with (folder / "comparison" / name).open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def width_of(path: Path) -> int:
    with Image.open(path) as picture:
        picture.load()
        return picture.width


@pytest.fixture(scope="module")
def compared(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished comparison; never write into it."""
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
    assert "published, on coco" in text
    latex = (compared / "comparison" / "table-partial.tex").read_text()
    assert latex.count(r" \\") == 5
    assert r"\textbf{" in latex
    settings = yaml.safe_load((compared / "comparison" / "artifacts" / "settings.yaml").read_text())
    assert list(settings["methods"]) == list(METHODS)


def test_learning_curves_are_those_of_each_rows_alpha(compared: Path, prepared: Path):
    grid = plan_grid(tiny_grid(prepared, compared, seeds=(3,)), "")
    curves = {curve.name: curve for curve in curves_of(grid.tables["partial"], grid.trainings)}
    assert list(curves) == list(rows_of(compared))
    history = result_of(grid.trainings["partial-an-seed3"]).history
    assert curves["AN"].maps.tolist() == [[figures["val/map"] for figures in history]]
    assert curves["AN + boost at inference"].maps.tolist() == [[figures["val/map_alpha_5"] for figures in history]]
    assert curves["AN"].best == max(figures["val/map"] for figures in history)
    assert width_of(compared / "comparison" / "learning_curves-partial.png") > 500


def test_learning_curves_of_many_rows_and_seeds_of_other_lengths(tmp_path: Path):
    maps = np.random.default_rng(0).random((20, 2, 5))
    maps[3, 1, 3:] = np.nan
    curves = [Curve(f"row {place}", own) for place, own in enumerate(maps)]
    draw_curves(curves, ["row 0", "absent"], "many", str(tmp_path / "curves.png"))
    assert width_of(tmp_path / "curves.png") > 500
    assert curves[3].best == max(np.nanmean(maps[3], axis=0))


def test_pairs_say_what_the_run_scored(compared: Path):
    for alpha in ("1", "5"):
        pairs, facts = read_pairs(
            str(compared / "partial-an-seed3" / "artifacts" / f"test_pairs_alpha_{alpha}.parquet")
        )
        result = json.loads((compared / "partial-an-seed3" / "result.json").read_text())
        assert scores(*pairs[:3], int(facts["num_classes"])).map == result["test"][alpha]["map"]
        assert len(np.unique(pairs.image.numpy())) == 18


def test_all_rows_are_grouped_by_the_same_labels(compared: Path, prepared: Path):
    """A row that trained on other labels, as the full ones, has its G1 to G5 over the classes of the others."""
    counts = LabelTable.open(prepared / "labels" / "train.arrow").class_counts()
    group_of = five_groups(sum(counts))
    folder = compared / "full-labels-seed3"
    pairs, facts = read_pairs(str(folder / "artifacts" / "test_pairs_alpha_1.parquet"))
    per_class = average_precision_by_class(*(part.numpy() for part in pairs[:3]), int(facts["num_classes"]))
    row = rows_of(compared)["full labels"]
    own = json.loads((folder / "result.json").read_text())["test"]["1"]["groups"]
    for number in range(1, 6):
        assert float(row[f"G{number}"]) == pytest.approx(np.nanmean(per_class[group_of == number]))
    assert [own[f"G{number}"] for number in range(1, 6)] != pytest.approx([float(row[f"G{n}"]) for n in range(1, 6)])
    assert "all rows in the groups of AN" in (compared / "comparison" / "table-partial.txt").read_text()


def test_a_finished_comparison_trains_nothing(compared: Path, prepared: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in compared.glob("*/result.json")}
    table = (compared / "comparison" / "table-partial.csv").read_text()
    assert run_compare(tiny_grid(prepared, compared, seeds=(3,), published="coco")) == 0
    assert "3 trainings, of which 3 are done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in compared.glob("*/result.json")} == before
    assert (compared / "comparison" / "table-partial.csv").read_text() == table


def test_a_comparison_whose_rate_is_fitted_goes_on_with_the_fitted_one(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    alone: dict[str, Any] = {"below": None, "above": None, "against": None}
    fitted = {"LL-R": {"loss.name": "ll-r", "loss.reject_rate_step": None}}
    assert run_compare(tiny_grid(prepared, tmp_path, methods=fitted, **alone)) == 0
    assert "fitted to the data" in capsys.readouterr().out
    assert run_compare(tiny_grid(prepared, tmp_path, methods=fitted, **alone)) == 0
    assert "1 trainings, of which 1 are done" in capsys.readouterr().out
    another = {"LL-R": {"loss.name": "ll-r", "loss.reject_rate_step": 0.123}}
    with pytest.raises(SettingsError, match=r"loss\.reject_rate_step: .* then, 0\.123 now"):
        run_compare(tiny_grid(prepared, tmp_path, methods=another, **alone))


def test_stopped_and_failed_trainings(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compared: Path
):
    """One fails and is named, one is stopped between epochs; the same command ends where the unbroken one did."""
    import paml.distributed.run as run_module

    train = run_module.train

    def faulty(settings, world, watcher: Watcher, last_epoch=None):
        if settings.loss.name == "full":
            raise RuntimeError("a test's own failure")
        if settings.loss.name == "ll-r":

            def stop(figures: dict) -> None:
                raise KeyboardInterrupt

            watcher = Watcher(watcher.journal, watcher.say, watcher.bar, stop)
        return train(settings, world, watcher, last_epoch)

    monkeypatch.setattr(run_module, "train", faulty)
    with pytest.raises(SystemExit):
        run_compare(tiny_grid(prepared, tmp_path, seeds=(3,)))
    said = capsys.readouterr()
    assert "full-labels-seed3: FAILED: RuntimeError: a test's own failure" in said.out
    assert "the same command goes on" in said.err
    assert not (tmp_path / "partial-LL-R-BoostLU-seed3" / "result.json").exists()

    monkeypatch.setattr(
        run_module, "train", lambda *given: faulty(*given) if given[0].loss.name == "full" else train(*given)
    )
    assert run_compare(tiny_grid(prepared, tmp_path, seeds=(3,))) == 1
    said = capsys.readouterr()
    assert "partial-LL-R-BoostLU-seed3: going on at epoch 2" in said.out
    assert "1 trainings failed" in said.err
    rows = rows_of(tmp_path)
    assert (rows["full labels"]["seeds"], rows["full labels"]["missing"]) == ("0", "1")
    assert rows["LL-R + BoostLU"]["gap"] == ""

    monkeypatch.setattr(run_module, "train", train)
    assert run_compare(tiny_grid(prepared, tmp_path, seeds=(3,))) == 0
    assert rows_of(tmp_path)["LL-R + BoostLU"]["gap"] != ""
    broken, whole = (plan_grid(tiny_grid(prepared, at, seeds=(3,)), "/").trainings for at in (tmp_path, compared))
    for name, each in broken.items():
        assert finished(each)
        assert result_of(each).to_json()["test"] == result_of(whole[name]).to_json()["test"]


def test_figures_of_a_table(prepared: Path, tmp_path: Path):
    """Means, spread and gap over seeds, the difference over the seeds that both rows have."""

    def scored(*maps: float) -> dict[int, Scored]:
        replicates = np.linspace(-0.01, 0.01, 101)
        return {
            seed: Scored(map_, {"G1": map_}, 2, 0.5, math.nan, 0.1, map_ + replicates)
            for seed, map_ in enumerate(maps)
            if not math.isnan(map_)
        }

    rows = {"full labels": scored(0.8, 0.9), "AN": scored(0.6, 0.5), "one": scored(0.7, math.nan), "none": {}}
    settings = tiny_grid(prepared, tmp_path, seeds=(0, 1), level=0.9)
    full, an, one, none = table_lines(rows, 2, settings)
    assert full.map == pytest.approx(0.85)
    assert full.spread == pytest.approx(np.std([0.8, 0.9], ddof=1))
    assert (full.gap, an.gap, one.gap) == pytest.approx((1, 0, 0.5))
    assert (one.difference, one.difference_low, one.difference_high) == pytest.approx((0.1, 0.1, 0.1))
    assert (an.low, an.high) == pytest.approx((0.541, 0.559))
    assert (one.seeds, one.missing, none.missing) == (1, 1, 2)
    assert math.isnan(none.map)
    text = as_text([full, an, one, none], settings, ["a note"])
    assert "50 %" in text
    assert text.endswith("a note")
    assert "rej. recall" not in text
    assert as_csv([none]).splitlines()[1].startswith("none,0,2,,")


def test_hours_leave_stops_out():
    def event(kind: str, minutes: int, value: str = "") -> Event:
        return Event(kind=kind, time_ms=minutes * 60_000, value=value)

    killed = [event("status", 0, "RUNNING"), event("metric", 30)]
    resumed = [event("status", 600, "RUNNING"), event("status", 660, "FINISHED"), event("tag", 900)]
    assert hours_of(killed + resumed) == pytest.approx(1.5)
    assert hours_of(killed) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": METHODS | {"x": {"loss.name": "ll-x"}}}, r"method 'x': loss.name is 'll-x'; allowed are an"),
        ({"methods": METHODS | {"x": {"loss.nam": "an"}}}, r"method 'x': there is no setting 'loss.nam'.*loss.name"),
        ({"methods": METHODS | {"x": {"batch_size": "many"}}}, r"method 'x': .*batch_size"),
        ({"methods": METHODS | {"x": {"rows": {"AN": 1}}}}, "two methods have a row 'AN'"),
        ({"methods": METHODS | {"x": {"rows": {"A": 1, "B": 1}}}}, "method 'x': rows is"),
        ({"methods": METHODS | {"a n": {}, "a-n": {}}}, "would both lie in partial-a-n"),
        ({"methods": METHODS | {"x": {"metrics.no_positives": "zero"}}}, "differ in metrics.no_positives"),
        ({"methods": {}}, "methods is empty"),
        ({"below": "nothing"}, "below is 'nothing'; the rows are full labels, AN"),
        ({"below": "LL-R + BoostLU"}, "which is boosted"),
        ({"seeds": (1, 1)}, "seeds is"),
        ({"base": "no/such.yaml"}, "there is no such recipe"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(prepared: Path, tmp_path: Path, changes: dict, message: str):
    with pytest.raises(SettingsError, match=message):
        run_compare(tiny_grid(prepared, tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_another_comparisons_runs_are_refused(prepared: Path, compared: Path):
    with pytest.raises(SettingsError, match="full-labels-seed3: the run was begun with other settings: epochs"):
        run_compare(tiny_grid(prepared, compared, seeds=(3,), common={"epochs": 3}))


def test_regimes_share_what_does_not_depend_on_them(prepared: Path, tmp_path: Path):
    labels = {"partial": "labels/train.arrow", "full": "labels/train-full.arrow"}
    grid = plan_grid(tiny_grid(prepared, tmp_path, labels=labels, seeds=(0, 1)), "/")
    assert list(grid.tables) == ["partial", "full"]
    assert len(grid.trainings) == 2 * 5
    assert grid.tables["full"][0].trainings == grid.tables["partial"][0].trainings
    assert grid.trainings["full-an-seed1"].settings.data.train_labels == "labels/train-full.arrow"
    assert grid.trainings["full-an-seed1"].settings.boost.scored == (1.0, 5.0)
    assert slug("LL-R + BoostLU") == "LL-R-BoostLU"
    assert read_training(tiny_base(prepared) | {"optimiser.learning_rate": "1e-4"}, "x").optimiser.learning_rate == 1e-4


def test_progress_tells_what_is_left():
    now = [0.0]
    progress = Progress({"a": 4, "b": 4}, done=1, clock=lambda: now[0])
    assert progress.line("a", "40 training images") == "[1/3 runs] a: 40 training images"
    now[0] = 600
    assert progress.line("a", "epoch 1/4 · loss 1") == "[1/3 runs, 1 h 10 min left] a: epoch 1/4 · loss 1"
    assert progress.line("b", "epoch 4/4 · taken up late").startswith("[1/3 runs, 15 min left]")
    assert progress.ended("b", None) == "[2/3 runs, 15 min left] b: done"
    assert progress.ended("a", "bad") == "[3/3 runs] a: FAILED: bad"
