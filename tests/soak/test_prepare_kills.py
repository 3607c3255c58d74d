"""Preparation killed (SIGKILL) at random moments: the output is that of the unbroken run, byte for byte."""

import random
from pathlib import Path

import pytest

from paml.shards import verify_shards, write_parts
from tests.helpers.kills import OwnRay
from tests.helpers.parts import drawn_parts
from tests.helpers.prepare_kills import IMAGES, KINDS, SETTINGS, Kill, all_bytes, killed


def prepare_and_kill(folder: Path, kills: int, kills_a_run: int, seed: int) -> list[Kill]:
    write_parts(drawn_parts(IMAGES, 1, size=256), folder / "unbroken", SETTINGS)
    expected = all_bytes(folder / "unbroken")
    rng, met, run = random.Random(seed), [], 0
    ray = OwnRay()
    ray.start()
    try:
        while len(met) < kills:
            kinds = [KINDS[(len(met) + i) % len(KINDS)] for i in range(min(kills_a_run, kills - len(met)))]
            out = folder / f"run-{run}"
            met += killed(out, ray, kinds, rng)
            assert all_bytes(out) == expected
            assert verify_shards(out).ok
            run += 1
    finally:
        ray.stop()
    print(f"{len(met)} kills in {run} runs: {met}")
    assert {kill.kind for kill in met} == set(KINDS)
    return met


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_worker_driver_and_cluster_leave_the_same_bytes(tmp_path: Path) -> None:
    met = prepare_and_kill(tmp_path, kills=3, kills_a_run=3, seed=11)
    assert len(met) == 3


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_kills_leave_the_same_bytes(tmp_path: Path) -> None:
    met = prepare_and_kill(tmp_path, kills=20, kills_a_run=5, seed=12)
    assert {kill.shards > 0 for kill in met} == {False, True}, "both passes are to be met"
