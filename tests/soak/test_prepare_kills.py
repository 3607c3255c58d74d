"""Preparation killed (SIGKILL) at random moments: the output has the same bytes as an uninterrupted one."""

import random
from pathlib import Path

import pytest

from paml.shards import verify_shards, write_parts
from tests.helpers.kills import OwnRay
from tests.helpers.parts import generated_parts
from tests.helpers.prepare_kills import IMAGES, KINDS, SETTINGS, Kill, all_bytes, killed


def prepare_and_kill(folder: Path, kills: int, kills_per_run: int, seed: int) -> list[Kill]:
    write_parts(generated_parts(IMAGES, 1, size=256), folder / "uninterrupted", SETTINGS)
    expected = all_bytes(folder / "uninterrupted")
    rng, done, run = random.Random(seed), [], 0
    ray = OwnRay()
    ray.start()
    try:
        while len(done) < kills:
            kinds = [KINDS[(len(done) + i) % len(KINDS)] for i in range(min(kills_per_run, kills - len(done)))]
            out = folder / f"run-{run}"
            done += killed(out, ray, kinds, rng)
            assert all_bytes(out) == expected
            assert verify_shards(out).ok
            run += 1
    finally:
        ray.stop()
    print(f"{len(done)} kills in {run} runs: {done}")
    assert {kill.kind for kill in done} == set(KINDS)
    return done


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_worker_driver_and_cluster_leave_the_same_bytes(tmp_path: Path) -> None:
    done = prepare_and_kill(tmp_path, kills=3, kills_per_run=3, seed=11)
    assert len(done) == 3


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_kills_leave_the_same_bytes(tmp_path: Path) -> None:
    done = prepare_and_kill(tmp_path, kills=20, kills_per_run=5, seed=12)
    assert {kill.shards > 0 for kill in done} == {False, True}, "kills in both passes"
