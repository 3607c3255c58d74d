"""Settings of `paml compare` and `paml tune`."""

import dataclasses
from typing import Any, Literal

from paml.compare.space import Axis, parse_space, space_size
from paml.errors import SettingsError, check_setting
from paml.settings import check_known

DataSet = Literal["voc", "coco", "nus", "cub", "openimages"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiRunSettings:
    """Runs that each change a few settings of one recipe."""

    base: str | dict[str, Any] = "coco18"
    """The training recipe that every run starts from: a file, the name of a recipe, or the settings themselves."""
    common: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings by dotted name that all runs share, on top of the recipe: {epochs: 6}."""
    storage: str = "runs/compare"
    """Folder of all runs and of the results, local or s3://."""
    experiment: str = "compare"
    """Experiment in the tracker."""
    trackers: list[str] = dataclasses.field(default_factory=lambda: ["mlflow"])
    """Trackers that receive the metrics of all runs; [] for none."""
    cpus_per_run: int = 1
    """CPUs (threads) of a run with workers.num_workers 0, which gets no GPU. Set workers.num_workers to 1 or more to
    train on GPUs."""
    max_concurrent: int | None = None
    """Runs with workers.num_workers 0 that train at the same time. null: as many as the cluster has CPUs for. 0: one
    after another in this process, without Ray. Runs with more workers always train one after another."""

    def __post_init__(self) -> None:
        check_setting(self.cpus_per_run >= 1, "cpus_per_run", self.cpus_per_run, "1 or more")
        check_setting((self.max_concurrent or 0) >= 0, "max_concurrent", self.max_concurrent, "0 or more, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareSettings(MultiRunSettings):
    """Methods x seeds on one data set under one budget."""

    methods: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Method -> its settings by dotted name: {LL-R: {loss.name: ll-r, boost.train: 5}}. boost.eval defaults to
    boost.train. The extra key `rows` scores one training with several alphas: {rows: {AN: 1, AN + boost: 5}}."""
    name: str = "comparison"
    """Folder of the tables in `storage`, and name of the parent run in the tracker."""
    seeds: tuple[int, ...] = (0,)
    """Each method is trained once per seed."""
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    """Regime -> label table of the training images; one results table per regime. A method that sets data.train_labels
    is trained once for all regimes. Empty: the label table of the recipe."""
    baseline_row: str | None = "AN"
    """Row with 0 % of the gap closed, trained and scored without boost. null: no gap."""
    upper_bound_row: str | None = "full labels"
    """Row with 100 % of the gap closed, trained and scored without boost."""
    compare_to: str | None = "AN"
    """Row that every other row is compared to by the paired bootstrap. null: no comparison."""
    published: DataSet | None = None
    """Data set whose published results are shown next to rows of the same name."""
    train: bool = True
    """false: train nothing and print the tables of the finished runs."""
    replicates: int = 1000
    """Bootstrap replicates over the test images, for 95 % intervals; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods:
            raise SettingsError("methods is empty; set at least one, such as {LL-R: {loss.name: ll-r}}")
        distinct = 0 < len(set(self.seeds)) == len(self.seeds)
        check_setting(distinct, "seeds", list(self.seeds), "at least one seed, without duplicates")
        check_setting(self.replicates >= 0, "replicates", self.replicates, "0 or more")


FIXED = ("run.", "workers.", "metrics.", "data.root", "data.validation_split", "data.test_split")
"""Settings that are the same for all trials: storage, compute, and what the trials are scored on."""
LENGTHS = ("epochs", "linear_init.epochs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneSettings(MultiRunSettings):
    """Ray Tune over any training settings, by validation mAP. The test split is never opened.

    With workers.num_workers 0 or 1 a trial trains in one process (1 also takes a GPU if there is one); with more it
    trains on its own Ray Train workers.
    """

    base: str | dict[str, Any] = "openimages_v3"
    """The training recipe that every trial starts from: a file, the name of a recipe, or the settings themselves."""
    storage: str = "runs/tune"
    """Folder of all trials and of the results, local or s3://."""
    experiment: str = "tune"
    """Experiment in the tracker."""
    max_concurrent: int | None = None
    """Trials that train at the same time. null: as many as the cluster has CPUs and GPUs for; one if trials have Ray
    Train workers."""
    name: str = "sweep"
    """Folder of the results in `storage`, prefix of the trials' names, and name of the parent run in the tracker."""
    space: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Dotted name -> a list of values, or {uniform: [1, 9]}, {log_uniform: [1.0e-5, 1.0e-3]} or {int: [1, 8]};
    uniform and int also take a step: {uniform: [1, 9], step: 0.5}. Names joined by commas change together, each value
    a list with one entry per name: {"boost.train, boost.eval": [[1, 1], [1, 5]]}."""
    methods: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Method -> its settings by dotted name: {AN: {loss.name: an}, LL-R: {loss.name: ll-r}}. Each method is tuned
    separately, with the same number of trials; the best trial of each is reported and becomes a recipe. The extra key
    `space` adds to the space of that method. Empty: one method, the recipe itself."""
    search: Literal["random", "grid", "optuna"] = "optuna"
    """How trials are chosen. grid: all combinations, or `trials` of them. optuna: the tree-structured Parzen estimator,
    which learns from earlier trials."""
    trials: int | None = None
    """Number of trials, per method. null: the whole grid. It may be raised later to continue a sweep."""
    seed: int = 0
    """Seed of the search. The seed of the training is in the recipe."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """Early stopping, among the trials of one method. asha: stop trials outside the best 1/reduction_factor at epochs
    that grow by that factor. median: stop trials whose best epoch is below the median of the others' running means."""
    grace_epochs: int = 2
    """Epochs, without those of linear_init, before a trial may be stopped. The first epoch rejects nothing."""
    reduction_factor: int = 3
    """With asha: see scheduler."""
    median_min_trials: int = 4
    """With median: trials that must have reached an epoch before another is stopped there."""
    max_failures: int = 2
    """Times that a trial is restarted from its newest checkpoint after its process or workers died."""
    plan: bool = False
    """true: print what would be trained, and exit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = bool(self.name) and not any(char in self.name for char in "/\\ \t\n")
        check_setting(valid, "name", self.name, "a folder name without spaces and slashes")
        if self.max_concurrent == 0:
            raise SettingsError("max_concurrent is 0, but tuning needs Ray: set at least 1, or null")
        minimum = {"grace_epochs": 1, "reduction_factor": 2, "median_min_trials": 2, "max_failures": 0, "trials": 1}
        for name, least in minimum.items():
            value = getattr(self, name)
            check_setting(value is None or value >= least, name, value, f"{least} or more")
        for name, allowed in (("search", ("random", "grid", "optuna")), ("scheduler", ("asha", "median", "none"))):
            check_setting(getattr(self, name) in allowed, name, getattr(self, name), " or ".join(allowed))
        if self.search != "grid" and self.trials is None:
            raise SettingsError(f"trials is null; set a number for search {self.search}")
        for method in self.method_names:
            self._check_method(method)

    @property
    def method_names(self) -> list[str]:
        """The methods in order; one empty name if there are none."""
        return list(self.methods) or [""]

    def method_settings(self, method: str) -> dict[str, Any]:
        """What a method sets, by dotted name."""
        return {name: value for name, value in self.methods.get(method, {}).items() if name != "space"}

    def axes(self, method: str) -> list[Axis]:
        """The search space of a method."""
        return parse_space(self.space | (self.methods.get(method, {}).get("space") or {}))

    def count(self, method: str) -> int:
        """Trials of a method."""
        size = space_size(self.axes(method))
        return int(min(size, self.trials or size)) if self.search == "grid" else self.trials or 0

    @property
    def schedule(self) -> list[tuple[str, int]]:
        """(method, index among the trials of that method) of each trial. The methods take turns."""
        counts = {method: self.count(method) for method in self.method_names}
        return [(method, i) for i in range(max(counts.values())) for method, count in counts.items() if i < count]

    def _check_method(self, method: str) -> None:
        where, axes = f"method {method!r}: space" if method else "space", self.axes(method)
        if not axes:
            raise SettingsError(
                f"{where} is empty; vary at least one setting: {{loss.reject_rate_step: [0.001, 0.002]}}"
            )
        self._check_names(where, method, [name for axis in axes for name in axis.names])
        size = space_size(axes)
        if self.search == "grid" and size == float("inf"):
            ranges = [axis.name for axis in axes if axis.grid is None]
            raise SettingsError(
                f"{where}: search is grid, but {', '.join(ranges)} has no step: set one, or list values"
            )
        if self.search == "random" and self.trials is not None and self.trials > size:
            raise SettingsError(f"trials is {self.trials}, but {where} has {size:g} points: lower trials")

    def _check_names(self, where: str, method: str, names: list[str]) -> None:
        from paml.settings import flatten
        from paml.training.settings import TrainSettings

        own_names = self.method_settings(method)
        check_known([*names, *own_names], flatten(TrainSettings()), where)
        for name in [*names, *own_names]:
            if name.startswith(FIXED):
                raise SettingsError(f"{where}: {name!r} must be the same for all trials: set it in common")
        for name in names:
            if name in LENGTHS and self.scheduler != "none":
                raise SettingsError(
                    f"{where}: {name!r} cannot vary with scheduler {self.scheduler}, which compares trials of equal "
                    "length: set it in common, or set scheduler to none"
                )
            if name in self.common or name in own_names:
                raise SettingsError(f"{where}: {name!r} is set in {'common' if name in self.common else 'methods'} too")
