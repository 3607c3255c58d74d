"""All settings of a training run, composed from those of its parts."""

import dataclasses
import os
import typing
from typing import Any, Literal

from paml import storage
from paml.data.settings import DataSettings
from paml.errors import SettingsError
from paml.losses import LossSettings
from paml.metrics import MetricSettings
from paml.models import BoostSettings, ModelSettings
from paml.training.checkpoint import CheckpointSettings
from paml.training.optimiser import OptimiserSettings
from paml.training.phases import LinearInitSettings, Phase, phase_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """The workers of a run."""

    num_workers: int = 2
    """Ray Train DDP workers; 0 trains in this process without Ray (notebook, debugger)."""
    min_workers: int | None = None
    """Elastic: the run begins, and goes on after a loss, with as few as these where the cluster has no room for
    num_workers, and grows again with it. The global batches stay the same. null: num_workers or none."""
    resize_seconds: float = 60.0
    """Elastic: how long there must have been room for more workers before the run, which leaves a checkpoint and begins
    again for that, takes it."""
    gpus_per_worker: float | None = None
    """GPUs of each worker; null takes 1 where the cluster has GPUs, else 0."""
    cpus_per_worker: float | None = None
    """CPUs of each worker; null takes an equal share of the cluster's, at least 1."""
    max_failures: int = 3
    """Times that lost workers are replaced before the run fails."""
    collective_timeout_seconds: float = 600.0
    """A worker that stands still for longer (in one step, before one batch, over one checkpoint) is named, and the run
    goes on without it from the newest checkpoint. Collectives and whatever Ray waits for end a little later."""
    address: str | None = None
    """Ray cluster to join; null takes RAY_ADDRESS, else starts one in this process."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise SettingsError(f"workers.num_workers is {self.num_workers}; it must be 0 (no Ray) or more")
        if self.min_workers is not None:
            if not 1 <= self.min_workers <= self.num_workers:
                raise SettingsError(
                    f"workers.min_workers is {self.min_workers}; it must be between 1 and workers.num_workers "
                    f"({self.num_workers}), or null"
                )
            if self.cpus_per_worker is None:
                raise SettingsError(
                    "workers.min_workers is set, but workers.cpus_per_worker is null, a share of a cluster that is to "
                    "change: set workers.cpus_per_worker (and workers.gpus_per_worker, where GPUs come later)"
                )
        if not self.resize_seconds >= 0:
            raise SettingsError(f"workers.resize_seconds is {self.resize_seconds}; it must be 0 or more")
        if not self.collective_timeout_seconds >= 1:
            raise SettingsError(
                f"workers.collective_timeout_seconds is {self.collective_timeout_seconds}; it must be at least 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """The run's place and name."""

    storage: str = "runs"
    """Folder of all runs, local or s3://; a run lies in <storage>/<name>."""
    name: str = "openimages-v3"
    """Name of the run; a name that exists is refused unless `resume` is set."""
    experiment: str = "paml"
    """MLflow experiment."""
    resume: bool | Literal["auto"] = False
    """Go on with the run of this name from its newest whole checkpoint; auto begins it where there is none yet, for
    commands that something gives again by itself."""
    mlflow: bool = True
    """Mirror the journal into MLflow (MLFLOW_TRACKING_URI, else SQLite below `storage`)."""
    system_seconds: float = 10.0
    """Seconds between samples of CPU, memory and GPU; 0 for none."""
    register: str | None = None
    """Name in MLflow's model registry: the final model becomes its `candidate`, and its `champion` where there is none
    or where it beats it on the same test; null registers nothing. jobs/register.py does so later."""

    def __post_init__(self) -> None:
        if not self.name or any(sign in self.name for sign in "/\\ \t\n"):
            raise SettingsError(f"run.name is {self.name!r}; it names a folder: no blanks, no slashes")
        if self.register is not None and not self.mlflow:
            raise SettingsError(
                "run.register needs MLflow: set run.mlflow to true, or register later (jobs/register.py)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One training run. Read by jobs/train_openimages.py; logged whole; stored in every checkpoint."""

    run: TrackingSettings = dataclasses.field(default_factory=TrackingSettings)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    boost: BoostSettings = dataclasses.field(default_factory=BoostSettings)
    loss: LossSettings = dataclasses.field(default_factory=LossSettings)
    optimiser: OptimiserSettings = dataclasses.field(default_factory=OptimiserSettings)
    linear_init: LinearInitSettings = dataclasses.field(default_factory=LinearInitSettings)
    metrics: MetricSettings = dataclasses.field(default_factory=MetricSettings)
    checkpoint: CheckpointSettings = dataclasses.field(default_factory=CheckpointSettings)
    workers: WorkerSettings = dataclasses.field(default_factory=WorkerSettings)
    epochs: int = 10
    """Passes over the training images end to end, after those of linear_init; the first is the rejection's warm-up."""
    batch_size: int = 128
    """Images in a global batch, over all workers."""
    eval_batch_size: int | None = None
    """Images in a global batch while scoring; null takes 2 × batch_size."""
    accumulate: int = 1
    """Global batches summed for one step of the optimiser. A reject pool lies within one of them."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast: auto takes bf16 where the device computes in it, else fp32; fp16 scales the loss (slow on a CPU)."""
    patience: int | None = None
    """Stop after this many epochs without a better validation mAP; null for never."""
    seed: int = 0
    """Of weights, order, flips, crops and probe."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("eval_batch_size", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 1, or null")
        if self.seed < 0:
            raise SettingsError(f"seed is {self.seed}; it must be at least 0")
        if self.precision not in ("auto", "bf16", "fp16", "fp32"):
            raise SettingsError(f"precision is {self.precision!r}; it must be auto, bf16, fp16 or fp32")
        if self.workers.num_workers > self.batch_size:
            raise SettingsError(
                f"workers.num_workers is {self.workers.num_workers}, more than the {self.batch_size} slots of a "
                "global batch: some would never see an image. Raise batch_size or take fewer workers"
            )
        if self.loss.reject_by == "averaged" and not self.optimiser.average:
            raise SettingsError(
                "loss.reject_by is averaged, but optimiser.average is 0, so no averaged weights are kept: set "
                "optimiser.average (0.99, say), or reject by model"
            )
        if self.data.crop < 1 and self.model.train_from is not None:
            raise SettingsError(
                f"data.crop is {self.data.crop}, but features before model.train_from ({self.model.train_from}) are "
                "those of whole pictures: set data.crop to 1, or model.train_from to null"
            )
        pool = self.loss.reject_pool
        if pool is not None and (pool < 1 or self.batch_size % pool):
            raise SettingsError(
                f"loss.reject_pool is {pool}; it must divide batch_size ({self.batch_size}), since a pool lies "
                "within one global batch, also where several are accumulated"
            )

    @property
    def all_epochs(self) -> int:
        """Epochs of all phases."""
        return self.linear_init.epochs + self.epochs

    def phase(self, epoch: int) -> Phase:
        """The phase of epoch `epoch`, from 1."""
        return phase_of(self.linear_init, self.optimiser, self.epochs, epoch)


MAY_DIFFER = (
    "run",
    "workers",
    "checkpoint.keep",
    "data.root",
    "model.weights",
    "data.decode_threads",
    "data.loader_processes",
    "data.prefetch",
    "data.cache_dir",
    "data.features_dir",
    "data.cache_gb",
    "data.shards_ahead",
    "patience",
    "loss.p_asl.prior_file",
)
"""Settings that a resumed run may change: where things lie and who computes them, never what is computed."""


def at_absolute_paths(settings: TrainSettings, base: str) -> TrainSettings:
    """The same settings with every local path absolute, since workers run in folders of their own."""

    def fixed(path: str) -> str:
        return path if storage.is_remote(path) else os.path.abspath(os.path.join(base, os.path.expanduser(path)))

    weights = settings.model.weights
    if weights is not None and weights != "imagenet":
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, weights=fixed(weights)))
    folders = {name: getattr(settings.data, name) for name in ("root", "cache_dir", "features_dir")}
    fixed_folders = {name: fixed(folder) for name, folder in folders.items() if folder is not None}
    if settings.loss.p_asl.prior_file is not None:
        p_asl = dataclasses.replace(settings.loss.p_asl, prior_file=fixed(settings.loss.p_asl.prior_file))
        settings = dataclasses.replace(settings, loss=dataclasses.replace(settings.loss, p_asl=p_asl))
    return dataclasses.replace(
        settings,
        run=dataclasses.replace(settings.run, storage=fixed(settings.run.storage)),
        data=dataclasses.replace(settings.data, **fixed_folders),
    )


def flatten(settings: object, prefix: str = "") -> dict[str, object]:
    """Dotted names to values of a (nested) settings dataclass or of its asdict()."""
    values = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings  # pyright: ignore
    flat: dict[str, object] = {}
    for name, value in values.items():  # pyright: ignore
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def unflatten(kind: type, flat: dict[str, object]) -> Any:
    """The settings dataclass that `flatten` made `flat` of; what is absent takes its default."""
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inside = {name[len(field.name) + 1 :]: v for name, v in flat.items() if name.startswith(field.name + ".")}
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = unflatten(hints[field.name], inside)
        elif field.name in flat:
            value = flat[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def refuse_other_settings(stored: dict, settings: TrainSettings) -> None:
    """Raise SettingsError, naming each, where settings that decide what is computed differ from a stored run's."""
    then, now = flatten(TrainSettings()) | flatten(stored), flatten(settings)  # younger settings had their default
    differing = [
        f"{name}: {then.get(name, 'absent')!r} then, {now.get(name, 'absent')!r} now"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
        and not any(name == free or name.startswith(free + ".") for free in MAY_DIFFER)
    ]
    if differing:
        raise SettingsError(
            "the run was begun with other settings: " + "; ".join(differing) + ". Resume with the same ones "
            f"(only {', '.join(MAY_DIFFER)} may differ), or give the new run another run.name"
        )
