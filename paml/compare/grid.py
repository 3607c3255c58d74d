"""From settings to the trainings and table rows of a comparison. Trains nothing and writes nothing."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from paml import storage
from paml.compare.settings import CompareSettings, MultiRunSettings
from paml.errors import SettingsError
from paml.parsing import parse_errors_as
from paml.recipes import find_recipe
from paml.settings import flatten, settings_from_values
from paml.training.settings import TrainSettings, with_absolute_paths

SAME_EVALUATION = ("data.root", "data.validation_split", "data.test_split", "metrics.")
"""Settings that must be equal in all rows, or their scores are not comparable."""
BUDGET = ("epochs", "linear_init.epochs", "batch_size", "model.", "data.image_size")
"""Settings that determine the cost of a row; rows that differ in one are listed under the table."""


@dataclasses.dataclass(frozen=True)
class Training:
    """One run of a comparison or a sweep."""

    method: str
    settings: TrainSettings
    """With absolute local paths."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.settings.run.name)

    @property
    def folder(self) -> str:
        """The run folder."""
        return self.settings.run.folder


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: a method scored with one alpha, over its seeds."""

    name: str
    alpha: str
    """As `f"{alpha:g}"`."""
    trainings: dict[int, Training]
    """Seed -> training."""

    @property
    def first(self) -> Training:
        """The training with the first seed."""
        return next(iter(self.trainings.values()))


@dataclasses.dataclass(frozen=True)
class Grid:
    """All trainings and tables of a comparison."""

    trainings: dict[str, Training]
    """By name, in training order: all methods of the first seed first."""
    tables: dict[str, dict[str, Row]]
    """Regime -> rows by name."""


def plan_grid(settings: CompareSettings, root: str) -> Grid:
    """The trainings and rows of a comparison; `root` resolves relative paths.

    Raises SettingsError for invalid settings, for rows that are not comparable, and for reference rows that do not
    exist or are boosted.
    """
    base = base_settings(settings)
    regimes: dict[str, str | None] = dict(settings.labels) or {"": None}
    grid = Grid({}, {regime: {} for regime in regimes})
    parsed: dict[str, Training] = {}  # by name without the seed, since parsing takes 0.1 s
    for seed, (regime, table), method in itertools.product(settings.seeds, regimes.items(), settings.methods):
        overrides = dict(settings.methods[method])
        rows = _parse_rows(method, overrides.pop("rows", None), overrides, base)
        overrides |= {"boost.eval": next(iter(rows.values())), "boost.eval_also": list(rows.values())[1:]}
        shared = "data.train_labels" in overrides or table is None
        labels = {} if shared else {"data.train_labels": table}
        stem = slug(method if shared else f"{regime}-{method}")
        if stem not in parsed:
            parsed[stem] = make_training(settings, stem, method, base | labels | overrides, root)
        elif parsed[stem].method != method:
            other = parsed[stem].method
            raise SettingsError(f"methods {other!r} and {method!r} have the same folder {stem}: rename one")
        name = f"{stem}-seed{seed}"
        run = dataclasses.replace(parsed[stem].settings.run, name=name)
        training = Training(method, dataclasses.replace(parsed[stem].settings, seed=seed, run=run))
        grid.trainings[name] = training
        for row_name, alpha in rows.items():
            row = grid.tables[regime].setdefault(row_name, Row(row_name, f"{alpha:g}", {}))
            if seed in row.trainings:
                raise SettingsError(f"two methods have a row {row_name!r}: rename one")
            row.trainings[seed] = training
    _check_same_evaluation(list(grid.trainings.values()))
    for rows in grid.tables.values():
        _check_references(settings, rows)
    return grid


def base_settings(settings: MultiRunSettings) -> dict[str, Any]:
    """The recipe and the common settings by dotted name. Raises SettingsError if the recipe cannot be read."""
    base = settings.base
    if isinstance(base, str):
        base = find_recipe(base)
        with open(base, "rb") as file, parse_errors_as(base, "write it as YAML", SettingsError, (yaml.YAMLError,)):
            base = yaml.safe_load(file)
        if not isinstance(base, dict):
            raise SettingsError(f"base {settings.base!r} has no settings: set it to a recipe of `paml train`")
    return flatten(base) | settings.common


def make_training(settings: MultiRunSettings, name: str, method: str, values: Mapping[str, Any], root: str) -> Training:
    """A training from its settings by dotted name; `root` resolves relative paths."""
    run = {
        "run.storage": settings.storage,
        "run.name": name,
        "run.experiment": settings.experiment,
        "run.trackers": settings.trackers,
        "run.resume": False,
    }
    parsed = settings_from_values(TrainSettings, {**values, **run}, f"method {method!r}")
    return Training(method, with_absolute_paths(parsed, root))


def slug(name: str) -> str:
    """A name as a folder name: "LL-R + BoostLU" becomes "LL-R-BoostLU"."""
    return re.sub(r"[^\w.]+", "-", name, flags=re.ASCII).strip("-.")


def results_folder(settings: MultiRunSettings, name: str, root: str) -> str:
    """Folder of the results; `root` resolves relative paths."""
    return storage.join(str(storage.absolute_path(settings.storage, root)), name)


def different_budgets(rows: Mapping[str, Row]) -> dict[str, str]:
    """Row -> how its budget differs from that of most rows."""
    flat = {name: flatten(row.first.settings) for name, row in rows.items()}
    differences: dict[str, list[str]] = {}
    for name in [name for name in next(iter(flat.values())) if name.startswith(BUDGET)]:
        values = [settings[name] for settings in flat.values()]
        usual = max(values, key=values.count)
        for row, settings in flat.items():
            if settings[name] != usual:
                differences.setdefault(row, []).append(f"{name} {settings[name]} (others: {usual})")
    return {row: ", ".join(parts) for row, parts in differences.items()}


def _parse_rows(method: str, rows: Any, overrides: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """Row -> alpha in scoring."""
    if rows is None:
        rows = {method: overrides.get("boost.eval", {**base, **overrides}.get("boost.train", 5.0))}
    try:
        parsed = {str(row): float(alpha) for row, alpha in rows.items()}
    except (AttributeError, TypeError, ValueError):
        parsed = {}
    if not parsed or len(set(parsed.values())) < len(parsed):
        raise SettingsError(
            f"method {method!r}: rows is {rows!r}; give row names with distinct alphas: "
            "{AN: 1, AN + boost at inference: 5}"
        )
    return parsed


def _check_same_evaluation(trainings: Sequence[Training]) -> None:
    first, *others = trainings
    expected = flatten(first.settings)
    if expected["data.test_split"] is None:
        raise SettingsError("data.test_split is null in the base: set it, since rows are scored on it")
    for training in others:
        for name, value in flatten(training.settings).items():
            if name.startswith(SAME_EVALUATION) and value != expected[name]:
                raise SettingsError(
                    f"methods {first.method!r} and {training.method!r} differ in {name} ({expected[name]!r}, "
                    f"{value!r}) and would not be comparable: set it in the base"
                )


def _check_references(settings: CompareSettings, rows: Mapping[str, Row]) -> None:
    for role in ("baseline_row", "upper_bound_row", "compare_to"):
        name = getattr(settings, role)
        if name is None:
            continue
        if name not in rows:
            raise SettingsError(f"{role} is {name!r}; set it to one of {', '.join(rows)}, or to null")
        if role != "compare_to" and (rows[name].alpha, rows[name].first.settings.boost.train) != ("1", 1):
            raise SettingsError(f"{role} is {name!r}, which is boosted: train and score it with alpha 1")
