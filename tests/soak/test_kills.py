"""Ten kills of workers, driver and whole Ray at random moments: the weights end bit for bit the same."""

import statistics
from pathlib import Path

import pytest

from tests.helpers.jobs import prepare_scenes, write_scenes
from tests.helpers.kills import Kill, OwnRay, differing, killed, unbroken


def report(kills: list[Kill]) -> str:
    """The kills by kind, and seconds until training was further than before."""
    lines = [f"{'kill of':<8} {'workers':>7} {'kills':>5} {'median s':>9} {'worst s':>8}"]
    for kind in ("worker", "driver", "ray"):
        for workers in sorted({each.workers for each in kills}):
            seconds = [each.seconds for each in kills if each.kind == kind and each.workers == workers]
            if seconds:
                lines.append(
                    f"{kind:<8} {workers:>7} {len(seconds):>5} {statistics.median(seconds):>9.1f} {max(seconds):>8.1f}"
                )
    steps = ", ".join(f"{each.kind} after step {each.step} ({each.workers} workers)" for each in kills)
    return "\n".join([*lines, f"in order: {steps}"])


KINDS = {
    2: ["worker", "driver", "ray", "worker", "driver"],
    3: ["driver", "worker", "ray", "ray", "worker"],
}


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", sorted(KINDS))
def test_five_kills_leave_the_same_bits(tmp_path: Path, workers: int):
    data = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data")
    whole, ray = unbroken(data, tmp_path / "runs", workers), OwnRay()
    ray.start()
    try:
        broken, kills = killed(data, tmp_path / "runs", workers, ray, KINDS[workers], seed=workers)
    finally:
        ray.stop()
    wrong = differing(whole, broken)
    print(f"\n{report(kills)}\n{len(whole)} tensors, {len(wrong)} differ")
    assert len(kills) == 5
    assert whole["progress/overlay"].numel() > 0
    assert wrong == []
