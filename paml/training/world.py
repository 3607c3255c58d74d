"""Who computes: this worker's place among all, its device and the process group; passed in, never looked up."""

import dataclasses

import torch
import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class World:
    """Worker `rank` of `size`, computing on `device`. `group` is None where there is one worker alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    group: "dist.ProcessGroup | None" = None

    @property
    def first(self) -> bool:
        """The worker that writes checkpoints and the journal."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all workers, on every worker."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

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


def current_world() -> World:
    """From the process group that the launcher has set up, if it has; one GPU of those visible by rank."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return World(device=device)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device, group=dist.group.WORLD)
