"""What a comparison and a search are told."""

import dataclasses
from typing import Any, Literal

from paml.errors import SettingsError

DataSet = Literal["voc", "coco", "nus", "cub", "openimages"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridSettings:
    """What a comparison and a search have in common: trainings that differ from one recipe in a few settings each."""

    base: str | dict[str, Any] = "jobs/recipes/coco18.yaml"
    """Recipe of a training that all others begin from: a file, or the settings themselves."""
    common: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings by dotted name on top of it, for all trainings: {epochs: 6}."""
    methods: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Method -> its settings by dotted name: {loss.name: ll-r, boost.train: 5}. Without boost.eval a method is scored
    with the alpha that it is trained with. See the job's own help for the further key that a method may hold."""
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
        if not self.methods:
            raise SettingsError("methods is empty; name at least one, such as {LL-R: {loss.name: ll-r}}")
        if self.cpus_per_run < 1:
            raise SettingsError(f"cpus_per_run is {self.cpus_per_run}; it must be at least 1")
        if self.at_once is not None and self.at_once < 0:
            raise SettingsError(f"at_once is {self.at_once}; it must be at least 0, or null")


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
