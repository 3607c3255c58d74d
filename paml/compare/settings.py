"""What a comparison, a search and a sweep are told."""

import dataclasses
from typing import Any, Literal

from paml.cli import refuse_unknown
from paml.compare.space import Axis, parse_space, size_of
from paml.errors import SettingsError

DataSet = Literal["voc", "coco", "nus", "cub", "openimages"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingsSettings:
    """What all jobs of many trainings have in common: trainings that differ from one recipe in a few settings each."""

    base: str | dict[str, Any] = "jobs/recipes/coco18.yaml"
    """Recipe of a training that all others begin from: a file, or the settings themselves."""
    common: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings by dotted name on top of it, for all trainings: {epochs: 6}."""
    storage: str = "runs/compare"
    """Folder of all trainings and of what comes of them, local or s3://."""
    experiment: str = "compare"
    """MLflow experiment."""
    mlflow: bool = True
    """Mirror all journals into MLflow."""
    cpus_per_run: int = 1
    """CPUs, and threads, of a training without Ray Train workers (workers.num_workers 0 in the base). Such ones get no
    GPU: for those take workers.num_workers 1 or more."""
    at_once: int | None = None
    """Such trainings at the same time; null for as many as the cluster's CPUs hold, 0 for one after another in this
    process without Ray. Those with workers.num_workers of 1 or more always run one after another."""
    address: str | None = None
    """Ray cluster to join; null takes RAY_ADDRESS, else starts one in this process."""

    def __post_init__(self) -> None:
        if self.cpus_per_run < 1:
            raise SettingsError(f"cpus_per_run is {self.cpus_per_run}; it must be at least 1")
        if self.at_once is not None and self.at_once < 0:
            raise SettingsError(f"at_once is {self.at_once}; it must be at least 0, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridSettings(TrainingsSettings):
    """What a comparison and a search have in common: methods, each a few settings on top of the base."""

    methods: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Method -> its settings by dotted name: {loss.name: ll-r, boost.train: 5}. Without boost.eval a method is scored
    with the alpha that it is trained with. See the job's own help for the further key that a method may hold."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods:
            raise SettingsError("methods is empty; name at least one, such as {LL-R: {loss.name: ll-r}}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareSettings(GridSettings):
    """Methods x seeds on one data set under one budget. A method may hold `rows`: {row of the table: alpha in scoring},
    so that one training serves several rows; without it the row has the method's name."""

    name: str = "comparison"
    """Folder of the tables below `storage`, and name of the MLflow run that holds the trainings' runs."""
    seeds: tuple[int, ...] = (0,)
    """Every method is trained once with each."""
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    """Regime -> label table of its training images: one table of results each. A method that sets data.train_labels
    keeps its own and serves all regimes with one training. Empty: the base's alone."""
    below: str | None = "AN"
    """Row that closes none of the gap; null for no gap."""
    above: str | None = "full labels"
    """Row that closes all of it. Both must be without boost."""
    against: str | None = "AN"
    """Row that every other is compared with by the paired bootstrap; null for none."""
    published: DataSet | None = None
    """Data set whose published figures stand beside the rows of the same name."""
    train: bool = True
    """False trains nothing and prints the tables of what is finished."""
    replicates: int = 1000
    """Of the bootstrap over test images; 0 for no intervals."""
    bootstrap_seed: int = 0
    """Of the images drawn."""
    level: float = 0.95
    """Share of the replicates within an interval."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SettingsError(f"seeds is {list(self.seeds)}; give at least one, and each once")
        if self.replicates < 0 or not 0 < self.level < 1:
            raise SettingsError(
                f"replicates ({self.replicates}) must be at least 0 and level ({self.level}) between 0 and 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings(GridSettings):
    """Successive halving on the validation split. A method may hold a `space` of its own, on top of the common one."""

    storage: str = "runs/search"
    """Folder of all trainings and of the winners' recipes, local or s3://."""
    experiment: str = "search"
    """MLflow experiment."""
    space: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """Dotted name -> values to try. Names joined by commas move together, a value being a list of one each or one for
    all: {"boost.train, boost.eval": [[1, 1], [1, 5], [5, 5]]} tries where the boost acts."""
    configurations: int = 9
    """Of each method, drawn from its space without repeats; the whole space where it holds no more."""
    first_epochs: int = 1
    """Epochs of the first rung, after those of linear_init."""
    eta: int = 3
    """Each rung has so many times the epochs of the one before and keeps 1/eta of its configurations, rounded up."""
    seed: int = 0
    """Of the draw; the trainings' own is in the base."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("configurations", 1), ("first_epochs", 1), ("eta", 2)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least {least}")


OWN_TO_A_SWEEP = ("run.", "workers.", "metrics.", "data.root", "data.validation_split", "data.test_split")
"""Settings that a sweep does not vary: where its trials lie, who computes them, and what they are scored on."""
LENGTHS = ("epochs", "linear_init.epochs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings(TrainingsSettings):
    """Ray Tune over any settings of a training, by validation mAP; the test split is never opened.

    A trial with workers.num_workers 0 or 1 in base and common is trained in a process of its own (1 also takes a GPU
    where there is one), one with more as Ray Train workers below it.
    """

    base: str | dict[str, Any] = "jobs/recipes/openimages_v3.yaml"
    """Recipe of a training that all trials begin from: a file, or the settings themselves."""
    storage: str = "runs/sweep"
    """Folder of all trials and of what comes of them, local or s3://."""
    experiment: str = "sweep"
    """MLflow experiment."""
    at_once: int | None = None
    """Trials at the same time; null for as many as the cluster's CPUs and GPUs hold, of those with Ray Train workers
    one."""
    name: str = "sweep"
    """Folder below `storage` of the table, the pictures and the best recipe, first part of the trials' names, and name
    of the MLflow run that holds theirs."""
    space: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Dotted name -> what it may be: a list of values, {uniform: [low, high]}, {log_uniform: [low, high]} or
    {int: [low, high]}, uniform and int also with step. Names joined by commas move together, a value being a list of
    one each or one for all: {"boost.train, boost.eval": [[1, 1], [1, 5], [5, 5]]} tries where the boost acts. Without a
    word on boost.eval a trial is scored with the alpha that it is trained with."""
    search: Literal["random", "grid", "optuna"] = "optuna"
    """How points are chosen: at random, all of a space without ranges, or by Optuna's TPE (ten at random first)."""
    trials: int | None = None
    """How many points; null for all of a grid. More of them may be asked for later."""
    seed: int = 0
    """Of the choice of points; the trainings' own is in the base."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """Which trials are stopped early: those not in the best 1/eta of the trials that have come as far, at epochs that
    grow by eta (asha), or those whose best epoch is below the median of the others' running means (median)."""
    first_epochs: int = 2
    """Epochs, after those of linear_init, before any trial is stopped. The first one rejects nothing yet."""
    eta: int = 3
    """Of asha."""
    median_of: int = 4
    """Trials that must have come as far before one is stopped by their median."""
    max_failures: int = 2
    """Times that a trial whose process or workers died is started again, from its newest checkpoint."""
    plan: bool = False
    """True says what would be trained, and trains nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name or any(sign in self.name for sign in "/\\ \t\n"):
            raise SettingsError(f"name is {self.name!r}; it names a folder: no blanks, no slashes")
        if self.at_once == 0:
            raise SettingsError("at_once is 0; a sweep needs Ray, so give at least 1, or null")
        least = {"first_epochs": 1, "eta": 2, "median_of": 2, "max_failures": 0}
        for name, value in [*least.items(), *([] if self.trials is None else [("trials", 1)])]:
            if getattr(self, name) < value:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least {value}")
        for name, allowed in (("search", ("random", "grid", "optuna")), ("scheduler", ("asha", "median", "none"))):
            if getattr(self, name) not in allowed:
                raise SettingsError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        if not self.space:
            raise SettingsError("space is empty; vary at least one setting: {loss.reject_rate_step: [0.001, 0.002]}")
        self._check_names()
        size = size_of(self.axes)
        if self.search == "grid" and size == float("inf"):
            ranges = [axis.name for axis in self.axes if axis.grid is None]
            raise SettingsError(f"search is grid, but {', '.join(ranges)} has no step: give one, or a list of values")
        if self.search != "grid" and self.trials is None:
            raise SettingsError(f"trials is null; a search by {self.search} needs a number")
        if self.search == "random" and self.trials is not None and self.trials > size:
            raise SettingsError(f"trials is {self.trials}, but the space holds {size:g} points: ask for no more")

    def _check_names(self) -> None:
        from paml.training.settings import TrainSettings, flatten  # torch, which --help does not wait for

        names = [name for axis in self.axes for name in axis.names]
        refuse_unknown(names, flatten(TrainSettings()), "space")
        for name in names:
            if name.startswith(OWN_TO_A_SWEEP):
                raise SettingsError(
                    f"space: {name!r} cannot be varied: it says where trials lie, who computes them or what they are "
                    "scored on, which is the same for all. Set it in common"
                )
            if name in LENGTHS and self.scheduler != "none":
                raise SettingsError(
                    f"space: {name!r} cannot be varied under scheduler {self.scheduler}, which compares trials of one "
                    "length epoch by epoch: set it in common, or take scheduler none"
                )
            if name in self.common:
                raise SettingsError(f"space: {name!r} is set in common, too: take it out of one")

    @property
    def axes(self) -> list[Axis]:
        """What `space` says."""
        return parse_space(self.space)

    @property
    def count(self) -> int:
        """Trials in all."""
        size = size_of(self.axes)
        return int(min(size, self.trials or size)) if self.search == "grid" else self.trials or 0
