"""Successive halving: many configurations for few epochs, the better ones for more, one to the end."""

import dataclasses
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from paml.compare.grid import Training, base_settings, read_training, slug, training
from paml.compare.settings import SearchSettings
from paml.errors import CheckpointError, SettingsError
from paml.reading import reading
from paml.training.checkpoint import committed, read_checkpoint
from paml.training.loop import run_folder_of


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One configuration of a method."""

    method: str
    values: dict[str, Any]
    """What it sets by dotted name, on top of base and method."""
    training: Training


@dataclasses.dataclass(frozen=True)
class Rung:
    """Candidates that are to be trained up to an epoch, and how many of each method go on."""

    epochs: int
    kept: int


def rungs(configurations: int, epochs: int, first: int, eta: int, head_epochs: int = 0) -> list[Rung]:
    """The rungs of a search; the last one is the whole training, and keeps one.

    head_epochs: of the head alone, which come before the `epochs` and tell nothing of most settings.
    """
    found, left, upto = [], configurations, first
    while upto < epochs and left > 1:
        left = -(-left // eta)
        found.append(Rung(head_epochs + upto, left))
        upto *= eta
    return [*found, Rung(head_epochs + epochs, 1)]


def draw(space: Mapping[str, Sequence[Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """At most `count` different configurations of a space, by dotted name: all of it where it holds no more.

    Raises SettingsError for a value that does not fit its names.
    """
    axes = [[_together(names, value) for value in values] for names, values in space.items()]
    whole = [{name: v for part in parts for name, v in part.items()} for parts in itertools.product(*axes)]
    if len(whole) <= count:
        return whole
    return [whole[place] for place in sorted(random.Random(seed).sample(range(len(whole)), count))]


def candidates(settings: SearchSettings, folder: str) -> dict[str, list[Candidate]]:
    """Method -> its configurations. None of them can open the test split. Raises SettingsError as a grid does."""
    base = base_settings(settings)
    found: dict[str, list[Candidate]] = {}
    folders: set[str] = set()
    for method, given in settings.methods.items():
        own = dict(given)
        space = settings.space | (own.pop("space", None) or {})
        found[method] = []
        for values in draw(space, settings.configurations, settings.seed):
            said = [f"{name.rsplit('.', 1)[0][:1]}.{name.rsplit('.', 1)[-1]}={value}" for name, value in values.items()]
            name = slug("-".join([method, *said]))[:200]
            if name in folders:
                raise SettingsError(f"two configurations would both lie in {name}: rename method {method!r}")
            folders.add(name)
            all_values = _scored_as_trained(base, own, values)
            found[method].append(
                Candidate(method, values, training(settings, name, method, all_values, folder, searched=True))
            )
        lengths = [(each.training.settings.epochs, each.training.settings.linear_init.epochs) for each in found[method]]
        if len(set(lengths)) > 1:
            raise SettingsError(
                f"method {method!r}: its configurations differ in epochs or linear_init.epochs, but the rungs of a "
                "search are of trainings of one length: take these out of space, or make two methods of them"
            )
    return found


def history_of(candidate: Candidate) -> list[dict[str, float]]:
    """Figures of the epochs that a candidate has behind it, by its newest checkpoint."""
    return history_in(run_folder_of(candidate.training.settings))


def history_in(folder: str) -> list[dict[str, float]]:
    """Figures of the epochs that a run has behind it, by its newest checkpoint; none where it has none."""
    for name in reversed(committed(folder)):
        try:
            facts = read_checkpoint(folder, name, groups=()).facts
            with reading(f"{folder}/checkpoints/{name}", "remove it", CheckpointError):
                return [dict(figures) for figures in facts["history"]]
        except CheckpointError:
            continue
    return []


def best_of(history: Sequence[Mapping[str, float]], epochs: int) -> tuple[float, int]:
    """Best validation mAP within the first `epochs`, whatever came later, and its epoch; NaN counts as worst.

    As in a run, the best is an epoch trained end to end, none of the head alone.
    """
    whole = [figures for figures in history[:epochs] if not figures.get("train/head_only", 0)]
    scored = [(figures["val/map"], -int(figures["epoch"])) for figures in whole]
    value, epoch = max((one for one in scored if one[0] == one[0]), default=(-1.0, 0))
    return value, -epoch


def recipe_of(settings: SearchSettings, method: str, values: Mapping[str, Any], opening: Sequence[str]) -> str:
    """The frozen recipe as YAML for the training job: base, method and configuration, the test split as in the base.

    opening: lines of comment at its head.
    """
    own = {name: value for name, value in settings.methods[method].items() if name != "space"}
    flat = _scored_as_trained(base_settings(settings), own, values) | {"run.name": f"{slug(method)}-best"}
    read_training(flat, f"method {method!r}")
    return recipe_text(flat, opening)


def recipe_text(flat: Mapping[str, Any], opening: Sequence[str]) -> str:
    """Settings by dotted name as the YAML of a recipe. opening: lines of comment at its head."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    head = "".join(f"# {line}\n" for line in opening)
    return head + yaml.safe_dump(nested, sort_keys=False, allow_unicode=True)


def _scored_as_trained(base: Mapping[str, Any], own: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """All settings; without a word on boost.eval, scored with the alpha of training and no other."""
    found = {**base, **own, **values, "boost.eval_also": []}
    if "boost.eval" not in {**own, **values} and "boost.train" in found:
        found["boost.eval"] = found["boost.train"]
    return found


def _together(names: str, value: Any) -> dict[str, Any]:
    """Values of names that are joined by commas."""
    parts = re.split(r"\s*,\s*", names.strip())
    if len(parts) > 1 and isinstance(value, (list, tuple)):
        if len(value) != len(parts):
            raise SettingsError(f"space: {names!r} names {len(parts)} settings, {value!r} has {len(value)} values")
        return dict(zip(parts, value, strict=True))
    return dict.fromkeys(parts, value)
