"""Whole campaigns: for each form an unbroken training and one under faults, and the report of both."""

import collections
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.schedule import Fault, draw_schedule
from tests.chaos.strike import (
    EVERY,
    FAKETIME,
    STEPS_AN_EPOCH,
    Operator,
    Struck,
    Surroundings,
    Training,
    left_processes,
    lost_steps,
    small_disk,
    verdict,
)
from tests.helpers.jobs import prepare_scenes, write_scenes
from tests.helpers.kills import final_tensors

IMAGES = 200
STEPS_BETWEEN = {"plain": 20, "ray": 40, "ray-s3": 40}
"""On average; workers that begin again are back after half a minute, and the steps of such data take milliseconds."""

SHARE = {"plain": 7, "ray": 2, "ray-s3": 1}
"""Of a campaign's faults: a fault of Ray's workers takes four times as long as one of a single process."""


def split(count: int, forms: Sequence[str]) -> dict[str, int]:
    """How many faults each of these forms gets of `count`, by SHARE; the first takes what does not divide."""
    whole = sum(SHARE[form] for form in forms)
    counts = {form: count * SHARE[form] // whole for form in forms}
    counts[forms[0]] += count - sum(counts.values())
    return counts


@dataclasses.dataclass
class Campaign:
    """What came of it."""

    seed: int
    struck: list[Struck] = dataclasses.field(default_factory=list)
    wrong: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """By form and promise; every list empty where all was kept."""
    seconds: float = 0.0
    epochs: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return not any(self.wrong.values()) and not any(each.stuck for each in self.struck)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return dataclasses.asdict(self) | {"kept": self.kept}


def run_campaign(
    folder: Path,
    counts: Mapping[str, int],
    seed: int,
    say: Callable[[str], None],
    done: Callable[[Campaign], None] = lambda campaign: None,
) -> Campaign:
    """`counts` faults of each form, one after another; `done` is called after each form. Leaves no process behind."""
    begun, campaign = time.monotonic(), Campaign(seed)
    data = prepare_scenes(write_scenes(folder / "scenes", train=IMAGES), folder / "data")
    whole: dict[tuple[int, int], Any] = {}
    with small_disk(folder / "disk") as small, Surroundings(folder) as around:
        possible = {"disk full": small, "clock jump": os.path.exists(FAKETIME)}
        without = frozenset(kind for kind, can in possible.items() if not can)
        if without:
            say(f"left out, for want of a mount or of libfaketime: {', '.join(sorted(without))}")
        for form, count in counts.items():
            faults = draw_schedule(form, count, seed, STEPS_BETWEEN[form], without)
            epochs = max(2, -(-count * STEPS_BETWEEN[form] // STEPS_AN_EPOCH) + 1)
            campaign.epochs[form] = epochs
            shape = (0 if form == "plain" else 2, epochs)
            if shape not in whole:
                whole[shape] = _unbroken(around, "plain" if form == "plain" else "ray", data, epochs, say)
            _one_form(around, form, data, faults, epochs, whole[shape], campaign, say)
            campaign.seconds = time.monotonic() - begun
            done(campaign)
    campaign.wrong["processes left"] = left_processes(str(folder))
    campaign.seconds = time.monotonic() - begun
    return campaign


def _unbroken(around: Surroundings, form: str, data: Path, epochs: int, say: Callable[[str], None]) -> dict:
    training = Training(around, form, data, f"unbroken-{form}-{epochs}", epochs)
    Operator(training, say).run([])
    say(f"{form}: {training.done} steps unbroken, {training.launches} command(s)")
    assert training.launches == 1, training.job and training.job.output[-3000:]
    return final_tensors(training.run_folder)  # pyright: ignore[reportArgumentType]


def _one_form(
    around: Surroundings,
    form: str,
    data: Path,
    faults: list[Fault],
    epochs: int,
    whole: dict,
    campaign: Campaign,
    say: Callable[[str], None],
) -> None:
    training = Training(around, form, data, f"struck-{form}", epochs)
    operator = Operator(training, say)
    try:
        operator.run(faults)
        lost_steps(training, operator.struck)
        for promise, found in verdict(training, whole, IMAGES).items():
            campaign.wrong[f"{form}: {promise}"] = found[:20]
    finally:
        campaign.struck += operator.struck
        if training.job is not None:
            training.job.end()
    too_much = [each for each in operator.struck if each.lost > _allowed(operator.struck, each)]
    campaign.wrong[f"{form}: more lost than a checkpoint's interval"] = [str(each) for each in too_much]


def _allowed(struck: list[Struck], each: Struck) -> int:
    """Steps that may be lost: since the newest checkpoint; where that was damaged and no newer one came before this
    fault struck, since the one before."""
    first = place = struck.index(each)
    while first > 0 and struck[first].fault.instant == "recovery":
        first -= 1
    near = struck[max(0, first - 1) : place + 1]
    return EVERY * (1 + sum(one.fault.kind == "checkpoint damaged" for one in near))


def table(campaign: Campaign) -> str:
    """Markdown: faults by kind, form and target, with the time until the run was further than before."""
    real = [each for each in campaign.struck if not each.missed]
    forms = list(campaign.epochs)
    lines = [
        f"| fault | {' | '.join(forms)} | targets | recovery: median s | worst s | steps lost | commands again |",
        f"|---|{'---:|' * len(forms)}---|---:|---:|---:|---:|",
    ]
    for kind in dict.fromkeys(each.fault.kind for each in sorted(real, key=lambda each: not each.fault.system)):
        of = [each for each in real if each.fault.kind == kind]
        by_form = collections.Counter(each.form for each in of)
        targets = collections.Counter(each.fault.target for each in of)
        seconds = [each.seconds for each in of if each.seconds is not None]
        lines.append(
            f"| {kind} | {' | '.join(str(by_form[form]) for form in forms)} | "
            f"{', '.join(f'{name} {count}' for name, count in targets.most_common())} | "
            + (f"{statistics.median(seconds):.1f} | {max(seconds):.1f} | " if seconds else "– | – | ")
            + f"{max(each.lost for each in of)} | {sum(each.commands for each in of)} |"
        )
    seconds = [each.seconds for each in real if each.seconds is not None]
    by_form = collections.Counter(each.form for each in real)
    lines.append(
        f"| **all** | {' | '.join(str(by_form[form]) for form in forms)} | {len(real)} | "
        + (f"{statistics.median(seconds):.1f} | {max(seconds):.1f} | " if seconds else "– | – | ")
        + f"{max((each.lost for each in real), default=0)} | {sum(each.commands for each in real)} |"
    )
    return "\n".join(lines)


def report(campaign: Campaign) -> str:
    """The report in Markdown."""
    real = [each for each in campaign.struck if not each.missed]
    instants = collections.Counter(each.fault.instant for each in real)
    system = sum(each.fault.system for each in real) / max(1, len(real))
    verdicts = [
        f"- {promise}: {'; '.join(found) if found else 'none'}" for promise, found in sorted(campaign.wrong.items())
    ]
    stuck = [f"- {each}" for each in campaign.struck if each.stuck]
    return "\n".join(
        [
            f"seed {campaign.seed}, {len(real)} faults ({100 * system:.0f} % the operating system's; "
            f"{len(campaign.struck) - len(real)} more found no process), {campaign.seconds / 60:.0f} minutes; "
            + ", ".join(f"{form} {epochs} epochs" for form, epochs in campaign.epochs.items()),
            "",
            table(campaign),
            "",
            f"Instants: {instants['step']} at a step, {instants['checkpoint']} in the write of a checkpoint, "
            f"{instants['recovery']} while the one before was recovered from (that recovery then counts once).",
            "",
            *verdicts,
            *(["", "Runs that did not go on:", *stuck] if stuck else []),
        ]
    )


def save(campaign: Campaign, path: Path) -> None:
    """The report beside all of it as JSON."""
    path.write_text(report(campaign) + "\n")
    path.with_suffix(".json").write_text(json.dumps(campaign.to_json(), indent=1) + "\n")
