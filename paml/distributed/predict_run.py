"""Predictions as people start them: one photo here, or many images here or on the cluster at hand."""

import dataclasses
import os
import signal
import sys

from paml import storage
from paml.distributed.prepare_run import stopping
from paml.errors import SettingsError, Stopped
from paml.predict.bulk import BulkSettings, predict_images
from paml.predict.predictor import open_predictor
from paml.predict.single import predict_photo
from paml.shards.tasks import LocalTasks, Tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """What to predict, with which model."""

    model: str = "runs/openimages-v3"
    """A run (FOLDER[@best|newest|step-*][:alpha=A]), a model folder (model.json) or an MLflow model, local or s3://."""
    image: str | None = None
    """One photo: its top classes are printed."""
    show: str | None = None
    """With `image`: a PNG file for the photo, its top classes and their maps."""
    top: int = 5
    """With `image`: how many classes."""
    images: str | None = None
    """Many images: a folder of shards (it holds manifest.arrow) or of image files, local or s3://bucket/prefix."""
    out: str | None = None
    """With `images`: folder for the scores, local or s3://. The same call goes on where one was stopped."""
    bulk: BulkSettings = dataclasses.field(default_factory=BulkSettings)
    ray: bool | None = None
    """With `images`: as tasks on a Ray cluster; null does so where there is one (RAY_ADDRESS, ray job submit)."""
    cpus_per_task: int | None = None
    """CPUs (threads) of a task; null takes all CPUs here, and on a cluster those that belong to its GPUs, else 1 (more
    where there are few parts)."""
    gpus_per_task: float | None = None
    """GPUs of a task on a cluster; 0.5 puts two tasks on one, 0 computes on CPUs; null takes 1 where there are any."""
    retries: int = 3
    """Times that a failed part is tried again."""

    def __post_init__(self) -> None:
        if (self.image is None) == (self.images is None):
            raise SettingsError(
                "give either image (one photo) or images (a folder, shards or a bucket): "
                f"now image is {self.image!r} and images {self.images!r}"
            )
        if self.images is not None and self.out is None:
            raise SettingsError("images is given and out is not: give a folder for the scores")
        if self.show is not None and self.image is None:
            raise SettingsError("show draws one photo: give it as image (bulk.maps writes the maps of many)")
        if self.top < 1:
            raise SettingsError(f"top is {self.top}; it must be at least 1")
        if self.cpus_per_task is not None and self.cpus_per_task < 1:
            raise SettingsError(f"cpus_per_task is {self.cpus_per_task}; it must be at least 1")
        for name in ("gpus_per_task", "retries"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise SettingsError(f"{name} is {value}; it must be at least 0")


def run_prediction(settings: PredictSettings) -> int:
    """Predict as `settings` say. Returns 0; a stop ends the process with 128 + signal.

    Raises PamlError and StorageError, PartsFailed among them: with all parts that failed, once the rest is done.
    """
    from paml.distributed import cluster

    settings = at_absolute_paths(settings, cluster.base_folder())
    if settings.image is not None:
        predict_photo(open_predictor(settings.model), settings.image, top=settings.top, show=settings.show)
        return 0
    use_ray = cluster.is_at_hand() if settings.ray is None else settings.ray
    if use_ray:
        cluster.join()  # before stopping: ray.init takes the signals for itself
    with stopping():
        try:
            _many(settings, use_ray)
        except KeyboardInterrupt as stop:
            number = stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT
            print("stopped; the same command goes on where this one stood", flush=True)
            sys.stderr.flush()
            if use_ray:
                cluster.leave()
            # Threads may wait for a bucket for a minute; parts that are whole are in place.
            os._exit(128 + number)
    return 0


def _many(settings: PredictSettings, use_ray: bool) -> None:
    assert settings.images is not None
    assert settings.out is not None
    device, tasks = None, LocalTasks(settings.cpus_per_task, retries=settings.retries)
    if use_ray:
        device, tasks = _ray_tasks(settings)
    done = predict_images(
        settings.model,
        settings.images,
        settings.out,
        settings.bulk,
        device=device,
        tasks=tasks,
        say=lambda line: print(line, flush=True),
    )
    print(f"{done.images:,} images scored in {storage.join(settings.out, 'scores')}", flush=True)
    if done.rejected:
        print(f"{done.rejected:,} could not be used: {storage.join(settings.out, 'rejects.csv')}", flush=True)


def _ray_tasks(settings: PredictSettings) -> tuple[str, Tasks]:
    """(device of the tasks, their runner). Raises SettingsError where nodes do not share what the tasks read."""
    import ray

    from paml.distributed.prepare_ray import RayTasks, refuse_unshared

    refuse_unshared(settings.out or "")
    for folder in (settings.images or "", settings.model.partition("@")[0]):
        if os.path.isdir(folder):
            refuse_unshared(folder)
    held = ray.cluster_resources()
    gpus = settings.gpus_per_task
    if gpus is None:
        gpus = 1.0 if held.get("GPU", 0) else 0.0
    cpus = settings.cpus_per_task
    if cpus is None and gpus:  # decoding takes more than one CPU a GPU
        cpus = max(1, int(held.get("CPU", 1) * gpus / max(1.0, held.get("GPU", 1.0))))
    return "cuda" if gpus else "cpu", RayTasks(cpus_per_task=cpus, gpus_per_task=gpus, retries=settings.retries)


def at_absolute_paths(settings: PredictSettings, base: str) -> PredictSettings:
    """The same settings with every relative path below `base`."""

    def absolute(path: str | None) -> str | None:
        if path is None or storage.is_remote(path):
            return path
        return os.path.normpath(os.path.join(base, os.path.expanduser(path)))

    paths = {name: absolute(getattr(settings, name)) for name in ("model", "image", "show", "images", "out")}
    bulk = dataclasses.replace(settings.bulk, cache_dir=absolute(settings.bulk.cache_dir))
    return dataclasses.replace(settings, bulk=bulk, **paths)  # pyright: ignore[reportArgumentType]
