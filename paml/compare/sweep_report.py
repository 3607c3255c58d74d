"""Reports of a sweep: the table of trials, the note in the tracker, the recipe of the best trial, the plan."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from paml.compare.grid import slug
from paml.compare.space import STATES, Trial, best_trial, count_states, format_value, rank_trials
from paml.compare.study import plot_trials
from paml.compare.sweep import Sweep
from paml.compare.table import format_table
from paml.progress import format_duration
from paml.runs.journal import CHARTS_LINK
from paml.settings import settings_from_values
from paml.spreadsheet import format_csv
from paml.training.settings import TrainSettings

_TRIALS_IN_NOTE = 20


def by_method(sweep: Sweep, trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """Method -> its trials, best first."""
    ranked = rank_trials(trials)
    return {method: [trial for trial in ranked if trial.method == method] for method in sweep.settings.method_names}


def best_by_method(sweep: Sweep, trials: Iterable[Trial]) -> dict[str, Trial]:
    """Method -> its best trial, if any has a score."""
    groups = by_method(sweep, trials)
    return {method: best for method, ranked in groups.items() if (best := best_trial(ranked)) is not None}


def recipe_path(sweep: Sweep, method: str) -> str:
    """Path of the best trial's recipe."""
    return f"{sweep.folder}/best{'-' + slug(method) if method else ''}.yaml"


def report_files(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, bytes]:
    """Name -> content of the tables, the plots and the recipes."""
    first, *others = (sweep.settings.axes(method) for method in sweep.settings.method_names)
    shared = [axis for axis in first if all(axis in other for other in others)]
    files = {"trials.txt": f"{as_text(sweep, trials)}\n".encode(), "trials.csv": as_csv(sweep, trials).encode()}
    files |= plot_trials(shared, trials)
    for method, best in best_by_method(sweep, trials).items():
        path = recipe_path(sweep, method)
        files[path.rpartition("/")[2]] = best_recipe(sweep, best, by_method(sweep, trials)[method], path).encode()
    return files


def _all_axes(sweep: Sweep) -> dict[str, str]:
    """The axes of all methods: description -> name."""
    return {str(axis): axis.name for method in sweep.settings.method_names for axis in sweep.settings.axes(method)}


def as_text(sweep: Sweep, trials: Iterable[Trial]) -> str:
    """The table of trials by method, best first; validation mAP in percent."""
    names = list(dict.fromkeys(_all_axes(sweep).values()))
    rows = [["method", "trial", "val mAP", "epoch", "of", "state", "time", *names]]
    for trial in (trial for ranked in by_method(sweep, trials).values() for trial in ranked):
        score = f"{100 * trial.score:.2f}" if trial.scores else "-"
        cells = [trial.method, str(trial.number), score, str(trial.epoch or "-"), str(len(trial.scores))]
        values = [format_value(trial.point[name]) if name in trial.point else "-" for name in names]
        rows.append([*cells, trial.state, format_duration(trial.seconds), *values])
    return format_table(rows if sweep.settings.methods else [row[1:] for row in rows])


def as_csv(sweep: Sweep, trials: Iterable[Trial]) -> str:
    """The table for programs: scores as fractions, with those of every epoch."""
    names = list(dict.fromkeys(_all_axes(sweep).values()))
    rows: list[list[Any]] = [["method", "trial", "val_mAP", "state", "seconds", *names, "scores", "error"]]
    for trial in rank_trials(trials):
        values = [trial.point.get(name, "") for name in names]
        values = [json.dumps(value) if isinstance(value, list) else value for value in values]
        score, scores = trial.score if trial.scores else "", " ".join(f"{score:.6f}" for score in trial.scores)
        cells = [trial.method, trial.number, score, trial.state, round(trial.seconds, 1)]
        rows.append([*cells, *values, scores, trial.error or ""])
    return format_csv(rows)


def best_recipe(sweep: Sweep, best: Trial, trials: Sequence[Trial], path: str) -> str:
    """The training recipe of the best trial, as YAML with comments; the test split is that of the base recipe.

    path: where the recipe will be stored.
    """
    name = path.rpartition("/")[2].removesuffix(".yaml")
    values = {**sweep.base, **sweep.values(best.method, best.point), "boost.eval_also": []}
    values["run.name"] = f"{sweep.settings.name}-{name}"
    settings_from_values(TrainSettings, values, f"trial {best.number}")
    nested: dict[str, Any] = {}
    for dotted, value in values.items():
        *groups, last = dotted.split(".")
        group = nested
        for key in groups:
            group = group.setdefault(key, {})
        group[last] = value
    head = [
        f"paml train --config {path}",
        f"{best.method + ': the' if best.method else 'The'} best of {len(trials)} trials ({_format_states(trials)}) "
        f"by validation mAP, {sweep.settings.search} search.",
        f"Trial {best.number}: val mAP {100 * best.score:.2f} in epoch {best.epoch} with {format_point(best.point)}.",
        "No trial has opened the test split; this training scores it.",
    ]
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(nested, sort_keys=False, allow_unicode=True)


def _format_states(trials: Iterable[Trial]) -> str:
    return ", ".join(f"{count} {STATES[state]}" for state, count in count_states(trials).items())


def format_point(point: Mapping[str, Any]) -> str:
    """A point on one line."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in point.items())


def as_note(sweep: Sweep, trials: Iterable[Trial], command: str, done: bool) -> str:
    """The description of the sweep's run in the tracker, as Markdown. The UI shows only its first lines by default, so
    the results come first.

    command: what started the sweep. done: whether the recipes exist.
    """
    settings, trials = sweep.settings, list(trials)
    best, states = best_by_method(sweep, trials), _format_states(trials)
    lines = []
    for trial in best.values():
        what, score = f"Best {trial.method}".strip(), f"validation mAP {100 * trial.score:.2f}"
        state = "" if trial.state == "finished" else f", {STATES[trial.state]}"
        point = ", ".join(f"`{name}` {format_value(value)}" for name, value in trial.point.items())
        lines.append(f"**{what}: {score}** in epoch {trial.epoch} of trial {trial.number}{state}, with {point}")
    parts = ["\n".join(lines) or "No trial has a score yet."]
    parts.append(f"**Trials:** {len(trials)} of {len(settings.schedule)}{states and ': '}{states}. {CHARTS_LINK}")
    if done and best:
        commands = "\n".join(f"- `paml train --config {recipe_path(sweep, method)}`" for method in best)
        parts.append(
            f"**Train the best**, which scores the test split (no trial has opened it):\n\n{commands}\n\nThe recipes "
            "are also in the artifacts `recipes/`."
        )
    parts.append(
        f"**Repeat, or continue after a stop:** `{command}`; all settings are in the artifact `settings.yaml`."
    )
    space = "\n".join(f"- `{axis}`" for axis in _all_axes(sweep))
    parts.append(f"**Search:** {settings.search}, early stopping by {settings.scheduler}, over\n\n{space}")
    for trial in (trial for trial in trials if trial.state == "failed"):
        error = " ".join(str(trial.error).split()).replace("`", "'")
        parts.append(f"**Trial {trial.number} failed:** `{error}`")
    if trials:
        shown = rank_trials(trials)[:_TRIALS_IN_NOTE]
        more = f" (best {len(shown)} of {len(trials)}; all in `tables/trials.txt`)" if len(trials) > len(shown) else ""
        parts.append(f"Trials, validation mAP in percent{more}:\n\n```\n{as_text(sweep, shown)}\n```")
    parts.append(
        "**The trials are the child runs of this one.** In the list of runs, sort by `best_val_mAP`, filter by "
        "`tags.trial_state = 'finished'` or by a setting (`params.\"loss.name\" = 'll-r'`), or select some and press "
        "Compare. Plots are in `figures/`."
    )
    return "\n\n".join(parts)


def format_plan(sweep: Sweep, trials: Mapping[int, Trial], epochs: Mapping[str, int]) -> str:
    """What remains to be trained: trials, space and epochs.

    epochs: method -> epochs of a training that is not stopped early.
    """
    settings = sweep.settings
    lowest = highest = due = 0
    for method, num_epochs in epochs.items():
        ended = sum(t.method == method and t.state in ("finished", "stopped") for t in trials.values())
        left, grace = settings.count(method) - ended, min(settings.grace_epochs, num_epochs)
        due, highest = due + left, highest + left * num_epochs
        stopped = 0 if settings.scheduler == "none" else max(0, left - 1)
        lowest += (left - stopped) * num_epochs + stopped * grace
    methods = f" of {len(settings.methods)} methods" if settings.methods else ""
    lines = [
        f"{len(settings.schedule)} trials{methods} by {settings.search} search, {due} to be trained, scheduler "
        f"{settings.scheduler}, in {sweep.folder}",
        *(f"  {axis}" for axis in _all_axes(sweep)),
        f"epochs: {lowest:,} to {highest:,}",
    ]
    return "\n".join(lines)
