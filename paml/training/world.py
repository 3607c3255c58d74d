"""Who computes: this worker's place among all, its device and the process group; passed in, never looked up."""

import dataclasses
import datetime
from typing import Any

import torch
import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class World:
    """Worker `rank` of `size`, computing on `device`. `group` is None where there is one worker alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    group: "dist.ProcessGroup | None" = None
    control: "dist.ProcessGroup | None" = None
    """The same workers, talking from CPU to CPU, so that no GPU waits for it; None where `group` does so itself."""

    @property
    def first(self) -> bool:
        """The worker that writes checkpoints and the journal."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all workers, on every worker."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any worker's `flag` is set, on every worker."""
        if self.group is None:
            return flag
        flags = torch.tensor([float(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.control or self.group)
        return bool(flags)

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def gather_objects(self, value: object) -> list:
        """Small python values (numbers, arrays) of all workers, in rank order, on every worker."""
        if self.group is None:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """The first worker's buffers (BatchNorm's statistics), on every worker."""
        if self.group is not None:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0, group=self.group)


def current_world(timeout_seconds: float = 600.0) -> World:
    """From the process group that the launcher has set up, if it has; one GPU of those visible by rank. All workers
    must call it.

    timeout_seconds: of the collectives in `World.control`, if there is one.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return World(device=device)
    control: Any = None
    if dist.get_backend() != "gloo":
        control = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))
    return World(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD, control)
