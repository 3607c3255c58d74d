"""How many labels rejection should take: as many as there are false negatives, going by what validation shows.

The fuller labels of validation say how many positives an image has, those of training how many are observed; the rest
are false negatives under AN, and their share of the unobserved labels is the rate at which rejection should end. The
papers sweep that rate on validation (Kim et al., CVPR 2022), at the price of a training for each value.
"""

import dataclasses
from collections.abc import Callable

from paml.errors import SettingsError
from paml.losses import LOSSES, check_reject_rate, fitted_step
from paml.training.data import RunData
from paml.training.settings import TrainSettings


def with_reject_rate(settings: TrainSettings, data: RunData, say: Callable[[str], None]) -> TrainSettings:
    """The settings with a `loss.reject_rate_step` that fits the data, where it is null and the loss goes by it.

    In the last epoch as many labels an image are rejected as positives are expected unobserved. The same data give the
    same step, so that a resumed run finds its own. `say` hears how it was come by. Raises SettingsError where nothing
    can be expected.
    """
    loss = settings.loss
    if loss.reject_rate_step is not None or not LOSSES[loss.name].by_rate:
        return settings
    observed, present = _labels_per_image(data)
    expected = present - observed.positives
    if expected <= 0:
        raise SettingsError(
            f"loss.reject_rate_step is null, to be fitted to the data, but validation shows {present:.3g} positives an "
            f"image, no more than the {observed.positives:.3g} that training observes: there would be nothing to "
            "reject. Set it (a share of the unobserved labels: 0.002 suits 20 classes, 0.0001 some thousands), or take "
            "validation labels that are fuller"
        )
    step = fitted_step(
        epochs=settings.epochs,
        labels_per_image=len(data.classes) - (observed.labels if loss.reject_of == "unobserved" else 0),
        unobserved_positives_per_image=expected,
    )
    say(
        f"loss.reject_rate_step {step:g}, fitted to the data: by epoch {settings.all_epochs} as many labels an image "
        f"are rejected as positives are expected unobserved, {expected:.3g} (validation shows {present:.3g}, training "
        f"observes {observed.positives:.3g})"
    )
    return dataclasses.replace(settings, loss=dataclasses.replace(loss, reject_rate_step=step))


def rate_warning(settings: TrainSettings, data: RunData) -> str | None:
    """Of a rate that would reject too much of these data, else None."""
    observed, present = _labels_per_image(data)
    return check_reject_rate(
        settings.loss,
        epochs=settings.epochs,
        num_classes=len(data.classes),
        unobserved_positives_per_image=max(0.0, present - observed.positives),
    )


@dataclasses.dataclass(frozen=True)
class _Observed:
    """Of the training labels, a mean image's."""

    positives: float
    labels: float


def _labels_per_image(data: RunData) -> tuple[_Observed, float]:
    """What training observes in a mean image, and the positives that one has by the validation labels.

    Not by full labels of the training images, where there are any: those are there to judge by. Validation labels may
    be partial too; the positives are then a lower bound, and the rate that is fitted is cautious.
    """
    table, full = data.train.table, data.validation.table
    positives, negatives = (float(counts.sum()) for counts in table.class_counts())
    images = max(1, table.num_images)
    present = float(full.class_counts()[0].sum()) / max(1, full.num_images)
    return _Observed(positives / images, (positives + negatives) / images), present
