"""Preparation on Ray that is killed again and again: its worker, its driver, or all of Ray with both.

As a script: python -m tests.helpers.prepare_kills OUT  prepares the same drawn images each time, as a driver.
"""

import dataclasses
import random
import sys
import time
from pathlib import Path

import psutil

from paml.shards import ShardSettings, write_parts
from tests.helpers.jobs import Job, gone, kill, named
from tests.helpers.kills import OwnRay
from tests.helpers.parts import drawn_parts

IMAGES, PARTS = 1600, 16
SETTINGS = ShardSettings(size=96, samples_per_shard=40)
WORKERS = ("ray::encode_part", "ray::assemble_group")
KINDS = ("worker", "driver", "all")


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill and where the work stood."""

    kind: str
    pieces: int
    shards: int


def driver(out: Path, log: Path, ray: OwnRay) -> Job:
    """Begin, or go on, in a process of its own."""
    return Job([sys.executable, "-m", "tests.helpers.prepare_kills", str(out)], log, env=ray.environment)


def killed(out: Path, ray: OwnRay, kinds: list[str], rng: random.Random) -> list[Kill]:
    """One preparation into `out` that is killed as `kinds` say, until it has finished. Returns the kills that met it.

    The moments are spread over the work: the next kill comes when a share of what is left is done, and a while later.
    """
    kills: list[Kill] = []
    job = driver(out, out.parent / f"{out.name}.0.log", ray)
    try:
        for number, kind in enumerate(kinds):
            target = _done(out) + rng.random() * (1.0 - _done(out)) / (len(kinds) - number)
            while job.process.poll() is None and _done(out) < target:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.4)
            if job.process.poll() is not None:
                break
            kills.append(Kill(kind, len(list(out.glob(".partial/*.piece"))), len(list(out.glob("*.tar")))))
            if kind == "worker":
                found = [process for name in WORKERS for process in named(ray.processes(), name)]
                if found:
                    kill(rng.choice(found))
                else:
                    kills.pop()
                continue
            kill(psutil.Process(job.process.pid))
            job.wait(60)
            if kind == "all":
                ray.kill()
                ray.start()
            else:
                left = [process for name in WORKERS for process in named(ray.processes(), name)]
                assert not gone(left, 60), "workers of a killed driver are left"
            job = driver(out, out.parent / f"{out.name}.{number + 1}.log", ray)
        assert job.wait(300) == 0, job.output
        assert "Traceback" not in job.output
    finally:
        job.end()
    return kills


def _done(out: Path) -> float:
    """Share of the work, 0 to 1: pieces by parts, then shards."""
    if (out / "manifest.arrow").exists():
        return 1.0
    parts = {path.name.split("-")[0] for path in out.glob(".partial/*.piece")}
    return 0.6 * len(parts) / PARTS + 0.4 * len(list(out.glob("*.tar"))) * SETTINGS.samples_per_shard / IMAGES


def main() -> None:
    from paml.distributed import cluster
    from paml.distributed.prepare_ray import RayTasks

    cluster.join()
    tasks = RayTasks(cpus_per_task=1, retries=20)
    parts = drawn_parts(IMAGES, PARTS, size=256)
    print(write_parts(parts, sys.argv[1], SETTINGS, tasks=tasks, piece_bytes=60_000, group_bytes=300_000), flush=True)


if __name__ == "__main__":
    main()
