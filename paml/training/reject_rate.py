"""How many labels rejection should take: as many as there are false negatives, going by what validation shows.

The fuller labels of validation say how many positives an image has, those of training how many are observed; the rest
are false negatives under AN, and their share of the unobserved labels is the rate that rejection should have. The
papers sweep it on validation (Kim et al., CVPR 2022), at the price of a training for each value.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from paml.errors import SettingsError
from paml.labels.states import POSITIVE
from paml.losses import LOSSES, check_reject_rate, fitted_step
from paml.training.data import RunData, Split
from paml.training.settings import TrainSettings

_BLOCK = 1 << 20
"""Images looked up at once, for the memory's sake."""


def with_reject_rate(settings: TrainSettings, data: RunData, say: Callable[[str], None]) -> TrainSettings:
    """The settings with a `loss.reject_rate_step` that fits the data, where it is null and the loss goes by it.

    On average over the epochs after the first as many labels are rejected as positives are expected unobserved
    (`fitted_step`). The same data give the same step, so that a resumed run finds its own. `say` hears how it was come
    by. Raises SettingsError where nothing can be expected.
    """
    loss = settings.loss
    if loss.reject_rate_step is not None or not LOSSES[loss.name].by_rate:
        return settings
    expected = _expected(data, loss.reject_of)
    if expected.unobserved_positives <= 0:
        raise SettingsError(
            f"loss.reject_rate_step is null, to be fitted to the data, but validation shows {expected.present:.3g} "
            f"positives an image, no more than the {expected.observed:.3g} that training observes: there would be "
            "nothing to reject. Set it (a share of the unobserved labels: 0.002 suits 20 classes, 0.0001 some "
            "thousands), or take validation labels that are fuller"
        )
    step = fitted_step(
        loss.name,
        epochs=settings.epochs,
        labels_per_image=expected.labels,
        unobserved_positives_per_image=expected.unobserved_positives,
    )
    say(
        f"loss.reject_rate_step {step:g}, fitted to the data: on average over the epochs after the first as many "
        f"labels an image are rejected as positives are expected unobserved, {expected.unobserved_positives:.3g} "
        f"(validation shows {expected.present:.3g}, training observes {expected.observed:.3g})"
    )
    return dataclasses.replace(settings, loss=dataclasses.replace(loss, reject_rate_step=step))


def rate_warning(settings: TrainSettings, data: RunData) -> str | None:
    """Of a rate that would reject too much of these data, else None."""
    expected = _expected(data, settings.loss.reject_of)
    return check_reject_rate(
        settings.loss,
        epochs=settings.epochs,
        labels_per_image=expected.labels,
        unobserved_positives_per_image=max(0.0, expected.unobserved_positives),
    )


class _Expected(NamedTuple):
    """Of a mean training image."""

    observed: float
    """Positives."""
    present: float
    """Positives, observed or not."""
    labels: float
    """What a rate is a share of."""

    @property
    def unobserved_positives(self) -> float:
        return self.present - self.observed


def _expected(data: RunData, reject_of: str) -> _Expected:
    """From what training observes and validation shows, of the images that take part in either.

    Not from full labels of the training images, where there are any: those are there to judge by. Validation labels may
    be partial too; the positives are then a lower bound, and the rate that is fitted is cautious.
    """
    positives, labels = _labels_per_image(data.train)
    present, _ = _labels_per_image(data.validation)
    num_classes = len(data.classes)
    return _Expected(positives, present, num_classes - labels if reject_of == "unobserved" else num_classes)


def _labels_per_image(split: Split) -> tuple[float, float]:
    """(positives, positives and negatives) that are observed of a mean image."""
    rows, positives, labels = split.samples.row[split.samples.row >= 0], 0, 0
    for start in range(0, len(rows), _BLOCK):
        state = split.table.lookup(rows[start : start + _BLOCK]).state
        positives, labels = positives + int((state == POSITIVE).sum()), labels + len(state)
    return positives / len(split.samples), labels / len(split.samples)
