"""Ten kills of workers, driver or all of Ray at random moments: the final weights are bit-identical."""

import statistics
from pathlib import Path

import pytest

from tests.helpers.jobs import prepare_scenes, write_scenes
from tests.helpers.kills import Kill, OwnRay, differing, killed, uninterrupted


def report(kills: list[Kill]) -> str:
    """The kills by kind, with the seconds until training was further than before."""
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
def test_five_kills_leave_bit_identical_weights(tmp_path: Path, workers: int):
    data = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data")
    expected, ray = uninterrupted(data, tmp_path / "runs", workers), OwnRay()
    ray.start()
    try:
        tensors, kills = killed(data, tmp_path / "runs", workers, ray, KINDS[workers], seed=workers)
    finally:
        ray.stop()
    differing_names = differing(expected, tensors)
    print(f"\n{report(kills)}\n{len(expected)} tensors, {len(differing_names)} differ")
    assert len(kills) == 5
    assert expected["progress/overlay"].numel() > 0
    assert differing_names == []
