"""The settings of a training run, composed from the settings of its parts."""

import dataclasses
import re
from typing import Any, Literal

from paml import storage
from paml.data.settings import DataSettings
from paml.errors import SettingsError, check_setting
from paml.losses import LossSettings
from paml.metrics import MetricSettings
from paml.models import BoostSettings, ModelSettings
from paml.settings import flatten
from paml.training.checkpoint import CheckpointSettings
from paml.training.optimizer import LinearInitSettings, OptimizerSettings, Phase


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Processes that train together."""

    num_workers: int = 0
    """Number of Ray Train workers (data parallel). 0 trains in this process, without Ray."""
    min_workers: int | None = None
    """Elastic training: start, and continue after a failure, with at least this many workers, and grow to `num_workers`
    when the cluster has room. Global batches do not change. null always waits for all `num_workers`."""
    gpus_per_worker: float | None = None
    """GPUs per worker; null uses 1 if the cluster has GPUs, otherwise 0."""
    cpus_per_worker: float | None = None
    """CPUs per worker; null uses an equal share of the cluster, at least 1."""
    max_failures: int = 3
    """Number of times that lost workers are replaced before the run fails."""
    collective_timeout_seconds: float = 600.0
    """A worker without progress for this long (in a step, while loading a batch or writing a checkpoint) is reported
    and replaced, and training resumes from the latest checkpoint. Collectives time out shortly after."""
    address: str | None = None
    """Address of the Ray cluster; null uses $RAY_ADDRESS, otherwise starts Ray on this machine."""

    def __post_init__(self) -> None:
        timeout, least, most = self.collective_timeout_seconds, self.min_workers, self.num_workers
        check_setting(most >= 0, "workers.num_workers", most, "0 (no Ray) or more")
        allowed = f"from 1 to num_workers ({most}), or null"
        check_setting(least is None or 1 <= least <= most, "workers.min_workers", least, allowed)
        check_setting(timeout >= 1, "workers.collective_timeout_seconds", timeout, "1 or more")
        if self.min_workers is not None and self.cpus_per_worker is None:
            raise SettingsError(
                "workers.min_workers needs workers.cpus_per_worker, because an equal share of a cluster that changes "
                "size is not defined: set workers.cpus_per_worker (and workers.gpus_per_worker for GPUs)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Name and location of the run, and the trackers that follow it."""

    storage: str = "runs"
    """Folder of all runs, local or s3://. The run is written to <storage>/<name>."""
    name: str | None = None
    """Name of the run. An existing name is refused unless `resume` is set. null uses the name of the data folder, with
    a number appended if it is taken."""
    experiment: str | None = None
    """Experiment of the run in the trackers; null uses the name of the data folder."""
    resume: bool | Literal["auto"] = False
    """true continues the run from its latest complete checkpoint. auto does so if the run exists and starts it
    otherwise; use it for commands that are restarted automatically."""
    trackers: list[str] = dataclasses.field(default_factory=lambda: ["mlflow"])
    """Trackers that receive the metrics, for example [mlflow]; [] for none. MLflow uses $MLFLOW_TRACKING_URI, otherwise
    a SQLite database in `storage`."""
    register: str | None = None
    """Name of a model in MLflow's model registry. The final model becomes its `candidate`, and its `champion` if there
    is none or if it scores higher on the same test split. null registers nothing; `paml register` does it later."""

    def __post_init__(self) -> None:
        valid = self.name is None or re.fullmatch(r"[^/\\\s]+", self.name) is not None
        check_setting(valid, "run.name", self.name, "a folder name without spaces and slashes, or null")
        if self.name is None and self.resume:
            raise SettingsError("run.resume needs run.name: set it to the name of the run to resume")
        if self.register is not None and "mlflow" not in self.trackers:
            raise SettingsError("run.register needs MLflow: add mlflow to run.trackers, or use `paml register` later")

    @property
    def folder(self) -> str:
        """The run folder, `<storage>/<name>`. Raises SettingsError if the run has no name yet."""
        if self.name is None:
            raise SettingsError("run.name is null: set it to the name of a run in run.storage")
        return storage.join(self.storage, self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One training run. Logged and stored in every checkpoint."""

    run: RunSettings = dataclasses.field(default_factory=RunSettings)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    boost: BoostSettings = dataclasses.field(default_factory=BoostSettings)
    loss: LossSettings = dataclasses.field(default_factory=LossSettings)
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    linear_init: LinearInitSettings = dataclasses.field(default_factory=LinearInitSettings)
    metrics: MetricSettings = dataclasses.field(default_factory=MetricSettings)
    checkpoint: CheckpointSettings = dataclasses.field(default_factory=CheckpointSettings)
    workers: WorkerSettings = dataclasses.field(default_factory=WorkerSettings)
    epochs: int = 10
    """Epochs of end-to-end training, after those of linear_init. The first one is the warm-up of the rejection."""
    batch_size: int = 128
    """Images per global batch, over all workers. Evaluation uses twice as many."""
    grad_accum_steps: int = 1
    """Global batches per optimizer step. Labels are ranked for rejection within one global batch."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast precision. auto uses bf16 if the device supports it, otherwise fp16 on a GPU and fp32 on a CPU. fp16
    scales the loss."""
    patience: int | None = None
    """Stop after this many epochs without a higher validation mAP; null never stops early."""
    seed: int = 0
    """Seed of the weights, the sample order, augmentation and the probe."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "grad_accum_steps"):
            check_setting(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        check_setting(self.patience is None or self.patience >= 1, "patience", self.patience, "1 or more, or null")
        check_setting(self.seed >= 0, "seed", self.seed, "0 or more")
        precisions = ("auto", "bf16", "fp16", "fp32")
        check_setting(self.precision in precisions, "precision", self.precision, " or ".join(precisions))
        if self.workers.num_workers > self.batch_size:
            raise SettingsError(
                f"workers.num_workers is {self.workers.num_workers}, more than the {self.batch_size} images of a "
                "global batch: raise batch_size or use fewer workers"
            )
        if self.loss.reject_by == "ema" and not self.optimizer.ema_decay:
            raise SettingsError(
                "loss.reject_by is ema, but optimizer.ema_decay is 0: set optimizer.ema_decay (for example 0.99), or "
                "loss.reject_by to model"
            )
        if self.data.min_crop_area < 1 and self.model.train_from is not None:
            raise SettingsError(
                f"data.min_crop_area is {self.data.min_crop_area}, but the cached features of model.train_from "
                f"({self.model.train_from}) are those of whole images: set data.min_crop_area to 1 or "
                "model.train_from to null"
            )
        if self.data.embeddings is not None:
            for name, conflicts in (
                ("model.train_from", self.model.train_from is not None),
                ("data.min_crop_area", self.data.min_crop_area < 1),
                ("run.register", self.run.register is not None),
            ):
                if conflicts:
                    raise SettingsError(f"{name} is set, but data.embeddings has no images: set {name} to its default")
        elif self.model.embedding_channels is not None:
            raise SettingsError(f"model.backbone is {self.model.backbone}: set data.embeddings instead")
        pool, divisors = self.loss.reject_pool, f"a divisor of batch_size ({self.batch_size}), or null"
        check_setting(pool is None or self.batch_size % pool == 0, "loss.reject_pool", pool, divisors)

    @property
    def eval_batch_size(self) -> int:
        """Images per global batch in evaluation, which needs no memory for gradients."""
        return 2 * self.batch_size

    @property
    def all_epochs(self) -> int:
        """Epochs of all phases."""
        return self.linear_init.epochs + self.epochs

    def phase(self, epoch: int) -> Phase:
        """The phase of `epoch`, counted from 1."""
        first = self.linear_init
        if epoch > first.epochs:
            return Phase(head_only=False, first_epoch=first.epochs + 1, epochs=self.epochs, optimizer=self.optimizer)
        constant: dict[str, Any] = {"head_lr_multiplier": 1.0, "schedule": "constant", "warmup_fraction": 0.0}
        head = dataclasses.replace(self.optimizer, learning_rate=first.learning_rate, **constant)
        return Phase(head_only=True, first_epoch=1, epochs=first.epochs, optimizer=head)


MAY_DIFFER = (
    "run",
    "workers",
    "checkpoint.keep",
    "data.root",
    "data.embeddings",
    "model.weights",
    "data.decode_threads",
    "data.cache_dir",
    "data.features_dir",
    "data.cache_gb",
    "patience",
    "loss.p_asl.prior_file",
)
"""Settings that may change when a run is resumed: locations and resources, never what is computed."""


def with_absolute_paths(settings: TrainSettings, base: str) -> TrainSettings:
    """The settings with all local paths absolute, because workers have working directories of their own.

    Raises SettingsError if data.root is not set.
    """
    if not settings.data.root:
        raise SettingsError(
            "data.root is not set: set it to a folder that `paml prepare` wrote, or start with `paml demo`"
        )

    def replaced(part: Any, *names: str) -> Any:
        return dataclasses.replace(part, **{name: storage.absolute_path(getattr(part, name), base) for name in names})

    from_file = settings.model.weights != "imagenet"
    return dataclasses.replace(
        settings,
        run=replaced(settings.run, "storage"),
        data=replaced(settings.data, "root", "embeddings", "cache_dir", "features_dir"),
        model=replaced(settings.model, "weights") if from_file else settings.model,
        loss=dataclasses.replace(settings.loss, p_asl=replaced(settings.loss.p_asl, "prior_file")),
    )


def check_same_settings(stored: dict, settings: TrainSettings) -> None:
    """Raise SettingsError if a setting outside MAY_DIFFER differs from the `stored` ones of a run; names each."""
    before, now = flatten(TrainSettings()) | flatten(stored), flatten(settings)
    differing = [
        f"{name}: {before.get(name, 'absent')!r} before, {now.get(name, 'absent')!r} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not any(name == free or name.startswith(free + ".") for free in MAY_DIFFER)
    ]
    if differing:
        raise SettingsError(
            f"the run was started with other settings: {'; '.join(differing)}. Resume with the same settings (only "
            f"{', '.join(MAY_DIFFER)} may differ), or set another run.name"
        )
