"""Which faults strike, whom and when: drawn from a seed beforehand."""

import bisect
import dataclasses
import itertools
import random

FORMS = ("plain", "ray", "ray-s3")
"""One process and a disk; two Ray Train workers and a disk; two Ray Train workers and a bucket."""

RANKS = ("rank 0", "rank 1")
RAY_ACTORS = (*RANKS, "controller", "console")

# kind: (of the operating system, forms, targets by form, weight)
_PLAIN, _RAY, _S3 = ("plain",), ("ray", "ray-s3"), ("ray-s3",)
_SIGNALLED = {"plain": ("job",), "ray": ("driver", *RAY_ACTORS), "ray-s3": ("driver", *RAY_ACTORS)}
_TRAINS = {"plain": ("job",), "ray": RANKS, "ray-s3": RANKS}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    targets: dict[str, tuple[str, ...]]
    """By form."""
    weight: float
    system: bool = True
    """Whether it comes from the operating system, the network or the disk, not from the program."""


def _everywhere(*targets: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(FORMS, targets)


KINDS = (
    Kind("SIGKILL", _SIGNALLED, 5),
    Kind("SIGKILL of Ray", {"ray": ("raylet", "GCS", "all of Ray"), "ray-s3": ("raylet", "GCS", "all of Ray")}, 0.6),
    Kind("SIGTERM", {"plain": ("job",), "ray": ("driver", *RANKS), "ray-s3": ("driver", *RANKS)}, 3),
    Kind("SIGSTOP, SIGCONT", {**_SIGNALLED, "ray": (*_SIGNALLED["ray"], "raylet", "GCS")}, 2),
    Kind("SIGSTOP for ever", {"plain": ("job",), "ray": (*RANKS, "controller"), "ray-s3": (*RANKS, "controller")}, 1.5),
    Kind("out of memory", _TRAINS, 2),
    Kind("disk full", {"plain": ("disk",), "ray": ("disk",)}, 2),
    Kind("file size limit", {"plain": ("job",), "ray": ("driver", "rank 0")}, 1),
    Kind("checkpoint damaged", _everywhere("newest checkpoint"), 2),
    Kind("clock jump", {"plain": ("job",)}, 2),
    Kind("network cut", {"ray-s3": ("S3",)}, 4),
    Kind("tracking cut", _everywhere("MLflow"), 1),
    Kind("tracking killed", _everywhere("MLflow"), 0.7),
    Kind("exception", _TRAINS, 2.5, system=False),
    Kind("failing allocation", _TRAINS, 1.5, system=False),
    Kind("hang in a step", {"ray": RANKS, "ray-s3": RANKS}, 1.2, system=False),
    Kind("hang in the loader", {"ray": RANKS, "ray-s3": RANKS}, 0.8, system=False),
    Kind("dead-locked collective", {"ray": RANKS, "ray-s3": RANKS}, 0.8, system=False),
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault of a schedule."""

    number: int
    kind: str
    target: str
    system: bool
    after_step: int
    """Strikes once so many steps of the optimiser are done."""
    instant: str
    """`step`: then; `checkpoint`: in the next write of one; `recovery`: while the one before is recovered from."""
    delay: float
    """Seconds after that."""
    draw: float
    """0 to 1, for what else is to be chosen."""


def draw_schedule(
    form: str, count: int, seed: int, steps_between: int, without: frozenset[str] = frozenset()
) -> list[Fault]:
    """`count` faults of a form, by kind as their weights say, spread over `count * steps_between` steps.

    without: kinds that are not possible here.
    """
    rng = random.Random(f"{form} {seed}")
    kinds = [kind for kind in KINDS if form in kind.targets and kind.name not in without]
    faults = []
    for number, kind in enumerate(_kinds(kinds, count, rng)):
        instant = rng.choices(("step", "checkpoint", "recovery"), (0.6, 0.25, 0.15 if number else 0))[0]
        if kind.name == "SIGSTOP for ever" and instant == "recovery":
            instant = "step"  # a worker that never starts is given up after six minutes: true, and too long for here
        delay = {"step": 0.15, "checkpoint": 0.02, "recovery": 9.0}[instant] * rng.random()
        faults.append(
            Fault(
                number=number,
                kind=kind.name,
                target=rng.choice(kind.targets[form]),
                system=kind.system,
                after_step=1 + int(steps_between * (number + rng.random())),
                instant=instant,
                delay=round(delay, 4),
                draw=round(rng.random(), 4),
            )
        )
    return faults


def _kinds(kinds: list[Kind], count: int, rng: random.Random) -> list[Kind]:
    """As often as their weights say, up to one more or less, in random order: few faults are of many kinds too."""
    ends = list(itertools.accumulate(kind.weight for kind in kinds))
    shift = rng.random()
    drawn = [kinds[bisect.bisect_left(ends, (place + shift) * ends[-1] / count)] for place in range(count)]
    rng.shuffle(drawn)
    return drawn
