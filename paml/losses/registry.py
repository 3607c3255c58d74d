"""All losses by name, and their settings. To add a loss, write a file with its `Loss` and add a line here."""

from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

from paml.errors import check_setting
from paml.losses import (
    an_ls,
    asl,
    cross_entropy,
    curriculum,
    em,
    em_apl,
    epr,
    gr,
    hill,
    p_asl,
    role,
    splc,
    wan,
)
from paml.losses.base import Loss

LOSSES: dict[str, Loss] = {
    "an": cross_entropy.AN,
    "iu": cross_entropy.IU,
    "full": cross_entropy.FULL,
    "ll-r": cross_entropy.LL_R,
    "ll-ct": cross_entropy.LL_CT,
    "ll-cp": cross_entropy.LL_CP,
    "wan": wan.LOSS,
    "an-ls": an_ls.LOSS,
    "epr": epr.LOSS,
    "asl": asl.LOSS,
    "p-asl-ignore": p_asl.IGNORE,
    "p-asl-negative": p_asl.NEGATIVE,
    "p-asl-selective": p_asl.SELECTIVE,
    "em": em.LOSS,
    "hill": hill.LOSS,
    "splc": splc.LOSS,
    "gr": gr.LOSS,
    "role": role.LOSS,
    "em-apl": em_apl.LOSS,
    "curriculum": curriculum.LOSS,
}


@dataclass(frozen=True, kw_only=True)
class SharedLossSettings:
    """The loss. `LossSettings` adds the settings of each single loss."""

    name: str = "ll-r"
    """The loss; one of `paml.losses.LOSSES`."""
    reject_rate_step: float | None = None
    """Fraction of a pool's labels by which the reject rate of LL-R and LL-Ct grows per epoch after the first; LL-Cp
    rejects this fraction in every epoch after the first. The value is read as the decimal that is written: 0.001 is
    exactly 1/1000. null estimates it from the data: as many labels as there are expected false negatives are rejected,
    on average over the epochs after the first."""
    reject_of: Literal["unobserved", "all"] = "unobserved"
    """What the reject rate is a fraction of: unobserved labels, as the papers write, or all labels, as their code
    does."""
    reject_pool: int | None = None
    """Number of consecutive slots of the global batch whose labels are ranked together; null ranks the whole batch."""
    reject_by: Literal["model", "ema"] = "model"
    """Whose logits choose the labels to reject: those of the trained weights, or those of their moving average (one
    more forward pass per step; needs optimizer.ema_decay). Applies to every loss that rejects."""
    warmup_epochs: int | None = None
    """First epochs in which SPLC, EM+APL and curriculum leave the unobserved labels as they are; null uses the paper's
    number: SPLC 1, EM+APL 4, curriculum 1."""
    expected_positives: float = 2.9
    """Mean number of positives per image, for EPR and ROLE: VOC 1.5, COCO 2.9, NUS-WIDE 1.9, CUB 31.4."""
    max_state_gb: float = 4.0
    """Largest state that ROLE (12 bytes per image and class) and EM+APL (4 bytes) may keep on a worker."""

    def __post_init__(self) -> None:
        step, pool, warmup = self.reject_rate_step, self.reject_pool, self.warmup_epochs
        check_setting(
            step is None or 0 <= step <= 1,
            "loss.reject_rate_step",
            step,
            "a fraction from 0 to 1 (half a percent is 0.005), or null to estimate it from the data",
        )
        check_setting(self.reject_of in ("unobserved", "all"), "loss.reject_of", self.reject_of, "unobserved or all")
        check_setting(self.reject_by in ("model", "ema"), "loss.reject_by", self.reject_by, "model or ema")
        check_setting(
            pool is None or pool >= 1, "loss.reject_pool", pool, "1 or more images, or null for the whole batch"
        )
        check_setting(warmup is None or warmup >= 0, "loss.warmup_epochs", warmup, "0 or more, or null")
        expected = self.expected_positives
        check_setting(0 <= expected < float("inf"), "loss.expected_positives", expected, "0 or more")
        check_setting(self.max_state_gb > 0, "loss.max_state_gb", self.max_state_gb, "above 0")

    def warmup_or(self, default: int) -> int:
        """The number of warm-up epochs; `default` is the paper's."""
        return default if self.warmup_epochs is None else self.warmup_epochs


def _check_name(settings: Any) -> None:
    check_setting(settings.name in LOSSES, "loss.name", settings.name, f"one of {', '.join(LOSSES)}")
    SharedLossSettings.__post_init__(settings)


if TYPE_CHECKING:

    class LossSettings(SharedLossSettings):
        def __init__(self, **values: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

else:
    _own_settings = {name: kind for loss in LOSSES.values() for name, kind in loss.own_settings.items()}
    LossSettings = make_dataclass(
        "LossSettings",
        [(name, kind, field(default_factory=kind)) for name, kind in _own_settings.items()],
        bases=(SharedLossSettings,),
        namespace={
            "__module__": __name__,
            "__doc__": f"The loss.\n\nArgs:\n    name: The loss: {', '.join(LOSSES)}.",
            "__post_init__": _check_name,
        },
        frozen=True,
        kw_only=True,
    )
