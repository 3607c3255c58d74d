"""What a loss keeps between the batches of a run: estimates of labels, scores of an epoch, classes to leave out.

Most losses keep nothing (`Loss.state` is None). A state is read before each step and updated after it. Every worker
holds all of it: a step's logits are exchanged and every worker applies all of them in the order of their slots, so the
states of all workers are equal bit for bit, and the same for every number of workers as far as the logits are.

Axes: N images of the run, B images of this worker in a step, S slots of the global batch, K classes.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from paml.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class StateScope:
    """The run that a state belongs to."""

    index: np.ndarray
    """int64 [N], ascending: positions in the manifest of the images in the run."""
    classes: tuple[str, ...]
    """MIDs in the order of the logits."""
    epochs: int
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world: dist.ProcessGroup | None = None
    """The workers of the run; None for one worker."""


class LossState:
    """Base class of the states."""

    def read(self, index: np.ndarray, state_BK: Tensor) -> Tensor:
        """`loss_state` of these images (positions in the manifest) and their labels. Changes nothing."""
        raise NotImplementedError

    def update(
        self,
        index: np.ndarray,
        slots_B: Tensor,
        batch_size: int,
        logits_BK: Tensor,
        state_BK: Tensor,
        learning_rate: float,
    ) -> None:
        """Apply a step's images. All workers call it, also with B = 0. learning_rate: the head's in this step."""

    def end_epoch(self, epoch: int) -> None:
        """Finish epoch `epoch` (from 1) after its last update. All workers call it."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold."""
        raise NotImplementedError

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        raise NotImplementedError


class ImageState(LossState):
    """A state with a row per image of the run. Nothing here waits for the device.

    Subclasses set `tensors_N`. Raises SettingsError if `bytes_per_label` for each image and class exceed
    `max_state_gb`.
    """

    tensors_N: dict[str, Tensor]
    """[N + 1, ...] on the device, by name; the last row is for slots without an image and is not saved."""

    def __init__(self, scope: StateScope, loss: str, bytes_per_label: int, max_state_gb: float) -> None:
        self.scope = scope
        N, K = len(scope.index), len(scope.classes)
        needed_gb = N * K * bytes_per_label / 1e9
        if needed_gb > max_state_gb:
            raise SettingsError(
                f"loss {loss} keeps {bytes_per_label} bytes for each of {N:,} images x {K:,} classes, "
                f"{needed_gb:,.3g} GB on each worker; loss.max_state_gb allows {max_state_gb:g}. Raise it if there is "
                "enough memory, train on fewer images or classes, or use a loss without state (em, epr)"
            )

    def apply(self, row_S: Tensor, logits_SK: Tensor, state_SK: Tensor, learning_rate: float) -> None:
        """Apply a global batch, in the order of its slots.

        row_S: positions in `StateScope.index`; N for a slot without an image. Row N of a state is never read.
        """
        raise NotImplementedError

    def update(
        self,
        index: np.ndarray,
        slots_B: Tensor,
        batch_size: int,
        logits_BK: Tensor,
        state_BK: Tensor,
        learning_rate: float,
    ) -> None:
        """Gather the global batch, of which each worker holds a part, and apply it."""
        S, K, N = batch_size, logits_BK.shape[1], len(self.scope.index)
        # A slot that no worker fills has the sum 0, which stands for row N.
        row_S = torch.zeros(S, dtype=torch.int64, device=slots_B.device).index_copy(0, slots_B, self.rows(index) - N)
        logits_SK = logits_BK.new_zeros(S, K).index_copy(0, slots_B, logits_BK.detach())
        state_SK = state_BK.new_zeros(S, K).index_copy(0, slots_B, state_BK)
        if self.scope.world is not None:
            for part in (row_S, logits_SK, state_SK):
                dist.all_reduce(part, group=self.scope.world)
        self.apply(row_S + N, logits_SK, state_SK, learning_rate)

    def rows(self, index: np.ndarray) -> Tensor:
        """int64 [B] on the device: positions in `StateScope.index`."""
        row_B = torch.from_numpy(np.searchsorted(self.scope.index, index))
        device = self.scope.device
        return row_B if device.type == "cpu" else row_B.pin_memory().to(device, non_blocking=True)

    def tensors(self) -> dict[str, Tensor]:
        """The rows of all images."""
        return {name: tensor[:-1] for name, tensor in self.tensors_N.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        for name, tensor in self.tensors_N.items():
            tensor[:-1] = tensors[name].to(tensor.device)
