"""The exact reject rate of an epoch, an estimate of its step, and a warning about a step that rejects too much."""

import math
from fractions import Fraction
from functools import lru_cache

from paml.losses.registry import LOSSES, LossSettings


@lru_cache(maxsize=256)
def _exact(step: float) -> Fraction:
    return Fraction(str(step))


def reject_rate(settings: LossSettings, epoch: int) -> Fraction:
    """The exact fraction of a pool to reject in an epoch (counted from 1): 0 in epoch 1, at most 1.

    Raises ValueError if the loss needs `reject_rate_step` and it is None.
    """
    if epoch < 1:
        raise ValueError(f"epoch is {epoch}; epochs are counted from 1")
    rate = LOSSES[settings.name].rate
    if rate is None:
        return Fraction(0)
    if settings.reject_rate_step is None:
        raise ValueError(f"{settings.name} needs a reject_rate_step: set it, or estimate it with `fitted_step`")
    return rate(_exact(settings.reject_rate_step), epoch)


def rejects_in(settings: LossSettings, epoch: int) -> bool:
    """Whether the loss may reject labels in an epoch (counted from 1)."""
    return LOSSES[settings.name].select is not None or reject_rate(settings, epoch) > 0


def fitted_step(name: str, *, epochs: int, labels_per_image: float, unobserved_positives_per_image: float) -> float:
    """The `reject_rate_step` with which a loss rejects as many labels as there are false negatives.

    For LL-R and LL-Ct this is an average over the epochs after the first (the last one rejects nearly twice as many).
    For LL-Cp it is the sum of the corrections of all epochs. Rounded down to two digits, at most 1.

    Args:
        name: the loss.
        epochs: epochs of the run, including the warm-up epoch.
        labels_per_image: labels per image that the rate is a fraction of: the unobserved ones, or all K.
        unobserved_positives_per_image: expected number.
    """
    fraction = unobserved_positives_per_image / max(labels_per_image, 1e-9)
    step = fraction / max(1, epochs - 1) if LOSSES[name].corrects else 2 * fraction / epochs
    return min(1.0, _two_digits(step))


def _two_digits(value: float) -> float:
    """`value` rounded down to two significant digits; 0 if it is not positive."""
    digits = 1 - math.floor(math.log10(value)) if value > 0 else 1
    return math.floor(value * 10**digits) / 10**digits


def check_reject_rate(
    settings: LossSettings, *, epochs: int, labels_per_image: float, unobserved_positives_per_image: float
) -> str | None:
    """A warning if more than twice the expected unobserved positives per image are rejected, else None.

    For the arguments see `fitted_step`. LL-Cp is judged by the sum of its rates. Losses that do not reject by a rate
    (SPLC, P-ASL, curriculum) are not judged.
    """
    loss = LOSSES[settings.name]
    if loss.rate is None or epochs < 2:
        return None
    last = reject_rate(settings, epochs)
    rate = min(last * (epochs - 1), Fraction(1)) if loss.corrects else last
    rejected = float(rate) * labels_per_image
    if rejected <= 2 * unobserved_positives_per_image:
        return None
    limit = _two_digits(2 * unobserved_positives_per_image / labels_per_image / (epochs - 1))
    return (
        f"loss.reject_rate_step {settings.reject_rate_step:g} rejects {rejected:.3g} labels per image in epoch "
        f"{epochs} ({float(rate):.3g} of {labels_per_image:,.5g}), more than twice the "
        f"{unobserved_positives_per_image:.3g} positives per image that are expected to be unobserved: most of them "
        f"would be true negatives. Set it to {limit:.2g} or less"
    )
