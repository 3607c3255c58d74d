"""How many workers fit on the cluster, and when a run should restart to leave a node or to use more workers.

Capacity is measured with one placement group per worker, removed before the run starts. Pending groups also tell Ray's
autoscaler what the run needs.
"""

import contextlib
import time
from collections.abc import Callable, Collection

from ray.exceptions import RayError
from ray.util import placement_group, placement_group_table, remove_placement_group

from paml.distributed.ray_internals import draining_nodes
from paml.training.settings import WorkerSettings

RESIZE_SECONDS = 60.0
"""How long resources must have been free before an elastic run restarts with more workers."""
_STABLE_SECONDS = 3.0
"""How long the capacity must have been constant before a run starts with fewer workers than requested."""
_POLL_SECONDS = 0.5
_LOG_SECONDS = 60.0


class Reservation:
    """Placement groups for `count` workers; those that do not fit are pending."""

    def __init__(self, resources: dict[str, float], count: int) -> None:
        self._groups = [placement_group([resources]) for _ in range(count)]

    def num_placed(self) -> int:
        """Number of workers that fit now."""
        return sum(placement_group_table(group).get("state") == "CREATED" for group in self._groups)

    def close(self) -> None:
        """Remove all placement groups."""
        for group in self._groups:
            with contextlib.suppress(RayError):  # without the head they are removed together with the driver
                remove_placement_group(group)
        self._groups = []


def wait_for_capacity(
    resources: dict[str, float], min_workers: int, max_workers: int, seconds: float, log: Callable[[str], None]
) -> int:
    """The number of workers that fit, at most `max_workers`, once there are at least `min_workers`.

    Raises RuntimeError if fewer fit for longer than `seconds`.
    """
    share = " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
    start = last_log = last_change = time.monotonic()
    previous = 0
    with contextlib.closing(Reservation(resources, max_workers)) as reservation:
        while True:
            count, now = reservation.num_placed(), time.monotonic()
            if count != previous:
                previous, last_change = count, now
            if count == max_workers or (count >= min_workers and now - last_change >= _STABLE_SECONDS):
                return count
            if count < min_workers and now - start > seconds:
                raise RuntimeError(
                    f"{min_workers} workers of {share} each did not fit on the cluster within {seconds:.0f} s, only "
                    f"{count} did: `ray status` shows what uses the resources"
                )
            if now - last_log > _LOG_SECONDS:
                last_log = now
                log(f"waiting for resources for {min_workers} workers of {share} each; {count} fit")
            time.sleep(_POLL_SECONDS)


class RestartPolicy:
    """When the workers of an attempt should write a checkpoint and restart elsewhere, or with more workers."""

    def __init__(self, settings: WorkerSettings, resources: dict[str, float], count: int) -> None:
        """count: workers of the attempt."""
        self._resources = resources
        self._missing = settings.num_workers - count if settings.min_workers is not None else 0
        self._reservation: Reservation | None = None
        self._free_since: float | None = None

    def reason(self, nodes: Collection[str]) -> str | None:
        """Why to restart now, or None. nodes: Ray's ids of the workers' nodes, empty until all workers have started
        (before that a reservation could take their resources)."""
        if not nodes:
            return None
        try:
            self._reservation = self._reservation or Reservation(self._resources, self._missing)
            draining, free = sorted(set(nodes) & draining_nodes()), self._reservation.num_placed()
        except (RayError, RuntimeError, OSError):  # the head is unreachable, which HangMonitor reports
            return None
        if draining:
            return f"node {', '.join(node[:12] for node in draining)} is being removed from the cluster"
        if not free:
            self._free_since = None
            return None
        self._free_since = self._free_since or time.monotonic()
        if time.monotonic() - self._free_since < RESIZE_SECONDS:
            return None
        return f"the cluster has resources for {free} more worker{'s' if free > 1 else ''}"

    def close(self) -> None:
        """Release the reserved resources."""
        if self._reservation is not None:
            self._reservation.close()
