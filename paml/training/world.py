"""The workers of a run: rank, device and process groups. Passed as an argument, never looked up."""

import dataclasses
import datetime
from typing import Any

import torch
import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class World:
    """Worker `rank` of `size` on `device`. Without a `group` there is one worker."""

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    group: "dist.ProcessGroup | None" = None
    control: "dist.ProcessGroup | None" = None
    """A gloo group of the same workers if `group` is not gloo, so that control messages do not wait for the GPU."""

    @property
    def first(self) -> bool:
        """Whether this worker writes checkpoints and the journal."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all workers, in place and on every worker."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any worker."""
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
        """Small Python values of all workers, in rank order, on every worker."""
        if self.group is None:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Copy the first worker's buffers (BatchNorm statistics) to all workers."""
        if self.group is not None:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0, group=self.group)


def current_world(timeout_seconds: float = 600.0) -> World:
    """The world of the default process group; one worker if there is none. All workers must call it.

    timeout_seconds: timeout of collectives in `World.control`.
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
