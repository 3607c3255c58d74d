"""Preparation on Ray that is killed repeatedly: a worker, the driver, or all of Ray.

`python -m tests.helpers.prepare_kills OUT` is the driver; it prepares the same generated images each time.
"""

import dataclasses
import random
import sys
import time
from pathlib import Path

import psutil

from paml.shards import ShardSettings, write_parts
from tests.helpers.jobs import Job, kill, processes_named, survivors
from tests.helpers.kills import OwnRay
from tests.helpers.parts import generated_parts

IMAGES, PARTS = 1600, 16
SETTINGS = ShardSettings(size=96, samples_per_shard=40)
WORKERS = ("ray::encode_part", "ray::assemble_group")
KINDS = ("worker", "driver", "all")


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Content of every file in a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclasses.dataclass(frozen=True)
class Kill:
    """A kill and the progress at that moment."""

    kind: str
    spills: int
    shards: int


def driver(out: Path, log: Path, ray: OwnRay) -> Job:
    """Start or resume in a new process."""
    return Job([sys.executable, "-m", "tests.helpers.prepare_kills", str(out)], log, env=ray.environment)


def killed(out: Path, ray: OwnRay, kinds: list[str], rng: random.Random) -> list[Kill]:
    """Prepare `out`, killed in these ways, until it is finished. Returns the kills.

    The kills are spread over the work: each comes after a fraction of the remaining work and a random delay.
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
            kills.append(Kill(kind, len(list(out.glob(".partial/*.spill"))), len(list(out.glob("*.tar")))))
            if kind == "worker":
                workers = [process for name in WORKERS for process in processes_named(ray.processes(), name)]
                if workers:
                    kill(rng.choice(workers))
                else:
                    kills.pop()
                continue
            kill(psutil.Process(job.process.pid))
            job.wait(60)
            if kind == "all":
                ray.kill()
                ray.start()
            else:
                left = [process for name in WORKERS for process in processes_named(ray.processes(), name)]
                assert not survivors(left, 60), "workers of a killed driver are left"
            job = driver(out, out.parent / f"{out.name}.{number + 1}.log", ray)
        assert job.wait(300) == 0, job.output
        assert "Traceback" not in job.output
    finally:
        job.end()
    return kills


def _done(out: Path) -> float:
    """Fraction of the work that is done, by parts and then shards."""
    if (out / "manifest.arrow").exists():
        return 1.0
    parts = {path.name.split("-")[0] for path in out.glob(".partial/*.spill")}
    return 0.6 * len(parts) / PARTS + 0.4 * len(list(out.glob("*.tar"))) * SETTINGS.samples_per_shard / IMAGES


def main() -> None:
    from paml.distributed import cluster
    from paml.distributed.ray_tasks import RayTaskRunner

    cluster.join()
    tasks = RayTaskRunner(cpus_per_task=1, retries=20)
    parts = generated_parts(IMAGES, PARTS, size=256)
    print(write_parts(parts, sys.argv[1], SETTINGS, tasks=tasks, spill_bytes=60_000, group_bytes=300_000), flush=True)


if __name__ == "__main__":
    main()
