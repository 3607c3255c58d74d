"""The command `paml prepare`: in this process or on a Ray cluster."""

import dataclasses
import os
from typing import Any

from paml import storage
from paml.distributed import cluster
from paml.distributed.cluster import print_line
from paml.preparation.plan import plan
from paml.preparation.prepare import prepare
from paml.preparation.settings import PrepareSettings
from paml.tasks import TaskRunner


def run_prepare(settings: PrepareSettings) -> int:
    """Prepare data, or print the plan. Returns 0; a stop ends the process with 128 + signal.

    Raises PamlError, such as PartsFailed with all failed parts after the others have finished.
    """
    settings = with_absolute_paths(settings, cluster.base_folder())
    with cluster.stoppable_tasks(settings.ray) as use_ray:
        tasks = _ray_task_runner(settings) if use_ray else None
        if settings.plan:
            cpus = tasks.concurrency if tasks else os.cpu_count() or 1
            plan(settings, cpus=cpus, log=print_line)
        else:
            prepare(settings, print_line, tasks=tasks)
    return 0


def _ray_task_runner(settings: PrepareSettings) -> TaskRunner:
    from paml.distributed.ray_tasks import RayTaskRunner, check_shared

    if not settings.plan:
        check_shared(settings.out)
        images = settings.images or settings.labels  # which may have them in its own files
        if os.path.isdir(images):
            check_shared(images)
    return RayTaskRunner(cpus_per_task=settings.cpus_per_task, retries=settings.retries)


def with_absolute_paths(settings: PrepareSettings, base: str) -> PrepareSettings:
    """The settings with local paths resolved against `base`."""
    names = ("out", "images", "labels", "class_list", "full_labels")
    changes: dict[str, Any] = {name: storage.absolute_path(getattr(settings, name), base) for name in names}
    download_from = storage.absolute_path(settings.openimages.download_from, base)
    changes["openimages"] = dataclasses.replace(settings.openimages, download_from=download_from)
    changes["verdicts"] = tuple(storage.absolute_path(path, base) for path in settings.verdicts)
    return dataclasses.replace(settings, **changes)
