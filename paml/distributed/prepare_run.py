"""A preparation as people start it: here or on the cluster at hand, stopped and started at will."""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from paml import storage
from paml.errors import Stopped
from paml.prepare import PrepareSettings, prepare
from paml.prepare_plan import plan, planned_cpus
from paml.shards.tasks import Tasks


def run_preparation(settings: PrepareSettings) -> int:
    """Prepare as `settings` say, or print the plan. Returns 0; a stop ends the process with 128 + signal.

    Raises PamlError and StorageError, PartsFailed among them: with all that failed, once the rest is done.
    """
    from paml.distributed import cluster

    settings = at_absolute_paths(settings, cluster.base_folder())
    use_ray = cluster.is_at_hand() if settings.ray is None else settings.ray
    if use_ray:
        cluster.join()  # before stopping: ray.init takes the signals for itself
    with stopping():
        try:
            if settings.plan:
                plan(settings, cpus=planned_cpus(settings.prices, _cpus_at_hand(use_ray)), say=_say)
            else:
                prepare(settings, _say, tasks=_ray_tasks(settings) if use_ray else None)
        except KeyboardInterrupt as stop:
            number = stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT
            _say("stopped; the same command goes on where this one stood")
            sys.stdout.flush()
            sys.stderr.flush()
            if use_ray:
                cluster.leave()
            # Threads may wait for a server for a minute; what is whole is in place, what is not is made again.
            os._exit(128 + number)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _ray_tasks(settings: PrepareSettings) -> Tasks:
    from paml.distributed.prepare_ray import RayTasks, refuse_unshared

    for folder in (settings.out, settings.images):
        if os.path.isdir(folder) or folder == settings.out:
            refuse_unshared(folder)
    return RayTasks(cpus_per_task=settings.cpus_per_task, retries=settings.retries)


def _cpus_at_hand(use_ray: bool) -> int:
    if not use_ray:
        return os.cpu_count() or 1
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def at_absolute_paths(settings: PrepareSettings, base: str) -> PrepareSettings:
    """The same settings with every relative path of a file below `base`."""

    def absolute(path: str | None) -> str | None:
        if path is None or storage.is_remote(path) or path.startswith(("http://", "https://")):
            return path
        return os.path.normpath(os.path.join(base, os.path.expanduser(path)))

    names = ("out", "release", "release_from", "images", "full_labels")
    own = dataclasses.replace(
        settings.own, labels=absolute(settings.own.labels), classes=absolute(settings.own.classes)
    )
    moved: dict[str, Any] = {name: absolute(getattr(settings, name)) for name in names}
    moved["verdicts"] = tuple(absolute(path) for path in settings.verdicts)
    return dataclasses.replace(settings, own=own, **moved)


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM and Ctrl-C become Stopped; a second one does not."""
    handlers: dict[int, Callable | int | None] = {}

    def stop(number: int, frame: object) -> None:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        handlers[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
