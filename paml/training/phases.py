"""The phases of a run: stretches of epochs that differ in which parameters learn, and how fast.

LinearInit (Cole et al., CVPR 2021) trains the head alone on the features of a network that stays as loaded, then the
whole: labels as poor as one positive an image harm a backbone less once the head knows what it looks for.
"""

import dataclasses

from paml.errors import SettingsError
from paml.training.optimiser import OptimiserSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearInitSettings:
    """The head alone, before the run's own epochs."""

    epochs: int = 0
    """Epochs of the head alone; they come before `epochs`, which count from 1 again for rejection and schedule."""
    learning_rate: float = 1e-3
    """Of the head meanwhile, constant."""

    def __post_init__(self) -> None:
        if self.epochs < 0 or not self.learning_rate > 0:
            raise SettingsError(
                f"linear_init.epochs ({self.epochs}) must be at least 0 (0 is off) and linear_init.learning_rate "
                f"({self.learning_rate}) above 0"
            )


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of epochs with an optimiser of its own."""

    head_only: bool
    """The backbone neither learns nor renews BatchNorm's statistics."""
    before: int
    """Epochs of the run before this phase."""
    epochs: int
    optimiser: OptimiserSettings

    def loss_epoch(self, epoch: int) -> int:
        """What the loss's schedules take epoch `epoch` of the run for: all with the head alone is before the first
        step of rejection, as the warm-up epoch is."""
        return 1 if self.head_only else epoch - self.before


def phase_of(linear_init: LinearInitSettings, optimiser: OptimiserSettings, epochs: int, epoch: int) -> Phase:
    """The phase of epoch `epoch` (from 1) of a run that ends with `epochs` end to end."""
    if epoch > linear_init.epochs:
        return Phase(head_only=False, before=linear_init.epochs, epochs=epochs, optimiser=optimiser)
    head = dataclasses.replace(
        optimiser, learning_rate=linear_init.learning_rate, head_factor=1.0, schedule="constant", warmup_share=0.0
    )
    return Phase(head_only=True, before=0, epochs=linear_init.epochs, optimiser=head)
