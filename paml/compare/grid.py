"""From a grid's settings to its trainings and the rows of its tables. Nothing is trained and nothing is written."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

from paml import storage
from paml.cli import checked_settings
from paml.compare.settings import CompareSettings, TrainingsSettings
from paml.errors import SettingsError
from paml.reading import reading
from paml.training.settings import TrainSettings, at_absolute_paths, flatten

ONE_YARDSTICK = ("data.root", "data.validation_split", "data.test_split", "metrics.")
"""Settings in which the rows of one table may not differ: they would be scored on other pairs or by other rules."""
BUDGET = (
    "epochs",
    "linear_init.epochs",
    "batch_size",
    "model.backbone",
    "model.weights",
    "model.output_stride",
    "model.train_from",
    "data.image_size",
)
"""Settings that say what a row has cost; one that differs is named below the table."""


@dataclasses.dataclass(frozen=True)
class Training:
    """One run of the grid."""

    name: str
    """Of its folder below the grid's storage."""
    method: str
    settings: TrainSettings
    """All local paths absolute."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: a method scored with one alpha, over its seeds."""

    name: str
    alpha: str
    """As `f"{alpha:g}"` writes it."""
    trainings: dict[int, str]
    """Seed -> name of the training."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """All of a comparison."""

    trainings: dict[str, Training]
    """By name, in the order in which they are started: all methods of the first seed come first."""
    tables: dict[str, tuple[Row, ...]]
    """Regime -> its rows."""


def plan_grid(settings: CompareSettings, folder: str) -> Grid:
    """The trainings and rows of a comparison; relative paths of data and storage begin at `folder`.

    Raises SettingsError for unknown settings or values, for rows that could not be compared, and for reference rows
    that do not exist or are boosted: all of it before anything is trained.
    """
    base = base_settings(settings)
    regimes: dict[str, str | None] = dict(settings.labels) or {"": None}
    trainings: dict[str, Training] = {}
    tables: dict[str, list[Row]] = {}
    read: dict[str, Training] = {}  # by name without the seed: reading settings takes a tenth of a second
    for seed in settings.seeds:
        for regime, table in regimes.items():
            for method, given in settings.methods.items():
                own = dict(given)
                rows = _rows(method, own.pop("rows", None), own, base)
                own |= {"boost.eval": next(iter(rows.values())), "boost.eval_also": list(rows.values())[1:]}
                shared = "data.train_labels" in own or table is None
                labels = {} if shared else {"data.train_labels": table}
                stem = slug(method if shared else f"{regime}-{method}")
                if stem not in read:
                    read[stem] = training(settings, stem, method, base | labels | own, folder)
                elif read[stem].method != method:
                    other = read[stem].method
                    raise SettingsError(f"methods {other!r} and {method!r} would both lie in {stem}: rename one")
                name = f"{stem}-seed{seed}"
                trainings[name] = _seeded(read[stem], name, seed)
                for row, alpha in rows.items():
                    _add(tables.setdefault(regime, []), row, f"{alpha:g}", seed, name)
    grid = Grid(trainings, {regime: tuple(rows) for regime, rows in tables.items()})
    _check_yardstick(grid)
    for rows in grid.tables.values():
        _check_references(settings, grid, rows)
    return grid


def base_settings(settings: TrainingsSettings) -> dict[str, Any]:
    """The base and the common settings by dotted name. Raises SettingsError where the recipe cannot be read."""
    base = settings.base
    if isinstance(base, str):
        if not os.path.exists(base):
            raise SettingsError(f"base is {base!r}; there is no such recipe (a path is taken from {os.getcwd()})")
        with open(base, "rb") as file, reading(base, "it is to be YAML", SettingsError, (yaml.YAMLError,)):
            base = yaml.safe_load(file)
        if not isinstance(base, dict):
            raise SettingsError(f"base {settings.base!r} holds no settings: it is to be a recipe of the training job")
    return flatten(base) | settings.common


def training(
    settings: TrainingsSettings,
    name: str,
    method: str,
    values: Mapping[str, Any],
    folder: str,
    *,
    searched: bool = False,
) -> Training:
    """A training from its settings by dotted name; `searched` ones never open the test split."""
    place = {
        "run.storage": settings.storage,
        "run.name": name,
        "run.experiment": settings.experiment,
        "run.mlflow": settings.mlflow,
        "run.resume": False,
    }
    hidden = {"data.test_split": None} if searched else {}
    found = read_training({**values, **place, **hidden}, f"method {method!r}")
    return Training(name, method, at_absolute_paths(found, folder))


def _seeded(training: Training, name: str, seed: int) -> Training:
    run = dataclasses.replace(training.settings.run, name=name)
    return Training(name, training.method, dataclasses.replace(training.settings, seed=seed, run=run))


def read_training(values: Mapping[str, Any], where: str) -> TrainSettings:
    """Checked settings of one training, from values by dotted name. Raises SettingsError that begins with `where`."""
    return checked_settings(TrainSettings, values, where, flatten(TrainSettings()))


def slug(name: str) -> str:
    """A name that a folder can have: LL-R + BoostLU becomes LL-R-BoostLU."""
    return re.sub(r"[^\w.]+", "-", name, flags=re.ASCII).strip("-.")


def grid_folder(settings: TrainingsSettings, name: str, folder: str) -> str:
    """Where what comes of a grid lies; relative paths begin at `folder`."""
    place = settings.storage
    if not storage.is_remote(place):
        place = os.path.abspath(os.path.join(folder, os.path.expanduser(place)))
    return storage.join(place, name)


def other_budgets(grid: Grid, rows: tuple[Row, ...]) -> dict[str, str]:
    """Row -> what of its budget differs from that of most rows."""
    flat = {row.name: flatten(grid.trainings[next(iter(row.trainings.values()))].settings) for row in rows}
    found: dict[str, list[str]] = {}
    for name in BUDGET:
        values = [own[name] for own in flat.values()]
        usual = max(values, key=values.count)
        for row, own in flat.items():
            if own[name] != usual:
                found.setdefault(row, []).append(f"{name} {own[name]} where most have {usual}")
    return {row: ", ".join(differences) for row, differences in found.items()}


def _rows(method: str, rows: Any, own: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """Row -> alpha in scoring."""
    trained = {**base, **own}.get("boost.train", 5.0)
    rows = {method: own.get("boost.eval", trained)} if rows is None else rows
    try:
        found = {str(row): float(alpha) for row, alpha in rows.items()}
    except (AttributeError, TypeError, ValueError):
        found = {}
    if not found or len(set(found.values())) < len(found):
        raise SettingsError(
            f"method {method!r}: rows is {rows!r}; it names rows of the table, each with an alpha of its own: "
            "{AN: 1, AN + boost at inference: 5}"
        )
    return found


def _add(rows: list[Row], name: str, alpha: str, seed: int, run: str) -> None:
    for row in rows:
        if row.name == name:
            if seed in row.trainings:
                raise SettingsError(f"two methods have a row {name!r}: rename one")
            row.trainings[seed] = run
            return
    rows.append(Row(name, alpha, {seed: run}))


def _check_yardstick(grid: Grid) -> None:
    seen: dict[str, tuple[Any, str]] = {}
    for each in grid.trainings.values():
        for name, value in flatten(each.settings).items():
            if name.startswith(ONE_YARDSTICK):
                first, method = seen.setdefault(name, (value, each.method))
                if first != value:
                    raise SettingsError(
                        f"methods {method!r} and {each.method!r} differ in {name} ({first!r}, {value!r}) and could not "
                        "be compared: set it in the base"
                    )
                if name == "data.test_split" and value is None:
                    raise SettingsError("data.test_split is null in the base; a comparison scores the test split")


def _check_references(settings: CompareSettings, grid: Grid, rows: tuple[Row, ...]) -> None:
    by_name = {row.name: row for row in rows}
    for role in ("below", "above", "against"):
        name = getattr(settings, role)
        if name is None:
            continue
        if name not in by_name:
            raise SettingsError(f"{role} is {name!r}; the rows are {', '.join(by_name)}. Name one, or say null")
        row = by_name[name]
        boosts = {grid.trainings[run].settings.boost.train for run in row.trainings.values()}
        if role != "against" and (row.alpha != "1" or boosts != {1.0}):
            raise SettingsError(
                f"{role} is {name!r}, which is boosted; the gap is between rows without boost: train and score it with "
                "alpha 1"
            )
