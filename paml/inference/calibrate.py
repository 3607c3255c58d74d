"""Calibration of a run's checkpoint: fit on a split, measure, and store with the model for predictions to use."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from paml import storage
from paml.errors import DataError, SettingsError
from paml.inference.predictor import Predictor, calibration_path, model_folder_of_run, open_predictor
from paml.metrics.calibration import (
    VALIDITY_NOTE,
    Calibration,
    CalibrationSettings,
    Reliability,
    calibrate,
    fit,
    log_loss,
    reliability,
    sigmoid,
)
from paml.plots import CONTROL_COLOR, new_figure, run_color, save_figure, style_axes
from paml.runs.folder import settings_of_run
from paml.runs.journal import Journal
from paml.runs.spec import parse_run
from paml.training.data import eval_loader, open_split
from paml.training.evaluate import score_pairs
from paml.training.hooks import terminal_progress
from paml.training.settings import TrainSettings
from paml.training.world import World, current_world

_FOLDS = 5
_MAX_LISTED_CLASSES = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateSettings:
    """Which checkpoint to calibrate, and on which images."""

    run: str = "runs/openimages-v3"
    """FOLDER[@best|newest|step-*][:alpha=A]. The calibration applies to this checkpoint and alpha only."""
    split: str = "validation"
    """Split of the prepared data to fit on. Do not report scores on this split."""
    check: str | None = None
    """Another split (test) on which to measure the fitted calibration and thresholds; null for none."""
    root: str | None = None
    """Prepared data folder; null uses the run's data.root."""
    calibration: CalibrationSettings = dataclasses.field(default_factory=CalibrationSettings)
    """Method, and precision of the thresholds."""

    def __post_init__(self) -> None:
        if self.check == self.split:
            raise SettingsError(f"check is {self.check!r}, the split to fit on: set another split, or null")


class LabeledLogits(NamedTuple):
    """The n annotated pairs of a split: class int64 [n], logit float64 [n], positive bool [n], image int64 [n]."""

    cls: np.ndarray
    logit: np.ndarray
    positive: np.ndarray
    image: np.ndarray


def calibrate_run(
    settings: CalibrateSettings,
    log: Callable[[str], None] = print,
    on_journaled: Callable[[str, str | None], None] | None = None,
) -> Calibration:
    """Fit a calibration, store it with the checkpoint and the run's model, and journal metrics and a diagram.

    The error after calibration is cross-validated in five folds of images. on_journaled: called last, if the run has a
    journal, with the run folder, and with the folder of the run's model if the calibration is of that model. Raises
    PamlError.
    """
    run_folder, _, _ = parse_run(settings.run)
    run = settings_of_run(run_folder)
    predictor = open_predictor(settings.run, device=current_world().device, calibrated=False, takes_images=False)
    num_classes, bins = len(predictor.classes), settings.calibration.bins
    pairs = _score_split(predictor, run, settings.root, settings.split)
    curves: dict[str, Reliability] = {}
    metrics: dict[str, float] = {"pairs": len(pairs.cls), "images": len(np.unique(pairs.image))}

    def measure(title: str, when: str, scores: np.ndarray, positive: np.ndarray, prefix: str = "") -> None:
        curves[title] = reliability(scores, positive, bins)
        metrics[f"{prefix}error_{when}"] = curves[title].error
        metrics[f"{prefix}log_loss_{when}"] = log_loss(scores, positive)

    measure(f"{settings.split}, before", "before", sigmoid(pairs.logit), pairs.positive)
    cross_validated = _cross_validate(pairs, num_classes, settings.calibration)
    measure(f"{settings.split}, after ({_FOLDS} folds)", "after", cross_validated, pairs.positive)
    calibration = calibrate(pairs.cls, pairs.logit, pairs.positive, num_classes, settings.calibration)
    metrics["classes_with_threshold"] = int(np.isfinite(calibration.threshold).sum())
    if settings.check is not None:
        checked = _score_split(predictor, run, settings.root, settings.check)
        scores = calibration.scores(checked.logit, checked.cls)
        measure(f"{settings.check}, before", "before", sigmoid(checked.logit), checked.positive, "check_")
        measure(f"{settings.check}, after", "after", scores, checked.positive, "check_")
        metrics |= _threshold_metrics(calibration, checked, scores)
    checkpoint, alpha = predictor.info.checkpoint or "", predictor.info.alpha
    calibration.facts.update(checkpoint=checkpoint, alpha=alpha, split=settings.split, check=settings.check)
    calibration.facts.update(metrics, folds=_FOLDS, bins=bins)
    path = calibration_path(run_folder, checkpoint, alpha)
    calibration.write(path)
    diagram = path.removesuffix(".json") + ".png"
    draw_reliability(curves, f"Calibration of {predictor.info.run}, {checkpoint}, alpha {alpha:g}", diagram)
    log(format_summary(calibration, predictor, settings))
    log(f"wrote {path} and {diagram}")

    model_folder, model = model_folder_of_run(run_folder) or (None, None)
    if model_folder is not None and model is not None and (model.checkpoint, model.alpha) == (checkpoint, alpha):
        calibration.write(storage.join(model_folder, "calibration.json"))
        log(f"stored with the run's model in {model_folder}")
    else:
        model_folder = None
    if storage.list_files(storage.join(run_folder, "journal")):
        journal = Journal(run_folder, "calibrate")
        step = int(checkpoint.removeprefix("step-"))
        journal.metrics({f"calibration/alpha_{alpha:g}/{name}": float(value) for name, value in metrics.items()}, step)
        journal.artifact(diagram, f"figures/reliability_alpha_{alpha:g}.png")
        journal.artifact(path, f"tables/calibration_alpha_{alpha:g}.json")
        if on_journaled is not None:
            on_journaled(run_folder, model_folder)
    return calibration


def format_summary(calibration: Calibration, predictor: Predictor, settings: CalibrateSettings) -> str:
    """The metrics of a calibration as text, with the classes that have no threshold."""
    facts, names = calibration.facts, predictor.names

    def percent(name: str, digits: int = 2) -> str:
        return "-" if np.isnan(facts[name]) else f"{100 * facts[name]:.{digits}f} %"

    lines = [
        f"{settings.run}, {facts['checkpoint']}, alpha {facts['alpha']:g}: {calibration.method} calibration fitted on "
        f"{facts['pairs']:,} annotated pairs of {facts['images']:,} images of {settings.split}",
        f"calibration error {percent('error_before')} before, {percent('error_after')} after; "
        f"log loss {facts['log_loss_before']:.4f} before, {facts['log_loss_after']:.4f} after ({_FOLDS} folds)",
    ]
    if settings.check is not None:
        lines.append(
            f"on {settings.check}: calibration error {percent('check_error_before')} before, "
            f"{percent('check_error_after')} after; precision at the thresholds {percent('check_precision', 1)}, "
            f"recall of the classes with a threshold {percent('check_recall', 1)}"
        )
    missing = np.flatnonzero(~np.isfinite(calibration.threshold))
    lines.append(
        f"{len(names) - len(missing):,} of {len(names):,} classes have a threshold for precision "
        f"{calibration.precision:g} (confidence {calibration.confidence:g})"
    )
    lines += [
        f"  no threshold: {names[index]} ({predictor.classes[index]}): {calibration.thresholds.missing_reason(index)}"
        for index in missing[:_MAX_LISTED_CLASSES].tolist()
    ]
    if len(missing) > _MAX_LISTED_CLASSES:
        lines.append(f"  and {len(missing) - _MAX_LISTED_CLASSES:,} more; the file gives the reason for each")
    return "\n".join([*lines, VALIDITY_NOTE])


def _score_split(predictor: Predictor, run: TrainSettings, root: str | None, name: str) -> LabeledLogits:
    """The annotated pairs of a split with their float32 logits."""
    data = dataclasses.replace(run.data, root=root or run.data.root)
    split = open_split(data, name, f"labels/{name}.arrow", images="observed")
    if split.table.classes != predictor.classes:
        raise DataError(
            f"the classes of {split.table.path} ({split.table.num_classes}) are not those of the model "
            f"({len(predictor.classes)}), or are in another order: calibrate with a table of the run's classes"
        )
    world, alpha = World(device=predictor.device), predictor.info.alpha
    network = predictor.network
    bar = terminal_progress(name, len(split.samples))
    pairs = score_pairs(
        network,
        eval_loader(data, split, predictor.info.image_size, world, batch_size=run.eval_batch_size),
        alphas=(alpha,),
        world=world,
        autocast=None,
        on_batch=bar.update,
    )[alpha]
    bar.close()
    cls, logit, positive, image = (values.cpu().numpy() for values in pairs)
    return LabeledLogits(cls.astype(np.int64), logit.astype(np.float64), positive, image)


def _cross_validate(pairs: LabeledLogits, num_classes: int, settings: CalibrationSettings) -> np.ndarray:
    """Probabilities float64 [n], each by a fit on the images of the other folds. Raises DataError for one image."""
    images, position = np.unique(pairs.image, return_inverse=True)
    fold = (np.random.default_rng(0).permutation(len(images)) % _FOLDS)[position]
    probability = np.full(len(pairs.cls), np.nan)
    for number in range(min(_FOLDS, len(images))):
        held_out = fold == number
        cls, logit, positive, _ = (values[~held_out] for values in pairs)
        slope, offset = fit(cls, logit, positive, num_classes, settings)
        cls = pairs.cls[held_out]
        probability[held_out] = sigmoid(slope[cls] * pairs.logit[held_out] + offset[cls])
    return probability


def _threshold_metrics(calibration: Calibration, pairs: LabeledLogits, scores: np.ndarray) -> dict[str, float]:
    """Metrics of the thresholds on pairs that the calibration was not fitted on, from their scores float64 [n]."""
    threshold = calibration.threshold[pairs.cls]
    above = scores >= threshold  # not for NaN: no threshold
    hits, positives = (above & pairs.positive).sum(), (pairs.positive & np.isfinite(threshold)).sum()
    return {
        "check_pairs": len(pairs.cls),
        "check_precision": hits / above.sum() if above.any() else float("nan"),
        "check_recall": hits / max(1, positives) if above.any() else float("nan"),
    }


def draw_reliability(curves: Mapping[str, Reliability], title: str, path: str) -> None:
    """Draw to `path` (PNG) the observed fraction of positives by mean score, and the distribution of scores, by bin."""
    from matplotlib.ticker import NullFormatter, PercentFormatter

    figure = new_figure(10.5, 5.0)
    diagram, histogram = figure.subplots(1, 2)
    diagram.plot([0, 1], [0, 1], color=CONTROL_COLOR, linestyle="--", linewidth=1, label="perfectly calibrated")
    for position, (name, curve) in enumerate(curves.items()):
        filled, color = curve.count > 0, run_color(position)
        label = f"{name}: calibration error {100 * curve.error:.1f} %"
        diagram.plot(curve.predicted[filled], curve.observed[filled], "o-", markersize=4, color=color, label=label)
        edges = np.linspace(0, 1, len(curve.count) + 1)
        histogram.stairs(curve.count / max(1, curve.count.sum()), edges, color=color, linewidth=1.6)
    diagram.set(title="Reliability diagram", xlabel="mean score in the bin", ylabel="positives in the bin")
    diagram.set(xlim=(0, 1), ylim=(0, 1))
    histogram.set(title="Score histogram", xlabel="score", ylabel="annotated pairs")
    histogram.set(xlim=(0, 1), ylim=(1e-4, 1), yscale="log")
    for axis in (diagram.xaxis, diagram.yaxis, histogram.xaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    histogram.yaxis.set_major_formatter(lambda fraction, position: f"{100 * fraction:g}%")
    histogram.yaxis.set_minor_formatter(NullFormatter())
    for axes in (diagram, histogram):
        style_axes(axes)
    figure.legend(*diagram.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)
