"""The report of a run in its journal: notes, score tables, plots and the final model."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from paml import storage
from paml.explain.gallery import gallery_epochs, gallery_html
from paml.explain.panel import PanelRow, draw_map_panel
from paml.explain.plots import draw_rejected
from paml.inference.predictor import ModelInfo, write_model_folder
from paml.metrics import score_table
from paml.redact import redact_credentials
from paml.runs.folder import pairs_path, per_class_path
from paml.runs.spec import load_model
from paml.runs.train import RunContext, data_digest, versions
from paml.settings import flatten
from paml.tracking.model import log_model
from paml.training.result import Result
from paml.training.settings import TrainSettings
from paml.training.watched import load_maps, watched_labels

MAX_EPOCHS_IN_PANEL = 8


def report_run(context: RunContext, result: Result) -> None:
    """Print the test scores, and add tables, plots and the final model to the run's journal."""
    journal, settings, folder = context.journal, context.settings, context.folder
    for alpha in result.test:
        journal.artifact(per_class_path(folder, alpha), f"tables/test_per_class_alpha_{alpha}.parquet")
        journal.artifact(pairs_path(folder, alpha), f"tables/test_pairs_alpha_{alpha}.parquet")
    if table := _score_table(result):
        print(f"\ntest scores of {settings.run.name}, in percent\n{table}\n", flush=True)
        journal.artifact_bytes(table.encode(), "tables/test_scores.txt")
    journal.note(run_note(context, result))
    history = [{name: value if math.isfinite(value) else None for name, value in row.items()} for row in result.history]
    journal.artifact_bytes(json.dumps(history, indent=1).encode(), "tables/history.json")
    _report_rejections(context, result)
    _report_maps(context, len(result.history))
    _report_model(context, result)


def run_note(context: RunContext, result: Result | None = None) -> str:
    """The Markdown at the top of a run's page: its scores, what it is and how to repeat it.

    Scores come first because MLflow shows only five lines before a click.
    """
    settings, data = context.settings, context.data
    scores = []
    if result is not None:
        scores += [f"**test mAP {100 * test.map:.2f}** ({name})" for name, test in _score_rows(result).items()]
        scores += [
            f"**validation mAP {100 * best['map']:.2f}** (alpha {alpha}, epoch {best['epoch']})"
            for alpha, best in result.best.items()
        ]
    unscored = "No test scores yet." if data.test is not None else "The test split is not used."
    digests = ", ".join(f"{split.name} `{data_digest(split)}`" for split in data.splits)
    parts = [
        "; ".join(scores) or unscored,
        f"**{settings.loss.name}**, boost {settings.boost.train:g} in training and {settings.boost.eval:g} in scoring, "
        f"{settings.model.backbone} at {data.input_text}, on `{settings.data.root}` "
        f"({len(data.train.samples):,} images, {len(data.classes):,} classes).",
        f"**Repeat:** `{repeat_command(settings)}`; all settings are in the artifact `settings.yaml`.",
        f"**Data** (digests of shards and labels): {digests}.",
        f"**Versions:** {', '.join(f'{name} {version}' for name, version in versions().items())}.",
    ]
    if result is not None and (rejections := _rejections_text(result, f"{settings.boost.eval:g}")):
        parts.insert(1, rejections)
    if result is not None and (table := _score_table(result)):
        parts.append(f"Test scores in percent, each alpha at its best validation epoch:\n\n```\n{table}\n```")
    return "\n\n".join(parts)


def command_line() -> str:
    """The command that started this process, without credentials."""
    program = Path(sys.argv[0])
    is_job = program.suffix == ".py" and program.name != "__main__.py"
    start = ["python", f"jobs/{program.name}"] if is_job else ["paml"]
    return redact_credentials(shlex.join([*start, *sys.argv[1:]]))


def repeat_command(settings: TrainSettings) -> str:
    """The command that repeats a training: this process's own if it is one, else `paml train` with its settings."""
    program = Path(sys.argv[0]).name
    if program.startswith("train_") or (program in ("paml", "__main__.py") and sys.argv[1:2] == ["train"]):
        return command_line()
    defaults = flatten(TrainSettings())
    words = ["paml", "train"]
    for name, value in flatten(settings).items():
        if value != defaults.get(name) and name != "run.resume":
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return redact_credentials(shlex.join(words))


def _score_rows(result: Result) -> dict[str, Any]:
    return {f"alpha {alpha}, epoch {result.best[alpha]['epoch']}": scores for alpha, scores in result.test.items()}


def _score_table(result: Result) -> str:
    return score_table(_score_rows(result)) if result.test else ""


def _rejections_text(result: Result, alpha: str) -> str | None:
    """Rejections in the best epoch; None if the run rejects nothing."""
    best = result.best.get(alpha, {}).get("epoch")
    metrics = next((row for row in result.history if row["epoch"] == best), {})
    if "rejection/rejected" not in metrics:
        return None
    texts = {
        "precision": "{:.0f} % of them truly positive",
        "recall": "{:.0f} % of all false negatives",
        "probe_recall": "recall estimated by the probe {:.0f} %",
        "probe_false_rejection_rate": "false rejection rate estimated by the probe {:.1f} %",
    }
    values = {name: metrics.get(f"rejection/{name}", math.nan) for name in texts}
    known = [texts[name].format(100 * value) for name, value in values.items() if not math.isnan(value)]
    first = f"**{metrics['rejection/rejected']:,.0f} labels rejected** in the best epoch"
    return ", ".join([first, *known]) + "; see the artifact `rejected_labels.html` and the folder `figures`."


def _report_rejections(context: RunContext, result: Result) -> None:
    journal, settings, folder = context.journal, context.settings, context.folder
    path = storage.join(folder, "artifacts", "rejected_by_epoch.png")
    if draw_rejected({str(settings.run.name): (0, result.history)}, path):
        journal.artifact(path, "figures/rejected_by_epoch.png")
    if settings.data.embeddings is not None:
        return  # there are no images to show
    epochs = gallery_epochs(folder, context.data.train, len(result.history), settings.seed)
    if epochs:
        journal.artifact_bytes(gallery_html(str(settings.run.name), epochs).encode(), "rejected_labels.html")


def _report_maps(context: RunContext, epochs: int) -> None:
    """Draw the watched labels' maps at up to MAX_EPOCHS_IN_PANEL evenly spaced epochs, first and last included."""
    data, folder = context.data, context.folder
    chosen = np.unique(np.linspace(1, epochs, min(epochs, MAX_EPOCHS_IN_PANEL)).round().astype(int)).tolist()
    stored = {epoch: maps for epoch in chosen if (maps := load_maps(folder, epoch))}
    if not stored:
        return
    labels = watched_labels(data.validation, data.image_size, context.settings.seed)
    rows = [
        PanelRow(label.pixels, data.names[label.cls], [maps[position] for maps in stored.values()])
        for position, label in enumerate(labels[: min(map(len, stored.values()))])
    ]
    path = storage.join(folder, "artifacts", "maps_by_epoch.png")
    draw_map_panel([f"epoch {epoch}" for epoch in stored], rows, path)
    context.journal.artifact(path, "figures/maps_by_epoch.png")


def _report_model(context: RunContext, result: Result) -> None:
    """Write the best checkpoint's weights as a model folder, and log that as the final model."""
    settings, data = context.settings, context.data
    alpha = settings.boost.eval
    checkpoint = result.best[f"{alpha:g}"]["checkpoint"]
    network = load_model(context.folder, settings, checkpoint)
    info = ModelInfo(settings.model, alpha, data.classes, data.names, data.image_size, settings.run.name, checkpoint)
    folder = storage.join(context.folder, "model")
    write_model_folder(folder, network, info, None)
    if settings.data.embeddings is None:  # MLflow's model takes images
        log_model(context.journal, model=folder)
