"""A comparison as people start it: its trainings, its tables, its run in MLflow."""

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping

import yaml

from paml import storage
from paml.compare.curves import curves_of, draw_curves
from paml.compare.grid import Grid, grid_folder, other_budgets, plan_grid
from paml.compare.settings import CompareSettings, TrainingsSettings
from paml.compare.table import (
    Line,
    as_csv,
    as_latex,
    as_text,
    columns_of,
    figures_of,
    finished,
    score_row,
    table_lines,
    yardstick_of,
)
from paml.distributed import cluster
from paml.distributed.grid_run import AGAIN, check_trainings, join_cluster, train_all
from paml.distributed.run import stopping
from paml.secrets import without_keys
from paml.shards.tasks import one_line
from paml.tracking import Journal, MlflowFollower, read_journal, replay
from paml.tracking.journal import CHARTS_LINK, plain
from paml.training.loop import run_folder_of

PARENT_TAG = "mlflow.parentRunId"
_PARENT_SECONDS = 20.0


def run_compare(settings: CompareSettings) -> int:
    """Train what is not trained yet, then print and store the tables of all that is.

    Returns 0, or 1 where a training failed: it is named, and the tables stand without it. Raises SettingsError or
    DataError before anything is trained; a stop exits with 128 + signal, and the same command goes on.
    """
    base = cluster.base_folder()
    grid = plan_grid(settings, base)
    trainings = list(grid.trainings.values())
    check_trainings(trainings)
    folder = grid_folder(settings, settings.name, base)
    due = [each for each in trainings if not finished(each)]
    print(f"{len(trainings)} trainings, of which {len(trainings) - len(due)} are done, in {folder}", flush=True)
    if not settings.train:
        due = []
    if due:
        join_cluster(due, settings)

    def work(journal: Journal, parent: str | None) -> int:
        tags = {PARENT_TAG: parent} if parent else {}
        failed = train_all(due, settings, done=len(trainings) - len(due), tags=tags) if due else {}
        _report(settings, grid, failed, journal, folder)
        return 1 if failed else 0

    note = (
        f"{len(settings.methods)} methods, seeds {list(settings.seeds)}, base `{_base_name(settings)}`. {CHARTS_LINK}"
    )
    return tracked(settings, settings.name, folder, note, [run_folder_of(each.settings) for each in trainings], work)


def tracked(
    settings: TrainingsSettings,
    name: str,
    folder: str,
    note: str,
    children: list[str],
    work: Callable[[Journal, str | None], int],
) -> int:
    """Call `work(journal, MLflow's id of the parent run)` with the parent's journal open and mirrored into MLflow.

    children: run folders of the trainings, whose MLflow runs are put below the parent's in the end, also those that
    MLflow was not there for. Returns what `work` returns; a stop exits with 128 + signal.
    """
    journal = Journal(folder, "driver")
    with stopping() as signals:
        follower = None
        try:
            journal.run(experiment=settings.experiment, name=name, note=note)
            _note_settings(journal, settings)
            root = folder.rstrip("/").rpartition("/")[0]
            follower = MlflowFollower(folder, storage_root=root) if settings.mlflow else None
            status = work(journal, _parent_of(follower))
            journal.status("FINISHED" if status == 0 else "FAILED")
        except (KeyboardInterrupt, SystemExit) as stop:
            journal.status("KILLED")
            if follower is not None:
                follower.close(timeout=1.0 if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else 10.0)
            if isinstance(stop, SystemExit):
                raise  # a training in this process has said so already
            print(f"stopped; {AGAIN}", file=sys.stderr, flush=True)
            raise SystemExit(128 + (signals[0] if signals else 2)) from None
        except BaseException:
            journal.status("FAILED")
            if follower is not None:
                follower.close(timeout=10.0)
            raise
    if follower is not None and follower.close() == 0 and follower.run_id is not None:
        _adopt(children, follower.run_id, follower.tracking_uri)
        shown = without_keys(follower.tracking_uri)
        print(f"MLflow: {shown}, experiment {settings.experiment}, run {follower.run_id}")
    return status


def _note_settings(journal: Journal, settings: TrainingsSettings) -> None:
    """Whole as artifact; as parameters what is no mapping, since methods have names that MLflow does not take."""
    values = plain(dataclasses.asdict(settings))
    journal.artifact_bytes(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode(), "settings.yaml")
    journal.params({name: value for name, value in values.items() if not isinstance(value, dict)})


def _base_name(settings: TrainingsSettings) -> str:
    return settings.base if isinstance(settings.base, str) else "given in the settings"


def _parent_of(follower: MlflowFollower | None) -> str | None:
    """MLflow's id of the parent run, so that trainings can name it; None where no server answers in time."""
    if follower is None or follower.tracking_uri is None:
        return None
    end = time.monotonic() + _PARENT_SECONDS
    while follower.run_id is None and time.monotonic() < end:
        time.sleep(0.1)
    return follower.run_id


def _adopt(children: list[str], parent: str, uri: str | None) -> None:
    """Put the trainings' MLflow runs below the parent's that are not there yet."""
    for folder in children:
        events = read_journal(folder, unreadable={})
        named = [event.value for event in events if event.kind == "tag" and event.key == PARENT_TAG]
        if events and named[-1:] != [parent]:
            try:
                Journal(folder, "grid").tags({PARENT_TAG: parent})
                replay(folder, uri)
            except Exception as error:  # a view that can be refilled: no reason to fail
                print(f"{folder} is not below its comparison in MLflow: {one_line(error)}", file=sys.stderr, flush=True)


def _report(settings: CompareSettings, grid: Grid, failed: Mapping[str, str], journal: Journal, folder: str) -> None:
    """Every table on the console, in the folder and in the journal; figures at the number of trainings scored."""
    scored = [each for each in grid.trainings.values() if finished(each)]
    if scored:
        seen = dict[str, str]()
        for regime, rows in grid.tables.items():
            yardstick = yardstick_of(rows, grid.trainings, settings)
            found = {row.name: score_row(row, grid.trainings, settings, yardstick, seen) for row in rows}
            lines = table_lines(found, len(settings.seeds), settings)
            convention = scored[0].settings.metrics.convention
            notes = _notes(settings, lines, other_budgets(grid, rows), convention, yardstick.grouped_by)
            title = f"test scores of {settings.name}" + (f", {regime}" if regime else "") + ", in percent"
            print(f"\n{title}\n{as_text(lines, settings, notes)}\n", flush=True)
            written = {
                "txt": f"{title}\n{as_text(lines, settings, notes)}\n",
                "csv": as_csv(lines),
                "tex": as_latex(lines, settings, notes),
            }
            for ending, text in written.items():
                name = f"table{'-' + regime if regime else ''}.{ending}"
                storage.write_bytes(storage.join(folder, name), text.encode())
                journal.artifact_bytes(text.encode(), f"tables/{name}")
            name = f"learning_curves{'-' + regime if regime else ''}.png"
            path, told = storage.join(folder, name), [settings.below, settings.above, settings.against]
            heading = ", ".join([settings.name, *([regime] if regime else []), f"seeds {list(settings.seeds)}"])
            draw_curves(curves_of(rows, grid.trainings), [row for row in told if row], heading, path)
            journal.artifact(path, f"figures/{name}")
            journal.metrics(_metrics(regime, lines), len(scored))
    for name, error in failed.items():
        print(f"{name} FAILED: {error}", file=sys.stderr, flush=True)
    if failed:
        journal.artifact_bytes(json.dumps(dict(failed), indent=1).encode(), "failed.json")
        print(f"{len(failed)} trainings failed; {AGAIN} with them", file=sys.stderr, flush=True)


def _notes(
    settings: CompareSettings, lines: list[Line], budgets: Mapping[str, str], convention: str, grouped_by: str
) -> list[str]:
    shown = {heading for heading, _ in columns_of(lines, settings)}
    notes = [f"each row's epoch chosen on validation. {convention}; all rows in the groups of {grouped_by}"]
    if settings.replicates:
        notes.append(
            f"{settings.level:.0%}: percentiles of {settings.replicates} bootstraps over the test images, paired"
            + (", mean over the seeds" if len(settings.seeds) > 1 else "")
        )
    if "rej. prec." in shown or "rej. recall" in shown:
        notes.append("rejection's precision and recall in the epoch chosen")
    notes += [f"other budget: {row}: {what}" for row, what in budgets.items()]
    if "published" in shown:
        sources: dict[str, list[str]] = {}
        for line in lines:
            if line.source:
                sources.setdefault(line.source, []).append(line.name)
        notes.append(f"published, on {settings.published}, with other images, backbone and budget:")
        notes += [f"  {', '.join(names)}: {source}" for source, names in sources.items()]
    return notes


def _metrics(regime: str, lines: list[Line]) -> dict[str, float]:
    """Names that MLflow takes: LL-R + BoostLU of the regime single becomes map/single/LL-R BoostLU."""
    found = {}
    for row, figures in figures_of(lines).items():
        plain = " ".join(re.sub(r"[^\w. :-]", " ", row, flags=re.ASCII).split())
        found |= {f"{name}/{regime + '/' if regime else ''}{plain}": value for name, value in figures.items()}
    return found
