"""Settings of the losses, the exact reject rate, and the warning about a rate that rejects too much."""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from paml.errors import SettingsError
from paml.losses.an_ls import ANLSSettings
from paml.losses.asl import ASLSettings
from paml.losses.curriculum import CurriculumSettings
from paml.losses.em import EMSettings
from paml.losses.em_apl import EMAPLSettings
from paml.losses.epr import EPRSettings
from paml.losses.gr import GRSettings
from paml.losses.hill import HillSettings
from paml.losses.p_asl import PASLSettings
from paml.losses.registry import LOSSES
from paml.losses.role import RoleSettings
from paml.losses.splc import SPLCSettings
from paml.losses.wan import WANSettings


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The loss. From `wan` to `curriculum` stand the settings that one loss alone has."""

    name: str = "ll-r"
    """an, iu, full, ll-r, ll-ct, ll-cp, wan, an-ls, epr, asl, p-asl-ignore, p-asl-negative, p-asl-selective, em, hill,
    splc, gr, role, em-apl or curriculum: the keys of `paml.losses.LOSSES`."""
    reject_rate_step: float | None = None
    """Share of a pool's labels by which rejection grows each epoch after the first; LL-Cp rejects this share every
    epoch. A fraction, never percent. It is read as the decimal that is written: 0.001 is exactly 1/1000. null fits it
    to the data: on average over the epochs after the first as many are rejected as are expected to be positive."""
    reject_of: Literal["unobserved", "all"] = "unobserved"
    """What the rate is a share of: the unobserved labels, as the papers write, or all entries, as their code does."""
    reject_pool: int | None = None
    """Number of consecutive slots of the global batch that are ranked together; null ranks the global batch."""
    reject_within: Literal["pool", "class", "image"] = "pool"
    """How LL-R, LL-Ct and LL-Cp rank a pool: all together, or so that each class or each image of it gives floor to
    ceil of the rate's share of its own labels. The pool loses as many labels either way."""
    reject_by: Literal["model", "averaged"] = "model"
    """Whose logits choose the labels to reject: those that are trained, or those of the averaged weights on the same
    batch (one more forward pass; needs optimiser.average). It holds for every loss that chooses labels."""
    correct_after: int | None = None
    """From this epoch on LL-R trains a rejected label as a positive, for this step, where the logits that chose it give
    more than `correct_threshold`; null never does. Epochs count from 1, as for the rejection."""
    correct_threshold: float = 0.6
    """Probability above which it does; SPLC's by default."""
    wan: WANSettings = field(default_factory=WANSettings)
    """Weak assume negative."""
    an_ls: ANLSSettings = field(default_factory=ANLSSettings)
    """Assume negative with label smoothing."""
    epr: EPRSettings = field(default_factory=EPRSettings)
    """Expected positive regularisation."""
    asl: ASLSettings = field(default_factory=ASLSettings)
    """Asymmetric loss."""
    p_asl: PASLSettings = field(default_factory=PASLSettings)
    """Partial asymmetric loss, all modes."""
    em: EMSettings = field(default_factory=EMSettings)
    """Entropy maximisation."""
    hill: HillSettings = field(default_factory=HillSettings)
    """Hill loss."""
    splc: SPLCSettings = field(default_factory=SPLCSettings)
    """Self-paced loss correction."""
    gr: GRSettings = field(default_factory=GRSettings)
    """Generalised robust loss."""
    role: RoleSettings = field(default_factory=RoleSettings)
    """Regularised online label estimation."""
    em_apl: EMAPLSettings = field(default_factory=EMAPLSettings)
    """Entropy maximisation with asymmetric pseudo-labels."""
    curriculum: CurriculumSettings = field(default_factory=CurriculumSettings)
    """Curriculum labelling by a score threshold."""

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise SettingsError(f"loss.name is {self.name!r}; allowed are {', '.join(LOSSES)}")
        if self.reject_rate_step is not None and not 0 <= self.reject_rate_step <= 1:
            raise SettingsError(
                f"loss.reject_rate_step is {self.reject_rate_step}; it is a fraction from 0 to 1 "
                "(half a percent is 0.005), or null to have it fitted"
            )
        if self.reject_of not in ("unobserved", "all"):
            raise SettingsError(f"loss.reject_of is {self.reject_of!r}; allowed are unobserved, all")
        if self.reject_within not in ("pool", "class", "image"):
            raise SettingsError(f"loss.reject_within is {self.reject_within!r}; allowed are pool, class, image")
        if self.reject_by not in ("model", "averaged"):
            raise SettingsError(f"loss.reject_by is {self.reject_by!r}; allowed are model, averaged")
        if self.correct_after is not None and (self.name != "ll-r" or self.correct_after < 1):
            raise SettingsError(
                f"loss.correct_after is {self.correct_after} and loss.name {self.name}; it is an epoch from 1 on, of "
                "ll-r alone, or null (ll-ct corrects every label that it rejects)"
            )
        if not 0 < self.correct_threshold < 1:
            raise SettingsError(
                f"loss.correct_threshold is {self.correct_threshold}; it is a probability above 0 and below 1"
            )
        if self.reject_pool is not None and self.reject_pool < 1:
            raise SettingsError(
                f"loss.reject_pool is {self.reject_pool}; it is a number of images, at least 1, "
                "or null for the whole batch"
            )


@lru_cache(maxsize=256)
def reject_rate(settings: LossSettings, epoch: int) -> Fraction:
    """The exact share of a pool to reject in an epoch (counted from 1): 0 in epoch 1, never above 1.

    Raises ValueError where a loss that goes by the rate has none yet.
    """
    if epoch < 1:
        raise ValueError(f"epoch is {epoch}; epochs are counted from 1")
    loss = LOSSES[settings.name]
    if settings.reject_rate_step is None and loss.by_rate:
        raise ValueError(f"{settings.name} needs a reject_rate_step: set it, or fit it to the data by `fitted_step`")
    return loss.rate(Fraction(str(settings.reject_rate_step or 0)), epoch)


def fitted_step(name: str, *, epochs: int, labels_per_image: float, unobserved_positives_per_image: float) -> float:
    """The `reject_rate_step` with which a loss rejects as many labels as there are false negatives.

    LL-R and LL-Ct do so on average over the epochs after the first, so that the last one rejects nearly twice as many;
    what LL-Cp corrects adds up to them by the last. epochs: of the run, the warm-up among them. labels_per_image: those
    of an image that the rate is a share of: its unobserved ones, or all K. unobserved_positives_per_image: what is
    expected. Two digits, rounded down, at most 1.
    """
    share = unobserved_positives_per_image / max(labels_per_image, 1e-9)
    step = share / max(1, epochs - 1) if LOSSES[name].corrects else 2 * share / epochs
    return min(1.0, _two_digits(step))


def _two_digits(value: float) -> float:
    """`value`, rounded down to what a person would write; not above 0 it is 0."""
    digits = 1 - math.floor(math.log10(value)) if value > 0 else 1
    return math.floor(value * 10**digits) / 10**digits


def rejects_in(settings: LossSettings, epoch: int) -> bool:
    """Whether the loss may choose labels in an epoch (counted from 1)."""
    loss = LOSSES[settings.name]
    return loss.rejects and (not loss.by_rate or reject_rate(settings, epoch) > 0)


def check_reject_rate(
    settings: LossSettings, *, epochs: int, labels_per_image: float, unobserved_positives_per_image: float
) -> str | None:
    """A warning where more than twice the positives expected unobserved in an image would be rejected, else None.

    labels_per_image, unobserved_positives_per_image: as for `fitted_step`. LL-Cp's corrections add up over epochs, so
    the sum of its rates is judged. Losses that choose in another way than by a rate (SPLC, P-ASL, curriculum) are not
    judged.
    """
    loss = LOSSES[settings.name]
    if not loss.by_rate or epochs < 2:
        return None
    last = reject_rate(settings, epochs)
    rate = min(last * (epochs - 1), Fraction(1)) if loss.corrects else last
    rejected = float(rate) * labels_per_image
    if rejected <= 2 * unobserved_positives_per_image:
        return None
    fitting = _two_digits(2 * unobserved_positives_per_image / labels_per_image / (epochs - 1))
    return (
        f"loss.reject_rate_step {settings.reject_rate_step:g} rejects {rejected:.3g} labels an image by epoch {epochs} "
        f"({float(rate):.3g} of {labels_per_image:,.5g}), more than twice the {unobserved_positives_per_image:.3g} "
        f"positives expected unobserved in an image: most of them would be true negatives. "
        f"A step of {fitting:.2g} or less fits"
    )
