"""Fits the growth of the reject rate to the data: reject as many labels as there are false negatives.

Validation labels tell how many positives an image has, training labels how many of them are observed. The others are
false negatives under AN, and their fraction of the unobserved labels is the rate to reject at. The papers sweep the
rate on validation instead (Kim et al., CVPR 2022), with one training per value.
"""

import dataclasses
from collections.abc import Callable

from paml.errors import SettingsError
from paml.labels.states import POSITIVE
from paml.losses import LOSSES, check_reject_rate, fitted_step
from paml.training.data import RunData, Split
from paml.training.settings import TrainSettings

_ASSUMED_SHARE = 0.1
_BLOCK = 1 << 20
"""Images per table lookup, which bounds memory."""


def with_reject_rate(settings: TrainSettings, data: RunData, log: Callable[[str], None]) -> TrainSettings:
    """The settings with `loss.reject_rate_step` fitted to the data, if it is null and the loss needs it.

    On average over the epochs after the first, as many labels are rejected as positives are expected to be unobserved
    (`fitted_step`). The same data give the same step, also when a run is resumed. If validation is labeled as sparsely
    as train, their number is assumed. Raises SettingsError if train has no unobserved labels.
    """
    loss = settings.loss
    if loss.reject_rate_step is not None or LOSSES[loss.name].rate is None:
        return settings
    observed, present, labels = _expected(data, loss.reject_of)
    unobserved_positives = _unobserved_positives(observed, present, labels)
    if unobserved_positives <= 0:
        raise SettingsError(
            f"loss.reject_rate_step cannot be fitted to the data: validation has {present:.3g} positives per "
            f"image, not more than the {observed:.3g} observed in training, so there is nothing to reject. "
            "Set it (a fraction of the unobserved labels, for example 0.002 for 20 classes or 0.0001 for thousands), "
            "or use more complete validation labels"
        )
    step = fitted_step(
        loss.name,
        epochs=settings.epochs,
        labels_per_image=labels,
        unobserved_positives_per_image=unobserved_positives,
    )
    counts = f"{present:.3g} in validation, {observed:.3g} observed in training"
    if present > observed:
        log(
            f"loss.reject_rate_step is {step:g}, fitted to the data: it rejects {unobserved_positives:.3g} labels "
            f"per image on average, as many as positives are expected to be unobserved ({counts})"
        )
    else:
        log(
            f"WARNING: loss.reject_rate_step is {step:g}, a guess: validation has no more positives per image than "
            f"training ({counts}), so {unobserved_positives:.3g} unobserved ones are assumed. Set it, or use complete "
            "validation labels"
        )
    return dataclasses.replace(settings, loss=dataclasses.replace(loss, reject_rate_step=step))


def rate_warning(settings: TrainSettings, data: RunData) -> str | None:
    """A warning if the rate is too high for the data."""
    observed, present, labels = _expected(data, settings.loss.reject_of)
    return check_reject_rate(
        settings.loss,
        epochs=settings.epochs,
        labels_per_image=labels,
        unobserved_positives_per_image=_unobserved_positives(observed, present, labels),
    )


def _unobserved_positives(observed: float, present: float, labels: float) -> float:
    """Unobserved positives per training image; if validation does not tell, as many as are observed, but at most a
    tenth of the labels that are ranked."""
    return present - observed if present > observed else min(observed, _ASSUMED_SHARE * labels)


def _expected(data: RunData, reject_of: str) -> tuple[float, float, float]:
    """(observed positives, all positives, labels that the rate is a fraction of) per training image, on average.

    Full labels of training images are not used: they are for evaluation. If validation labels are partial too, the
    number of positives is a lower bound and the fitted rate is conservative.
    """
    observed, labels = _labels_per_image(data.train)
    present, _ = _labels_per_image(data.validation)
    return observed, present, len(data.classes) - (labels if reject_of == "unobserved" else 0)


def _labels_per_image(split: Split) -> tuple[float, float]:
    """(observed positives, observed labels) per image."""
    rows, positives, labels = split.samples.row[split.samples.row >= 0], 0, 0
    for start in range(0, len(rows), _BLOCK):
        state = split.table.lookup(rows[start : start + _BLOCK]).state
        positives, labels = positives + int((state == POSITIVE).sum()), labels + len(state)
    return positives / len(split.samples), labels / len(split.samples)
