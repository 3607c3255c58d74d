"""Random schedules of faults: kind, target and moment."""

import bisect
import dataclasses
import itertools
import random

FORMS = ("plain", "ray", "ray-s3")
"""One process with a disk; two Ray Train workers with a disk; two Ray Train workers with a bucket."""

RANKS = ("rank 0", "rank 1")
RAY_ACTORS = (*RANKS, "controller", "console")

_PLAIN, _RAY, _S3 = ("plain",), ("ray", "ray-s3"), ("ray-s3",)
_SIGNAL_TARGETS = {"plain": ("job",), "ray": ("driver", *RAY_ACTORS), "ray-s3": ("driver", *RAY_ACTORS)}
_WORKER_TARGETS = {"plain": ("job",), "ray": RANKS, "ray-s3": RANKS}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    targets: dict[str, tuple[str, ...]]
    """Possible targets by form."""
    weight: float
    system: bool = True
    """Whether it comes from the operating system, the network or the disk, rather than from the program."""


def _everywhere(*targets: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(FORMS, targets)


KINDS = (
    Kind("SIGKILL", _SIGNAL_TARGETS, 5),
    Kind("SIGKILL of Ray", {"ray": ("raylet", "GCS", "all of Ray"), "ray-s3": ("raylet", "GCS", "all of Ray")}, 0.6),
    Kind("SIGTERM", {"plain": ("job",), "ray": ("driver", *RANKS), "ray-s3": ("driver", *RANKS)}, 3),
    Kind("SIGSTOP, SIGCONT", {**_SIGNAL_TARGETS, "ray": (*_SIGNAL_TARGETS["ray"], "raylet", "GCS")}, 2),
    Kind(
        "SIGSTOP without SIGCONT",
        {"plain": ("job",), "ray": (*RANKS, "controller"), "ray-s3": (*RANKS, "controller")},
        1.5,
    ),
    Kind("out of memory", _WORKER_TARGETS, 2),
    Kind("disk full", {"plain": ("disk",), "ray": ("disk",)}, 2),
    Kind("file size limit", {"plain": ("job",), "ray": ("driver", "rank 0")}, 1),
    Kind("checkpoint damaged", _everywhere("newest checkpoint"), 2),
    Kind("clock jump", {"plain": ("job",)}, 2),
    Kind("network cut", {"ray-s3": ("S3",)}, 4),
    Kind("tracking cut", _everywhere("MLflow"), 1),
    Kind("tracking killed", _everywhere("MLflow"), 0.7),
    Kind("exception", _WORKER_TARGETS, 2.5, system=False),
    Kind("failing allocation", _WORKER_TARGETS, 1.5, system=False),
    Kind("hang in a step", {"ray": RANKS, "ray-s3": RANKS}, 1.2, system=False),
    Kind("hang in the loader", {"ray": RANKS, "ray-s3": RANKS}, 0.8, system=False),
    Kind("deadlocked collective", {"ray": RANKS, "ray-s3": RANKS}, 0.8, system=False),
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault of a schedule."""

    number: int
    kind: str
    target: str
    system: bool
    after_step: int
    """Optimizer steps before it is injected."""
    instant: str
    """`step`: then; `checkpoint`: in the next write of one; `recovery`: in the recovery from the previous fault."""
    delay: float
    """Seconds after that."""
    random_value: float
    """0 to 1, for other random choices."""


def draw_schedule(
    form: str, count: int, seed: int, steps_between: int, without: frozenset[str] = frozenset()
) -> list[Fault]:
    """`count` random faults for a form, by the weights of the kinds, spread over `count * steps_between` steps.

    without: kinds that are not possible on this machine.
    """
    rng = random.Random(f"{form} {seed}")
    kinds = [kind for kind in KINDS if form in kind.targets and kind.name not in without]
    faults = []
    for number, kind in enumerate(_kinds(kinds, count, rng)):
        instant = rng.choices(("step", "checkpoint", "recovery"), (0.6, 0.25, 0.15 if number else 0))[0]
        if kind.name == "SIGSTOP without SIGCONT" and instant == "recovery":
            instant = "step"  # a worker that never starts is given up after six minutes, too long for a test
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
                random_value=round(rng.random(), 4),
            )
        )
    return faults


def _kinds(kinds: list[Kind], count: int, rng: random.Random) -> list[Kind]:
    """Kinds in proportion to their weights, rounded, in random order."""
    ends = list(itertools.accumulate(kind.weight for kind in kinds))
    shift = rng.random()
    drawn = [kinds[bisect.bisect_left(ends, (place + shift) * ends[-1] / count)] for place in range(count)]
    rng.shuffle(drawn)
    return drawn
