"""A worker that is killed inside an epoch is replaced, and nothing of the result changes."""

from pathlib import Path

import pytest

from tests.helpers.jobs import prepare_scenes, write_scenes
from tests.helpers.kills import OwnRay, differing, killed, unbroken


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_worker_leaves_the_same_bits(tmp_path: Path):
    data = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data")
    ray = OwnRay()
    ray.start()
    try:
        whole = unbroken(data, tmp_path / "runs", 2, ray, epochs=2)
        broken, kills = killed(data, tmp_path / "runs", 2, ray, ["worker"], seed=1, epochs=2)
    finally:
        ray.stop()
    assert differing(whole, broken) == []
    said = (tmp_path / "killed-2-1.0.log").read_text()
    assert said.count("restart 1 of 3 from the newest checkpoint") == 1
    assert "Traceback" not in said
    assert kills[0].step >= 3
