"""The command `paml predict`: one image in this process, or many in this process or on a Ray cluster."""

import dataclasses
import os

from paml import storage
from paml.distributed import cluster
from paml.distributed.cluster import print_line
from paml.errors import SettingsError, check_setting
from paml.inference.bulk import BulkSettings, predict_images
from paml.inference.predictor import open_predictor
from paml.inference.single import predict_image
from paml.labels.edit import check_outputs
from paml.tasks import LocalTaskRunner, TaskRunner


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """The images to predict, and the model."""

    model: str = "runs/openimages-v3"
    """A run (FOLDER[@best|newest|step-*][:alpha=A]), a model folder (with model.json) or an MLflow model, local or
    s3://."""
    image: str | None = None
    """One image: prints its top classes."""
    show: str | None = None
    """With `image`: PNG file to write, with the image, its top classes and their maps."""
    top: int = 5
    """With `image`: number of classes."""
    images: str | None = None
    """Many images: a folder of shards (with manifest.arrow) or of image files, local or s3://bucket/prefix."""
    out: str | None = None
    """With `images`: folder for the scores, local or s3://. Repeat the command to continue after a stop."""
    bulk: BulkSettings = dataclasses.field(default_factory=BulkSettings)
    ray: bool | None = None
    """With `images`: use a Ray cluster; null does if there is one (RAY_ADDRESS, or `paml submit`)."""
    cpus_per_task: int | None = None
    """CPUs (threads) of a task. null: all CPUs of this machine; on a cluster the CPUs per GPU, or 1 without GPUs (more
    if there are few tasks)."""
    gpus_per_task: float | None = None
    """GPUs of a task on a cluster: 0.5 runs two tasks per GPU, 0 uses CPUs only. null: 1 if there are GPUs."""
    retries: int = 3
    """Number of times that a failed task is retried."""

    def __post_init__(self) -> None:
        if (self.image is None) == (self.images is None):
            raise SettingsError(
                f"image is {self.image!r} and images is {self.images!r}: set either image (one image) or images (a "
                "folder, shards or a bucket)"
            )
        if self.images is not None and self.out is None:
            raise SettingsError("out is null: set it to a folder for the scores of images")
        if self.show is not None and self.image is None:
            raise SettingsError("show needs image; for the maps of many images, set bulk.maps")
        for name, least in (("top", 1), ("cpus_per_task", 1), ("gpus_per_task", 0), ("retries", 0)):
            value = getattr(self, name)
            check_setting(value is None or value >= least, name, value, f"{least} or more")


def run_predict(settings: PredictSettings) -> int:
    """Predict one image or many. Returns 0; a stop ends the process with 128 + signal.

    Raises PamlError, such as PartsFailed with all failed parts after the others have finished.
    """
    settings = with_absolute_paths(settings, cluster.base_folder())
    if settings.image is not None:
        check_outputs([settings.show] if settings.show else [], [settings.image])
        predict_image(open_predictor(settings.model), settings.image, top=settings.top, show=settings.show)
        return 0
    images, out = settings.images, settings.out
    assert images is not None
    assert out is not None  # both are checked with the settings
    with cluster.stoppable_tasks(settings.ray) as use_ray:
        device, tasks = None, LocalTaskRunner(settings.cpus_per_task, retries=settings.retries)
        if use_ray:
            device, tasks = _ray_task_runner(settings)
        report = predict_images(settings.model, images, out, settings.bulk, device=device, tasks=tasks, log=print_line)
        print_line(f"{report.images:,} images scored in {storage.join(out, 'scores')}")
        if report.rejected:
            print_line(f"{report.rejected:,} images could not be read: see {storage.join(out, 'rejects.csv')}")
    return 0


def _ray_task_runner(settings: PredictSettings) -> tuple[str, TaskRunner]:
    """(device of the tasks, their runner). Raises SettingsError if nodes do not share the folders."""
    import ray

    from paml.distributed.ray_tasks import RayTaskRunner, check_shared

    check_shared(settings.out or "")
    for folder in (settings.images or "", settings.model.partition("@")[0]):
        if os.path.isdir(folder):
            check_shared(folder)
    available = ray.cluster_resources()
    gpus = settings.gpus_per_task
    if gpus is None:
        gpus = 1.0 if available.get("GPU", 0) else 0.0
    cpus = settings.cpus_per_task
    if cpus is None and gpus:  # decoding for one GPU takes more than one CPU
        cpus = max(1, int(available.get("CPU", 1) * gpus / max(1.0, available.get("GPU", 1.0))))
    runner = RayTaskRunner(cpus_per_task=cpus, gpus_per_task=gpus, retries=settings.retries)
    return "cuda" if gpus else "cpu", runner


def with_absolute_paths(settings: PredictSettings, base: str) -> PredictSettings:
    """The settings with local paths resolved against `base`."""
    names = ("model", "image", "show", "images", "out")
    paths = {name: storage.absolute_path(getattr(settings, name), base) for name in names}
    bulk = dataclasses.replace(settings.bulk, cache_dir=storage.absolute_path(settings.bulk.cache_dir, base))
    return dataclasses.replace(settings, bulk=bulk, **paths)  # pyright: ignore[reportArgumentType]
