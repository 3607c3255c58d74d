"""How many workers the cluster has room for, and when a run should stop for a moment to move or to grow.

Room is asked of Ray by one placement group a worker, which is given back before the run takes its place. A group that
waits also tells Ray's autoscaler what the run would like to have.
"""

import contextlib
import time
from collections.abc import Callable, Collection

from ray._private.state import state as ray_state
from ray.exceptions import RayError
from ray.util import placement_group, placement_group_table, remove_placement_group

from paml.training.settings import WorkerSettings

_SETTLE_SECONDS = 3.0
"""How long the room must have stayed the same before fewer workers than wished begin."""
_LOOK_SECONDS = 0.5
_SAY_SECONDS = 60.0


class Room:
    """Places for `count` workers of these resources each, as far as the cluster has them; as a context it gives them
    back."""

    def __init__(self, resources: dict[str, float], count: int) -> None:
        self._groups = [placement_group([resources]) for _ in range(count)]

    def __enter__(self) -> "Room":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def found(self) -> int:
        """How many of them there are now."""
        return sum(placement_group_table(group).get("state") == "CREATED" for group in self._groups)

    def close(self) -> None:
        """Give all of them back."""
        for group in self._groups:
            with contextlib.suppress(RayError):  # of a head that is away: what waits for it goes with the driver
                remove_placement_group(group)
        self._groups = []


def wait_for_room(
    resources: dict[str, float], least: int, most: int, seconds: float, say: Callable[[str], None]
) -> int:
    """How many workers the cluster has room for now, at most `most`; waits until there are at least `least`.

    Raises RuntimeError where there are fewer for longer than `seconds`.
    """
    share = " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
    begun = said = changed = time.monotonic()
    before = 0
    with Room(resources, most) as room:
        while True:
            found, now = room.found(), time.monotonic()
            if found != before:
                before, changed = found, now
            if found == most or (found >= least and now - changed >= _SETTLE_SECONDS):
                return found
            if found < least and now - begun > seconds:
                raise RuntimeError(
                    f"no room for {least} workers of {share} each within {seconds:.0f} s: the cluster has room for "
                    f"{found} (`ray status` shows what takes the rest)"
                )
            if now - said > _SAY_SECONDS:
                said = now
                say(f"waiting for room for {least} workers of {share} each: the cluster has room for {found}")
            time.sleep(_LOOK_SECONDS)


class Move:
    """Why the workers of an attempt should leave a checkpoint and begin again elsewhere, if they should."""

    def __init__(self, settings: WorkerSettings, resources: dict[str, float], count: int) -> None:
        self._resources = resources
        self._missing = settings.num_workers - count if settings.min_workers is not None else 0
        self._wait = settings.resize_seconds
        self._spare: Room | None = None
        self._since: float | None = None

    def reason(self, nodes: Collection[str]) -> str | None:
        """What to tell the user. nodes: Ray's ids of those that the workers are on, once all have begun: what is asked
        for before that is taken from under them.
        """
        if not nodes:
            return None
        try:
            self._spare = self._spare or Room(self._resources, self._missing)
            leaving, room, now = sorted(set(nodes) & _draining()), self._spare.found(), time.monotonic()
        except (RayError, RuntimeError, OSError):  # a head that is away has no room to offer; the watch has its say
            return None
        if leaving:
            return f"notice that Ray's node {', '.join(node[:12] for node in leaving)} is about to go"
        if not room:
            self._since = None
            return None
        self._since = self._since or now
        if now - self._since < self._wait:
            return None
        return f"the cluster has room for {room} more worker{'s' if room > 1 else ''}"

    def close(self) -> None:
        """Give back the room that was found."""
        if self._spare is not None:
            self._spare.close()


def _draining() -> set[str]:
    """Ray's ids of the nodes that are to go: preempted, or drained by hand (`ray drain-node`)."""
    return set(ray_state.get_draining_nodes())  # as Ray Train's own watcher asks it
