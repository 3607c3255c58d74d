"""Calibrate a checkpoint of a run on a split, and leave the calibration with the model, where predictions find it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from paml import storage
from paml.data.device import Normaliser
from paml.errors import DataError, SettingsError
from paml.explain.runs import parse_run
from paml.metrics import Pairs
from paml.metrics.calibration import (
    HOLDS_FOR,
    Calibration,
    CalibrationSettings,
    calibrate,
    fit,
    log_loss,
    reliability,
    sigmoid,
)
from paml.predict.pictures import draw_reliability
from paml.predict.predictor import Predictor, calibration_path, model_folder, open_predictor
from paml.secrets import without_keys
from paml.tracking.follower import refill_command, replay
from paml.tracking.journal import Journal
from paml.tracking.model import final_model
from paml.tracking.view import reason
from paml.training.data import eval_loader, open_split
from paml.training.evaluate import score_pairs
from paml.training.loop import terminal_bar
from paml.training.score_run import settings_of_run
from paml.training.settings import TrainSettings
from paml.training.world import World, current_world

_FOLDS = 5
_NAMED = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateSettings:
    """Which checkpoint is calibrated, on what."""

    run: str = "runs/openimages-v3"
    """FOLDER[@best|newest|step-*][:alpha=A]; the calibration is for this checkpoint and alpha alone."""
    split: str = "validation"
    """Split of the prepared data to fit on; never the one whose scores are reported."""
    check: str | None = None
    """Another split (test) on which the fitted calibration and thresholds are measured; null for none."""
    root: str | None = None
    """Prepared data folder; null takes the run's data.root."""
    calibration: CalibrationSettings = dataclasses.field(default_factory=CalibrationSettings)

    def __post_init__(self) -> None:
        if self.check == self.split:
            raise SettingsError(f"check is {self.check!r}, the split fitted on: name another split, or null")


def calibrate_run(settings: CalibrateSettings, say: Callable[[str], None] = print) -> Calibration:
    """Fit, store beside the checkpoint and in the run's model, journal the figures and the reliability diagram.

    The errors after calibration are measured in five folds of images, each scored by a fit on the other four. Where the
    run is mirrored in MLflow, it is sent there; a server that is away is said, and no error. Raises PamlError.
    """
    folder, _, _ = parse_run(settings.run)
    run = settings_of_run(folder)
    predictor = open_predictor(settings.run, calibrated=False)
    pairs = _pairs(predictor, run, settings.root, settings.split)
    cls, logit, positive, image = pairs
    num_classes = len(predictor.facts.classes)
    before, after = sigmoid(logit), _cross_fitted(pairs, num_classes, settings.calibration)
    bins = settings.calibration.bins
    curves = {
        f"{settings.split}, before": reliability(before, positive, bins),
        f"{settings.split}, after ({_FOLDS} folds)": reliability(after, positive, bins),
    }
    figures: dict[str, float] = {
        "pairs": len(cls),
        "images": len(np.unique(image)),
        "error_before": curves[f"{settings.split}, before"].error,
        "error_after": curves[f"{settings.split}, after ({_FOLDS} folds)"].error,
        "log_loss_before": log_loss(before, positive),
        "log_loss_after": log_loss(after, positive),
    }
    made = calibrate(cls, logit, positive, num_classes, settings.calibration)
    figures["classes_with_threshold"] = int(np.isfinite(made.threshold).sum())
    if settings.check is not None:
        other = _pairs(predictor, run, settings.root, settings.check)
        figures |= _checked(made, other, bins)
        curves[f"{settings.check}, before"] = reliability(sigmoid(other[1]), other[2], bins)
        curves[f"{settings.check}, after"] = reliability(made.scores(other[1], other[0]), other[2], bins)
    checkpoint, alpha = predictor.facts.checkpoint or "", predictor.facts.alpha
    facts: dict[str, Any] = {
        "checkpoint": checkpoint,
        "alpha": alpha,
        "split": settings.split,
        "check": settings.check,
        "folds": _FOLDS,
        "bins": bins,
        **figures,
    }
    made = dataclasses.replace(made, facts=facts)
    path = calibration_path(folder, checkpoint, alpha)
    made.write(path)
    diagram = path.removesuffix(".json") + ".png"
    draw_reliability(curves, f"{predictor.facts.run}, {checkpoint}, alpha {alpha:g}: annotated pairs alone", diagram)
    say(summary(made, predictor, settings))
    say(f"stored in {path}, drawn to {diagram}")
    _leave(folder, run, made, path, diagram, figures, say)
    return made


def summary(made: Calibration, predictor: Predictor, settings: CalibrateSettings) -> str:
    """What was found, in words, with the classes that have no threshold."""
    facts, names = made.facts, predictor.facts.names
    lines = [
        f"{settings.run}, {facts['checkpoint']}, alpha {facts['alpha']:g}: {made.method}, fitted on {facts['pairs']:,} "
        f"pairs of {facts['images']:,} images of {settings.split}",
        f"calibration error {100 * facts['error_before']:.2f} % before, {100 * facts['error_after']:.2f} % after; "
        f"log loss {facts['log_loss_before']:.4f} before, {facts['log_loss_after']:.4f} after ({_FOLDS} folds)",
    ]
    if settings.check is not None:
        lines.append(
            f"on {settings.check}: calibration error {100 * facts['check_error_before']:.2f} % before, "
            f"{100 * facts['check_error_after']:.2f} % after; precision at the thresholds "
            f"{_percent(facts['check_precision'])}, recall of the classes with one {_percent(facts['check_recall'])}"
        )
    lacking = np.flatnonzero(~np.isfinite(made.threshold))
    lines.append(
        f"thresholds for precision {made.precision:g} (confidence {made.confidence:g}): "
        f"{len(names) - len(lacking):,} of {len(names):,} classes have one"
    )
    lines += [
        f"  none: {names[index]} ({predictor.facts.classes[index]}): {made.thresholds.why_not(index)}"
        for index in lacking[:_NAMED].tolist()
    ]
    if len(lacking) > _NAMED:
        lines.append(f"  and {len(lacking) - _NAMED:,} more, each with its reason in the file")
    return "\n".join([*lines, HOLDS_FOR])


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f} %"


Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Classes int64, logits float64, truth bool, images int64, [n] each."""


def _pairs(predictor: Predictor, run: TrainSettings, root: str | None, name: str) -> Columns:
    """The annotated pairs of a split with the logits that predictions have, in float32."""
    data = dataclasses.replace(run.data, root=root or run.data.root)
    split = open_split(data, name, f"labels/{name}.arrow", images="observed")
    if split.table.classes != predictor.facts.classes:
        raise DataError(
            f"{split.table.path} has {split.table.num_classes} classes, the model has {len(predictor.facts.classes)}, "
            "or in another order: calibrate with a table of the classes that the run was trained on"
        )
    world: World = dataclasses.replace(current_world(), rank=0, size=1, group=None)
    predictor = open_on(predictor, world)
    alpha = predictor.facts.alpha
    bar = terminal_bar(name, len(split.samples))
    found: Pairs = score_pairs(
        predictor.network,
        eval_loader(run, split, predictor.facts.image_size, world),
        alphas=(alpha,),
        world=world,
        normalise=Normaliser(run.model.pixel_mean, run.model.pixel_std, world.device),
        autocast=None,
        watch=bar.update,
    )[alpha]
    bar.close()
    cls, score, positive, image = (values.cpu().numpy() for values in found)
    return cls.astype(np.int64), score.astype(np.float64), positive, image


def open_on(predictor: Predictor, world: World) -> Predictor:
    """The predictor on the world's device."""
    return Predictor(predictor.network, predictor.facts, source=predictor.source, device=world.device)


def _cross_fitted(pairs: Columns, num_classes: int, settings: CalibrationSettings) -> np.ndarray:
    """Probabilities of all pairs, each by a fit on the images of the other folds. Raises DataError for one image."""
    cls, logit, positive, image = pairs
    images, place = np.unique(image, return_inverse=True)
    fold = (np.random.default_rng(0).permutation(len(images)) % _FOLDS)[place]
    probability = np.full(len(cls), np.nan)
    for own in range(min(_FOLDS, len(images))):
        out = fold == own
        slope, offset = fit(cls[~out], logit[~out], positive[~out], num_classes, settings)
        probability[out] = sigmoid(slope[cls[out]] * logit[out] + offset[cls[out]])
    return probability


def _checked(made: Calibration, pairs: Columns, bins: int) -> dict[str, float]:
    """How the calibration and its thresholds do on other pairs."""
    cls, logit, positive, _ = pairs
    score = made.scores(logit, cls)
    known = np.isfinite(made.threshold)[cls]
    above = known & (score >= np.nan_to_num(made.threshold, nan=np.inf)[cls])
    hits = np.count_nonzero(positive & above)
    ratio = np.array([np.nan, np.nan])
    if above.any():
        ratio = np.array([hits / np.count_nonzero(above), hits / max(1, np.count_nonzero(positive & known))])
    num_classes = len(made.slope)
    said, right = (
        np.bincount(cls[above], minlength=num_classes),
        np.bincount(cls[above & positive], minlength=num_classes),
    )
    short = int(np.count_nonzero((said > 0) & (right < made.precision * said)))
    return {
        "check_pairs": len(cls),
        "check_error_before": reliability(sigmoid(logit), positive, bins).error,
        "check_error_after": reliability(score, positive, bins).error,
        "check_log_loss_before": log_loss(sigmoid(logit), positive),
        "check_log_loss_after": log_loss(score, positive),
        "check_precision": float(ratio[0]),
        "check_recall": float(ratio[1]),
        "check_classes_below": short,
    }


def _leave(
    folder: str,
    run: TrainSettings,
    made: Calibration,
    path: str,
    diagram: str,
    figures: dict[str, float],
    say: Callable[[str], None],
) -> None:
    """In the run's model folder where it is of this checkpoint and alpha, in the journal, and from there in MLflow."""
    journal = Journal(folder, "calibrate") if storage.list_files(storage.join(folder, "journal")) else None
    alpha = made.facts["alpha"]
    if journal is not None:
        step = int(made.facts["checkpoint"].removeprefix("step-"))
        journal.metrics({f"calibration/alpha_{alpha:g}/{name}": float(value) for name, value in figures.items()}, step)
        journal.artifact(diagram, f"figures/reliability_alpha_{alpha:g}.png")
        journal.artifact(path, f"tables/calibration_alpha_{alpha:g}.json")
    held = model_folder(folder)
    if held is not None and (held[1].checkpoint, held[1].alpha) == (made.facts["checkpoint"], alpha):
        made.write(storage.join(held[0], "calibration.json"))
        say(f"stored with the run's model, too: {held[0]}")
        if journal is not None:
            final_model(journal, model=held[0])
    if journal is not None and run.run.mlflow:
        try:
            report = replay(folder)
            say(f"MLflow: {without_keys(report.tracking_uri)}, run {report.run_id}")
        except Exception as error:  # whatever MLflow and its stores raise: the journal holds all
            say(f"MLflow is away ({reason(error)}); send it later: {refill_command(folder)}")
