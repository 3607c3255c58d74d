"""Campaigns of faults: for each form an uninterrupted training and one under faults, and a report."""

import collections
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.checks import lost_steps, problems_of, remaining_processes
from tests.chaos.faulty_run import (
    CHECKPOINT_STEPS,
    FAKETIME,
    STEPS_PER_EPOCH,
    FaultInjector,
    InjectedFault,
    Services,
    Training,
    mounted_disk,
)
from tests.chaos.schedule import Fault, draw_schedule
from tests.helpers.jobs import prepare_scenes, write_scenes
from tests.helpers.kills import final_tensors

IMAGES = 200
STEPS_BETWEEN = {"plain": 20, "ray": 40, "ray-s3": 40}
"""Steps between faults, on average. Workers need half a minute to restart, and a step takes milliseconds."""

WEIGHT = {"plain": 7, "ray": 2, "ray-s3": 1}
"""Relative number of faults: one in Ray workers takes four times as long as one in a single process."""


def split(count: int, forms: Sequence[str]) -> dict[str, int]:
    """Divide `count` faults among forms by WEIGHT; the first gets the remainder."""
    total = sum(WEIGHT[form] for form in forms)
    counts = {form: count * WEIGHT[form] // total for form in forms}
    counts[forms[0]] += count - sum(counts.values())
    return counts


@dataclasses.dataclass
class Campaign:
    """The outcome of a campaign."""

    seed: int
    injected: list[InjectedFault] = dataclasses.field(default_factory=list)
    problems: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Violations by form and guarantee."""
    seconds: float = 0.0
    epochs: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether there was no violation."""
        return not any(self.problems.values()) and not any(each.stuck for each in self.injected)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return dataclasses.asdict(self) | {"passed": self.passed}


def run_campaign(
    folder: Path,
    counts: Mapping[str, int],
    seed: int,
    log: Callable[[str], None],
    done: Callable[[Campaign], None] = lambda campaign: None,
) -> Campaign:
    """Inject `counts` faults into a training of each form. `done` is called after each form."""
    start, campaign = time.monotonic(), Campaign(seed)
    data = prepare_scenes(write_scenes(folder / "scenes", train=IMAGES), folder / "data")
    expected: dict[tuple[int, int], Any] = {}
    with mounted_disk(folder / "disk") as small, Services(folder) as services:
        possible = {"disk full": small, "clock jump": os.path.exists(FAKETIME)}
        without = frozenset(kind for kind, can in possible.items() if not can)
        if without:
            log(f"not possible here (no mount or no libfaketime): {', '.join(sorted(without))}")
        for form, count in counts.items():
            faults = draw_schedule(form, count, seed, STEPS_BETWEEN[form], without)
            epochs = max(2, -(-count * STEPS_BETWEEN[form] // STEPS_PER_EPOCH) + 1)
            campaign.epochs[form] = epochs
            shape = (0 if form == "plain" else 2, epochs)
            if shape not in expected:
                expected[shape] = _uninterrupted(services, "plain" if form == "plain" else "ray", data, epochs, log)
            _run_form(services, form, data, faults, epochs, expected[shape], campaign, log)
            campaign.seconds = time.monotonic() - start
            done(campaign)
    campaign.problems["remaining processes"] = remaining_processes(str(folder))
    campaign.seconds = time.monotonic() - start
    return campaign


def _uninterrupted(services: Services, form: str, data: Path, epochs: int, log: Callable[[str], None]) -> dict:
    training = Training(services, form, data, f"uninterrupted-{form}-{epochs}", epochs)
    FaultInjector(training, log).run([])
    log(f"{form}: {training.done} steps without faults, {training.launches} command(s)")
    assert training.launches == 1, training.job and training.job.output[-3000:]
    return final_tensors(training.run_folder)  # pyright: ignore[reportArgumentType]


def _run_form(
    services: Services,
    form: str,
    data: Path,
    faults: list[Fault],
    epochs: int,
    expected: dict,
    campaign: Campaign,
    log: Callable[[str], None],
) -> None:
    training = Training(services, form, data, f"faulty-{form}", epochs)
    operator = FaultInjector(training, log)
    try:
        operator.run(faults)
        lost_steps(training, operator.injected)
        for guarantee, found in problems_of(training, expected, IMAGES).items():
            campaign.problems[f"{form}: {guarantee}"] = found[:20]
    finally:
        campaign.injected += operator.injected
        if training.job is not None:
            training.job.end()
    too_much = [each for each in operator.injected if each.lost > _allowed(operator.injected, each)]
    campaign.problems[f"{form}: more steps lost than a checkpoint interval"] = [str(each) for each in too_much]


def _allowed(injected: list[InjectedFault], each: InjectedFault) -> int:
    """Steps that may be lost: those since the newest intact checkpoint."""
    first = place = injected.index(each)
    while first > 0 and injected[first].fault.instant == "recovery":
        first -= 1
    near = injected[max(0, first - 1) : place + 1]
    return CHECKPOINT_STEPS * (1 + sum(one.fault.kind == "checkpoint damaged" for one in near))


def table(campaign: Campaign) -> str:
    """A Markdown table of faults by kind, form and target, with the time until the run was further than before."""
    real = [each for each in campaign.injected if not each.no_target]
    forms = list(campaign.epochs)
    lines = [
        f"| fault | {' | '.join(forms)} | targets | recovery: median s | worst s | steps lost | command repeated |",
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
    real = [each for each in campaign.injected if not each.no_target]
    instants = collections.Counter(each.fault.instant for each in real)
    system = sum(each.fault.system for each in real) / max(1, len(real))
    verdicts = [
        f"- {guarantee}: {'; '.join(found) if found else 'none'}"
        for guarantee, found in sorted(campaign.problems.items())
    ]
    stuck = [f"- {each}" for each in campaign.injected if each.stuck]
    return "\n".join(
        [
            f"seed {campaign.seed}, {len(real)} faults ({100 * system:.0f} % of the operating system; "
            f"{len(campaign.injected) - len(real)} more without a target), {campaign.seconds / 60:.0f} minutes; "
            + ", ".join(f"{form} {epochs} epochs" for form, epochs in campaign.epochs.items()),
            "",
            table(campaign),
            "",
            f"Instants: {instants['step']} at a step, {instants['checkpoint']} during the write of a checkpoint, "
            f"{instants['recovery']} during the recovery from the previous fault (counted once).",
            "",
            *verdicts,
            *(["", "Runs that did not recover:", *stuck] if stuck else []),
        ]
    )


def save(campaign: Campaign, path: Path) -> None:
    """Write the report, and all of the campaign as JSON next to it."""
    path.write_text(report(campaign) + "\n")
    path.with_suffix(".json").write_text(json.dumps(campaign.to_json(), indent=1) + "\n")
