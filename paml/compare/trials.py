"""The trials of a sweep: what each one tries, how it ended, the table of all and the recipe of the best.

A sweep's folder holds one small file a trial, written whole or not at all and by the driver alone. With the trials' own
checkpoints it is all that a sweep needs to go on after any kill.
"""

import dataclasses
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from paml import storage
from paml.compare.grid import Training, base_settings, grid_folder, read_training, training
from paml.compare.halving import history_in, recipe_text
from paml.compare.progress import spoken
from paml.compare.settings import SweepSettings
from paml.compare.space import Axis, Known, grid_points, optuna_point, random_points
from paml.errors import SettingsError
from paml.reading import read_facts, reading
from paml.spreadsheet import ReportWriter
from paml.tracking.journal import CHARTS_LINK

SCHEMA_VERSION = 1
NAN = math.nan
_IN_NOTE = 20
STATES = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "running": "under way"}
"""How a trial may stand, and what a sentence calls it."""
MAY_DIFFER = ("trials", "at_once", "cpus_per_run", "max_failures", "address", "mlflow", "plan", "storage", "experiment")
"""Settings that a sweep which goes on may change."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One point of the space and what came of it."""

    number: int
    """From 1."""
    point: dict[str, Any]
    """Name of an axis -> its value."""
    state: Literal["running", "finished", "stopped", "failed"]
    scores: tuple[float, ...] = ()
    """Validation mAP of its epochs, those of the head alone left out; -1 where it was no number."""
    seconds: float = 0.0
    """Of its starts that came to an end; what a killed one took is not known."""
    error: str | None = None
    lasting: bool = False
    """Whether its error would come again, so that the sweep does not start it again."""

    @property
    def score(self) -> float:
        """Of the best epoch; NaN where there is none."""
        return max(self.scores, default=NAN)

    @property
    def epoch(self) -> int:
        """The best epoch, from 1; 0 where there is none."""
        return self.scores.index(self.score) + 1 if self.scores else 0


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep's settings, read once and complete, so that any process can make a trial's settings of them."""

    settings: SweepSettings
    base: dict[str, Any]
    """The base recipe and the common settings, by dotted name."""
    origin: str
    """Where relative paths begin."""

    @property
    def folder(self) -> str:
        """Of the records, the table, the pictures and the recipe."""
        return grid_folder(self.settings, self.settings.name, self.origin)

    @property
    def axes(self) -> list[Axis]:
        """Of the space."""
        return self.settings.axes

    def values(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """What a point sets, by dotted name."""
        values = {name: value for axis in self.axes for name, value in axis.settings(point[axis.name]).items()}
        if "boost.train" in values and "boost.eval" not in values:
            values["boost.eval"] = values["boost.train"]
        return values

    def training(self, number: int, point: Mapping[str, Any]) -> Training:
        """A trial's training. It cannot open the test split. Raises SettingsError where the values do not fit."""
        name = f"{self.settings.name}-{number:04d}"
        flat = {**self.base, **self.values(point), "boost.eval_also": []}
        return training(self.settings, name, f"trial {number}", flat, self.origin, searched=True)

    def run_folder(self, number: int) -> str:
        """Of a trial's training."""
        root = self.folder.rpartition("/")[0]
        return storage.join(root, f"{self.settings.name}-{number:04d}")


def plan_sweep(settings: SweepSettings, origin: str) -> Sweep:
    """Read the base recipe and try every end of every axis; relative paths of data and storage begin at `origin`.

    Raises SettingsError, before anything is trained, for a recipe that cannot be read and for values that a training
    refuses.
    """
    base = base_settings(settings)
    sweep = Sweep(settings, base, origin)
    plain = {**base, "boost.eval_also": [], "data.test_split": None}
    read_training(plain, "base")
    for axis in settings.axes:
        for value in axis.ends:
            read_training({**plain, **axis.settings(value)}, f"space: {axis.name!r}")
    return sweep


def claim_sweep(sweep: Sweep) -> None:
    """Note what the sweep is, or refuse to go on with one that is another.

    Raises SettingsError that names what differs; `MAY_DIFFER` may.
    """
    path = storage.join(sweep.folder, "sweep.json")
    facts = {name: value for name, value in dataclasses.asdict(sweep.settings).items() if name not in MAY_DIFFER}
    facts |= {"base": sweep.base, "common": {}, "schema_version": SCHEMA_VERSION}
    facts["space"] = list(sweep.settings.space.items())  # in order, which decides what is drawn
    facts = json.loads(json.dumps(facts))
    storage.ensure_writable(sweep.folder)
    try:
        storage.write_bytes(path, json.dumps(facts, indent=1).encode(), if_absent=True)
        return
    except FileExistsError:
        then = read_facts(path, "give the sweep another name")
    differing = [
        f"{name}: {then.get(name)!r} then, {facts.get(name)!r} now"
        for name in sorted(then.keys() | facts.keys())
        if name != "base" and then.get(name) != facts.get(name)
    ]
    with reading(path, "give the sweep another name"):
        bases = dict(then.get("base", {}))
    differing += [
        f"{name} of the base: {bases.get(name)!r} then, {facts['base'].get(name)!r} now"
        for name in sorted(bases.keys() | facts["base"].keys())
        if bases.get(name) != facts["base"].get(name)
    ]
    if differing:
        raise SettingsError(
            f"{sweep.folder} holds a sweep of other settings: {'; '.join(differing)}. Give the new one another name; "
            f"to go on with the old one only {', '.join(MAY_DIFFER)} may differ"
        )


def write_trial(sweep: Sweep, trial: Trial) -> None:
    """Note how a trial stands, in the place of what was noted before."""
    facts = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(trial)}
    path = storage.join(sweep.folder, "trials", f"{trial.number:04d}.json")
    storage.write_bytes(path, json.dumps(facts).encode())


def read_trial(sweep: Sweep, number: int) -> Trial:
    """What was noted of a trial."""
    path, mend = storage.join(sweep.folder, "trials", f"{number:04d}.json"), "remove it: the trial is begun anew"
    facts = read_facts(path, mend)
    with reading(path, mend):
        if facts.pop("schema_version") != SCHEMA_VERSION:
            raise SettingsError(
                f"{sweep.folder} was written by another paml: go on with that one, or give another name"
            )
        trial = Trial(**{**facts, "scores": tuple(float(score) for score in facts["scores"])})
        if trial.number != number or trial.point.keys() != {axis.name for axis in sweep.axes}:
            raise ValueError(f"it is of trial {trial.number!r}, or of another space")
        return trial


def read_trials(sweep: Sweep) -> dict[int, Trial]:
    """All trials begun so far, by number. One that its process brought to the end counts as finished, noted or not."""
    files = storage.list_files(storage.join(sweep.folder, "trials"))
    found = {}
    for number in sorted(int(name[:-5]) for name in files if re.fullmatch(r"\d{4,9}\.json", name, re.ASCII)):
        trial = read_trial(sweep, number)
        if trial.state == "running" and is_whole(sweep, number):
            trial = dataclasses.replace(trial, state="finished", scores=scores_in(sweep.run_folder(number)))
        found[number] = trial
    return found


def is_whole(sweep: Sweep, number: int) -> bool:
    """Whether a trial's training has come to its end."""
    return storage.exists(storage.join(sweep.run_folder(number), "result.json"))


def scores_in(run_folder: str) -> tuple[float, ...]:
    """Validation mAP of a run's epochs so far, by its newest checkpoint."""
    return tuple(map(score_of, (one for one in history_in(run_folder) if not is_of_head(one))))


def is_of_head(figures: Mapping[str, float]) -> bool:
    """Whether an epoch has trained the head alone, which tells nothing of most settings."""
    return bool(figures.get("train/head_only", 0))


def score_of(figures: Mapping[str, float]) -> float:
    """An epoch's validation mAP; -1 where it is no number, so that it counts as worst."""
    value = figures["val/map"]
    return value if value == value else -1.0


def next_point(sweep: Sweep, number: int, trials: Mapping[int, Trial]) -> dict[str, Any] | None:
    """What trial `number` tries; None where the space has no more. `trials`: all that were begun."""
    settings = sweep.settings
    if settings.search == "grid":
        points = grid_points(sweep.axes, settings.count, settings.seed)
        return points[number - 1] if number <= len(points) else None
    if settings.search == "random":
        return next(itertools.islice(random_points(sweep.axes, settings.seed), number - 1, None), None)
    known = [Known(trial.point, trial.state, trial.scores) for trial in trials.values()]
    return optuna_point(sweep.axes, number, settings.seed, known)


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """The best of those trained to their end; where there are none, of all that have a score."""
    scored = [trial for trial in trials if trial.scores]
    whole = [trial for trial in scored if trial.state == "finished"]
    return max(whole or scored, key=lambda trial: (trial.score, -trial.number), default=None)


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The best first, those without a score last."""
    return sorted(trials, key=lambda trial: (-trial.score if trial.scores else math.inf, trial.number))


def as_text(sweep: Sweep, trials: Iterable[Trial]) -> str:
    """The table of trials, the best first; validation mAP in percent."""
    names = [axis.name for axis in sweep.axes]
    rows = [["trial", "val mAP", "epoch", "of", "state", "time", *names]]
    for trial in ranked(trials):
        score = f"{100 * trial.score:.2f}" if trial.scores else "-"
        cells = [str(trial.number), score, str(trial.epoch or "-"), str(len(trial.scores)), trial.state]
        rows.append([*cells, spoken(trial.seconds), *(shown(trial.point[name]) for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def as_csv(sweep: Sweep, trials: Iterable[Trial]) -> str:
    """The same for programs; validation mAP is a fraction, `scores` those of all epochs."""
    out = io.StringIO()
    writer = ReportWriter(out)
    names = [axis.name for axis in sweep.axes]
    writer.writerow(["trial", "val_map", "epoch", "epochs", "state", "seconds", *names, "scores", "error"])
    for trial in ranked(trials):
        cells = [trial.number, trial.score if trial.scores else "", trial.epoch or "", len(trial.scores), trial.state]
        values = [json.dumps(value) if isinstance(value, list) else value for value in (trial.point[n] for n in names)]
        scores = " ".join(f"{score:.6f}" for score in trial.scores)
        writer.writerow([*cells, round(trial.seconds, 1), *values, scores, trial.error or ""])
    return out.getvalue()


def shown(value: Any) -> str:
    """A value of an axis in a table or a picture."""
    if isinstance(value, (list, tuple)):
        return "/".join(shown(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def best_recipe(sweep: Sweep, best: Trial, trials: Sequence[Trial], path: str) -> str:
    """The best trial as YAML for the training job, the test split as in the base. path: where it will lie."""
    flat = {**sweep.base, **sweep.values(best.point), "boost.eval_also": [], "run.name": f"{sweep.settings.name}-best"}
    read_training(flat, f"trial {best.number}")
    ends = ", ".join(f"{count} {state}" for state, count in counted(trials).items())
    opening = [
        f"python jobs/train_openimages.py --config {path}",
        f"The best of {len(trials)} trials ({ends}) by validation mAP, searched by {sweep.settings.search}:",
        f"val mAP {100 * best.score:.2f} in epoch {best.epoch} with {said_point(best.point)} (trial {best.number}).",
        "The test split was not looked at; this training scores it, once.",
    ]
    return recipe_text(flat, opening)


def counted(trials: Iterable[Trial]) -> dict[str, int]:
    """State -> how many, those of none left out."""
    states = [trial.state for trial in trials]
    return {state: states.count(state) for state in STATES if state in states}


def as_note(sweep: Sweep, trials: Iterable[Trial], command: str, recipe: str | None) -> str:
    """What stands at the head of the sweep's page, in Markdown: the best, how many ended and how, what was searched,
    how to repeat it. The page shows some lines of it before a click, so that the outcome comes first.

    command: that began it. recipe: where the best one lies, None while the sweep goes on.
    """
    settings, trials = sweep.settings, list(trials)
    best, failed = best_trial(trials), [trial for trial in trials if trial.state == "failed"]
    counts = ", ".join(f"{count} {STATES[state]}" for state, count in counted(trials).items())
    parts = ["No trial has a score yet." if best is None else f"**Best: validation mAP {_said_best(sweep, best)}"]
    parts.append(f"**Trials:** {len(trials)} of {settings.count}{': ' if counts else ''}{counts}. {CHARTS_LINK}")
    if recipe is not None:
        parts.append(
            f"**Train the best:** `python jobs/train_openimages.py --config {recipe}`; it scores the test split, which "
            "no trial has opened. The recipe is also the artifact `recipes/best.yaml`."
        )
    parts.append(f"**Repeat, or go on after a stop:** `{command}`; every setting is in the artifact `settings.yaml`.")
    axes = "\n".join(f"- `{axis}`" for axis in sweep.axes)
    parts.append(f"**Searched** by {settings.search}, stopped early by {settings.scheduler}, over\n\n{axes}")
    parts += [f"**Trial {trial.number} failed:** {_plain(trial.error or '')}" for trial in failed]
    if trials:
        shown_here = ranked(trials)[:_IN_NOTE]
        more = f" (the best {_IN_NOTE} of {len(trials)}, all in `tables/trials.txt`)" if len(trials) > _IN_NOTE else ""
        parts.append(f"Trials, validation mAP in percent{more}:\n\n```\n{as_text(sweep, shown_here)}\n```")
    parts.append(
        "**The trials are the runs below this one.** In the experiment's list sort them by `best_val_map`, filter them "
        "by `tags.trial_state = 'finished'` or by a setting (`params.\"loss.name\" = 'll-r'`), or tick some and "
        "press Compare. Pictures are in `figures/`."
    )
    return "\n\n".join(parts)


def said_point(point: Mapping[str, Any]) -> str:
    """What a trial tries, on one line."""
    return ", ".join(f"{name} {shown(value)}" for name, value in point.items())


def _said_best(sweep: Sweep, best: Trial) -> str:
    point = ", ".join(f"`{name}` {shown(value)}" for name, value in best.point.items())
    early = "" if best.state == "finished" else f", {STATES[best.state]}"
    return f"{100 * best.score:.2f}** in epoch {best.epoch} of trial {best.number}{early}, with {point}"


def _plain(text: str) -> str:
    """A line that Markdown shows as it is."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def said_plan(sweep: Sweep, trials: Mapping[int, Trial], epochs: int) -> str:
    """What a sweep would train: trials, space, and a budget in epochs, in hours where trials have told theirs.

    epochs: of a whole training.
    """
    settings = sweep.settings
    due = settings.count - sum(trial.state in ("finished", "stopped") for trial in trials.values())
    first = min(settings.first_epochs, epochs)
    least = due * epochs if settings.scheduler == "none" else min(due, 1) * epochs + max(0, due - 1) * first
    lines = [
        f"{settings.count} trials by {settings.search} search, {due} to be trained, scheduler {settings.scheduler}, "
        f"in {sweep.folder}",
        *(f"  {axis}" for axis in sweep.axes),
        f"epochs: {least:,} to {due * epochs:,}",
    ]
    timed = [trial for trial in trials.values() if trial.scores and trial.seconds]
    if timed:
        each = sum(trial.seconds for trial in timed) / sum(len(trial.scores) for trial in timed)
        lines.append(
            f"hours of one trial at a time, by {len(timed)} trials so far: {each * least / 3600:.1f} to "
            f"{each * due * epochs / 3600:.1f}"
        )
    return "\n".join(lines)
