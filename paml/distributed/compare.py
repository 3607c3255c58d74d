"""The command `paml compare`: trains a grid of methods and seeds and reports its tables."""

import json
from collections.abc import Mapping

import pandas as pd

from paml import storage
from paml.compare.curves import draw_curves, read_curves
from paml.compare.grid import Grid, Row, different_budgets, plan_grid, results_folder
from paml.compare.settings import CompareSettings
from paml.compare.table import as_csv, as_latex, as_text, eval_reference, score_row, table_metrics, table_rows
from paml.distributed import cluster
from paml.distributed.cluster import CONTINUE, print_to_stderr
from paml.distributed.many_runs import check_trainings, join_cluster, run_as_parent, train_all
from paml.report import command_line
from paml.runs.folder import is_finished
from paml.runs.journal import CHARTS_LINK, Journal


def run_compare(settings: CompareSettings) -> int:
    """Train what is not finished, then print and store the tables.

    Returns 0, or 1 if a training failed; the tables then lack it. Raises SettingsError or DataError before anything is
    trained. A stop exits with 128 + signal; the same command continues.
    """
    root = cluster.base_folder()
    grid = plan_grid(settings, root)
    trainings = list(grid.trainings.values())
    check_trainings(trainings)
    folder = results_folder(settings, settings.name, root)
    unfinished = [training for training in trainings if not is_finished(training.folder)]
    finished = len(trainings) - len(unfinished)
    print(f"{len(trainings)} trainings ({finished} finished), in {folder}", flush=True)
    if not settings.train:
        unfinished = []
    if unfinished:
        join_cluster(unfinished, settings)

    def work(journal: Journal, tags: dict[str, str]) -> int:
        failed = train_all(unfinished, settings, finished=finished, tags=tags) if unfinished else {}
        _report(settings, grid, failed, journal, folder)
        return 1 if failed else 0

    base = f"`{settings.base}`" if isinstance(settings.base, str) else "given in the settings"
    note = (
        f"{len(settings.methods)} methods, seeds {list(settings.seeds)}, base recipe {base}. {CHARTS_LINK}\n\n"
        f"**Repeat, or continue after a stop:** `{command_line()}`"
    )
    return run_as_parent(settings, settings.name, folder, note, work)


def _report(settings: CompareSettings, grid: Grid, failed: Mapping[str, str], journal: Journal, folder: str) -> None:
    """Print the tables, and write tables and curves to the folder and the journal."""
    num_finished = sum(is_finished(training.folder) for training in grid.trainings.values())
    digests = dict[str, str]()
    for regime, rows in grid.tables.items() if num_finished else ():
        reference = eval_reference(rows, settings)
        scores = {name: score_row(row, settings, reference, digests) for name, row in rows.items()}
        table = table_rows(scores, len(settings.seeds), settings)
        journal.metrics(table_metrics(regime, table), num_finished)
        notes = _table_notes(settings, rows, table, reference.grouped_by)
        title = f"test scores of {settings.name}" + (f", {regime}" if regime else "") + ", in percent"
        text, suffix = f"{title}\n{as_text(table, settings, notes)}\n", f"-{regime}" if regime else ""
        print(f"\n{text}", flush=True)
        for extension, content in {"txt": text, "csv": as_csv(table), "tex": as_latex(table, settings, notes)}.items():
            name = f"table{suffix}.{extension}"
            storage.write_bytes(storage.join(folder, name), content.encode())
            journal.artifact_bytes(content.encode(), f"tables/{name}")
        path = storage.join(folder, f"learning_curves{suffix}.png")
        references = [row for row in (settings.baseline_row, settings.upper_bound_row, settings.compare_to) if row]
        heading = ", ".join([settings.name, *([regime] if regime else []), f"seeds {list(settings.seeds)}"])
        draw_curves(read_curves(rows.values()), references, heading, path)
        journal.artifact(path, f"figures/learning_curves{suffix}.png")
    for name, error in failed.items():
        print_to_stderr(f"{name} FAILED: {error}")
    if failed:
        journal.artifact_bytes(json.dumps(dict(failed), indent=1).encode(), "failed.json")
        print_to_stderr(f"{len(failed)} trainings failed; {CONTINUE} with them")


def _table_notes(settings: CompareSettings, rows: Mapping[str, Row], table: pd.DataFrame, grouped_by: str) -> list[str]:
    convention = next(iter(rows.values())).first.settings.metrics.convention
    notes = [f"Each row's epoch is chosen on validation. {convention}; class groups of {grouped_by}"]
    if settings.replicates:
        notes.append(
            f"95%: percentile intervals of {settings.replicates} paired bootstrap replicates "
            "over the test images" + (", mean over the seeds" if len(settings.seeds) > 1 else "")
        )
    if bool(table[["precision", "recall"]].notna().to_numpy().any()):
        notes.append("Precision and recall of the rejected labels in that epoch")
    notes += [f"Other budget: {row}: {difference}" for row, difference in different_budgets(rows).items()]
    sources = table[table["published"].notna()].groupby("source", sort=False)
    if len(sources):
        notes.append(f"Published on {settings.published}, with other images, backbone and budget:")
        notes += [f"  {', '.join(part.index)}: {source}" for source, part in sources]
    return notes
