"""What a loss keeps of a run beyond the batch at hand: estimates of labels, scores of the epoch, a prior of classes.

Most losses have none (`Loss.memory` is None) and pay nothing for it. Where there is one, it is asked before each step
what it says of the step's images (`recall`) and told afterwards what the step saw (`learn`). Every worker holds all of
it: a step's logits are exchanged and each worker learns all of them in the order of their slots, so that memories are
equal bit for bit on all workers, and the same for every number of workers as far as the logits are.

Axes: N images of the run, B of them a worker's in a step, S slots of the global batch, K classes.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from paml.errors import SettingsError
from paml.losses.select import RejectGroup


@dataclass(frozen=True, kw_only=True)
class Scope:
    """The run that a memory is of."""

    index: np.ndarray
    """int64 [N], places in the manifest of the images that take part, ascending."""
    classes: tuple[str, ...]
    """MIDs, in the order of the logits."""
    batch_size: int
    """S."""
    epochs: int
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world: RejectGroup | None = None
    """The workers of the run, None for one alone."""


class Together(NamedTuple):
    """A global batch on every worker, in the order of its slots."""

    row_S: Tensor
    """int64, places in `Scope.index`; N for a slot without an image, whose row in a memory nobody reads."""
    logits_SK: Tensor
    state_SK: Tensor


class Memory:
    """A loss's memory; this one remembers nothing. Nothing here waits for the device."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def recall(self, index: np.ndarray, state_BK: Tensor) -> Tensor | None:
        """What the loss is given of these images (by place in the manifest) and their labels. Changes nothing."""
        return None

    def learn(
        self, index: np.ndarray, slots_B: Tensor, logits_BK: Tensor, state_BK: Tensor, learning_rate: float
    ) -> None:
        """Take in a step's images. All workers call it, also with B = 0. learning_rate: the head's in this step."""

    def end_epoch(self, epoch: int) -> None:
        """The epoch (from 1) is over, its last step learnt. All workers call it."""

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold."""
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""

    def rows(self, index: np.ndarray) -> Tensor:
        """int64 [B] on the device: places in `Scope.index`."""
        row_B = torch.from_numpy(np.searchsorted(self.scope.index, index))
        device = self.scope.device
        return row_B if device.type == "cpu" else row_B.pin_memory().to(device, non_blocking=True)

    def together(self, index: np.ndarray, slots_B: Tensor, logits_BK: Tensor, state_BK: Tensor) -> Together:
        """The global batch of which each worker holds a part."""
        S, K, N = self.scope.batch_size, logits_BK.shape[1], len(self.scope.index)
        # Where no worker has an image all add 0, and the row is N.
        row_S = torch.zeros(S, dtype=torch.int64, device=slots_B.device).index_copy(0, slots_B, self.rows(index) - N)
        logits_SK = logits_BK.new_zeros(S, K).index_copy(0, slots_B, logits_BK.detach())
        state_SK = state_BK.new_zeros(S, K).index_copy(0, slots_B, state_BK)
        if self.scope.world is not None:
            for part in (row_S, logits_SK, state_SK):
                dist.all_reduce(part, group=self.scope.world)
        return Together(row_S + N, logits_SK, state_SK)


def check_fits(loss: str, scope: Scope, bytes_a_label: int, bound_gb: float, what: str) -> None:
    """Raise SettingsError where a memory of all images and classes is larger than the loss's own bound."""
    N, K = len(scope.index), len(scope.classes)
    needed_gb = N * K * bytes_a_label / 1e9
    if needed_gb > bound_gb:
        raise SettingsError(
            f"loss {loss} keeps {what} for {N:,} images x {K:,} classes, {needed_gb:,.3g} GB on each worker; "
            f"loss.{loss.replace('-', '_')}.max_memory_gb allows {bound_gb:g}. Raise it where there is that much "
            "memory, train on fewer images or classes, or take a loss that keeps nothing (em, epr)"
        )


def check_bound(loss: str, max_memory_gb: Any) -> None:
    """Raise SettingsError for a bound that is none."""
    if not max_memory_gb > 0:
        raise SettingsError(f"loss.{loss}.max_memory_gb is {max_memory_gb}; it must be above 0")
