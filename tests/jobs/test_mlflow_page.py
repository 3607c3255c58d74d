"""The MLflow UI in a real browser: the page of a finished run, and of a sweep with trials of every outcome."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from urllib.parse import quote

import pytest

from paml.compare.space import Trial, best_trial
from paml.tracking.mlflow_sink import read_state
from tests.helpers.browser import Browser
from tests.helpers.jobs import environment, prepare_scenes, tiny_options, train_job, write_scenes
from tests.helpers.kills import OwnRay
from tests.helpers.sweeps import ended, plan, sweep_job, tiny_sweep
from tests.tracking.conftest import MlflowServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EPOCHS = 10
"""Enough to stop a trial before its last epoch."""
RATES = (1e-3, 2e-3, 1e-9, 1e-3, 1.5e-3)
"""Learning rates of the trials, in order. The third learns nothing; the weights of the fourth do not exist."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser") / "profile", height=2400)
    yield browser
    browser.close()


def page_of(server: MlflowServer, run: Path) -> str:
    """The address of a run's page."""
    (state,) = read_state(str(run)).values()
    return f"{server.uri}/#/experiments/{state['experiment_id']}/runs/{state['run_id']}"


def test_the_page_of_a_run_shows_scores_and_rejections(browser: Browser, server: MlflowServer, tmp_path: Path) -> None:
    data = prepare_scenes(write_scenes(tmp_path / "scenes", train=60, others=20), tmp_path / "data")
    options = tiny_options(data, tmp_path / "runs", "seen", epochs=2, loss__name="ll-r", run__trackers='["mlflow"]')
    options += ["--loss.reject_rate_step", "0.05"]
    with train_job(options, tmp_path / "job.log", env=environment(MLFLOW_TRACKING_URI=server.uri)) as job:
        assert job.wait() == 0, job.output
    run = tmp_path / "runs" / "seen"
    result = json.loads((run / "result.json").read_text())
    page = page_of(server, run)

    overview = ["ll-r", "Repeat:", "paml train", "Versions:", "torch", "digests", "Finished"]
    overview += [f"{100 * scores['map']:.2f}" for scores in result["test"].values()]
    overview += [f"validation mAP {100 * best['map']:.2f}" for best in result["best"].values()]
    at_best = result["history"][result["best"]["5"]["epoch"] - 1]
    overview += [
        f"{at_best['rejection/rejected']:,.0f} labels rejected in the best epoch",
        "recall estimated by the probe",
    ]
    overview += [scores["convention"] for scores in result["test"].values()]
    browser.visit(page, *overview)
    sections = ("groups(", "rejection(", "test(", "train(", "val(")
    browser.visit(f"{page}/model-metrics", *sections, "seen (rejection/rejected)")  # without a click

    browser.visit(f"{page}/artifacts/figures/rejected_by_epoch.png", "rejected_by_epoch.png", "rejected_labels.html")
    browser.until(LARGE_IMAGE.format(width=800), "the plot of rejected labels")
    browser.visit(f"{page}/artifacts/rejected_labels.html", "rejected_labels.html")
    rejected = int(result["history"][-1]["rejection/rejected"])
    assert rejected > 0
    browser.until("document.querySelector('iframe') !== null", "the page of rejected labels")
    run_id = page.rpartition("/")[2]
    gallery = browser.run(f"fetch('/get-artifact?path=rejected_labels.html&run_uuid={run_id}').then(one => one.text())")
    assert f"{rejected:,} labels rejected" in gallery


LARGE_IMAGE = "[...document.images].some(one => one.complete && one.naturalWidth > {width})"


@dataclasses.dataclass
class FinishedSweep:
    page: str
    experiment: str
    """The address of the list of runs."""
    trials: dict[int, Trial]
    output: str


@pytest.fixture(scope="module")
def swept(prepared: Path, server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> FinishedSweep:
    folder = tmp_path_factory.mktemp("swept")
    points = [[rate, None] for rate in RATES]
    points[3][1] = str(folder / "nowhere.pth")
    settings = tiny_sweep(
        prepared,
        folder / "runs",
        space={"optimizer.learning_rate, model.weights": points},
        search="grid",
        trials=None,
        scheduler="median",
        median_min_trials=2,
        max_concurrent=1,
        common={"epochs": EPOCHS},
        trackers=["mlflow"],
    )
    ray = OwnRay()
    ray.start()
    try:
        env = {**ray.environment, "MLFLOW_TRACKING_URI": server.uri}
        with sweep_job(settings, folder / "log", env=env) as job:
            assert job.wait() == 1, job.output  # a trial fails
    finally:
        ray.stop()
    page = page_of(server, folder / "runs" / "sweep")
    return FinishedSweep(page, page.rpartition("/")[0], ended(plan(settings)), job.output)


def stopped_at(trials: dict[int, Trial], number: int) -> int | None:
    """The epoch in which the median rule stops a trial: its best score is below the median of the means of earlier
    trials. None if it is not stopped before its last epoch.

    A stopped trial may have finished one more epoch, which Tune does not see.
    """
    for epoch in range(1, min(EPOCHS, len(trials[number].scores) + 1)):
        seen = [one.scores[: stopped_at(trials, n)] for n, one in trials.items() if n < number]
        earlier = [scores for scores in seen if len(scores) >= epoch]
        middle = median(fmean(scores[:epoch]) for scores in earlier) if len(earlier) >= 2 else -1.0
        if max(trials[number].scores[:epoch]) < middle:
            return epoch
    return None


def test_the_median_rule_stops_worse_trials_only(swept: FinishedSweep) -> None:
    assert swept.trials[4].state == "failed", swept.output
    for number in (1, 2, 3):  # the last one may be stopped or not
        trial, epoch = swept.trials[number], stopped_at(swept.trials, number)
        assert trial.state == ("finished" if epoch is None else "stopped"), swept.output
        assert (epoch or EPOCHS) <= len(trial.scores) < EPOCHS + (epoch is None)
    assert swept.trials[3].state == "stopped"
    assert f"trial 3: stopped after epoch {len(swept.trials[3].scores)}, val mAP" in swept.output


def test_the_page_of_a_sweep_shows_results_and_commands(browser: Browser, swept: FinishedSweep) -> None:
    best, states = best_trial(swept.trials.values()), Counter(trial.state for trial in swept.trials.values())
    assert best is not None
    shown = browser.visit(
        swept.page,
        f"Best: validation mAP {100 * best.score:.2f} in epoch {best.epoch} of trial {best.number}",
        f"Trials: 5 of 5: {states['finished']} finished, {states['stopped']} stopped early, 1 failed.",
        "paml train --config",
        "Repeat, or continue after a stop: python jobs/tune_openimages.py --config",
        "Search: grid",
        "optimizer.learning_rate, model.weights",
        "Trial 4 failed:",
    )
    assert "nowhere.pth" in shown
    charts = browser.run("[...document.links].find(link => link.textContent === 'Charts of all runs').href")
    scored = [f"sweep-{number:04d} (groups/G1)" for number, trial in swept.trials.items() if trial.scores]
    assert len(scored) == 4
    browser.visit(charts, f"{len(swept.trials)} matching runs", *scored)
    browser.visit(f"{swept.page}/artifacts/tables/trials.txt", "trials.csv", "stopped", "failed")
    browser.visit(f"{swept.page}/artifacts/recipes/best.yaml", "best.yaml", "learning_rate")
    browser.visit(f"{swept.page}/artifacts/figures/score_by_setting.png", "parallel_coordinates.png")
    browser.until(LARGE_IMAGE.format(width=300), "the plot of the sweep")


def test_trials_are_child_runs_and_can_be_filtered_by_outcome(browser: Browser, swept: FinishedSweep) -> None:
    by_age = f"{swept.experiment}?orderByKey=attributes.start_time&orderByAsc=false&compareRunsMode=TABLE&searchFilter="
    listed = browser.visit(by_age, "Expand rows", f"{1 + len(swept.trials)} matching runs")
    assert not [number for number in swept.trials if f"sweep-{number:04d}" in listed]  # before the row is expanded
    finished = [number for number, trial in swept.trials.items() if trial.state == "finished"]
    query = quote("tags.trial_state = 'finished'")
    browser.visit(f"{by_age}{query}", f"{1 + len(finished)} matching runs")  # and the sweep
