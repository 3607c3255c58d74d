"""A worker that stalls is named, and the run goes on without it to the same bits."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from paml.distributed.cluster import refuse_silence
from paml.distributed.hangs import Beat, stall
from paml.distributed.local_head import free_ports
from paml.distributed.ray_train import nccl_environment
from paml.errors import SettingsError
from tests.helpers.jobs import WORKER, named, newest_step, prepare_scenes, train_job, write_scenes
from tests.helpers.kills import OwnRay, differing, final_tensors, hard_options, unbroken

LIMIT = 10.0


def beat(rank: int, **facts: object) -> Beat:
    """A worker in step 7 of epoch 2 of which nothing is wrong."""
    return Beat(**({"rank": rank, "node": f"node-{rank}", "pid": 100 + rank, "epoch": 2, "step": 7} | facts))  # pyright: ignore[reportArgumentType]


def test_workers_that_move_are_not_named():
    assert stall([beat(0, still_seconds=4, silent_seconds=5), beat(1)], LIMIT) is None


def test_a_worker_that_is_done_may_be_silent():
    assert stall([beat(0), beat(1, ended=True, silent_seconds=1000)], LIMIT) is None


def test_the_silent_worker_is_named_with_node_step_and_epoch():
    waiting = beat(0, doing="computing a step", still_seconds=12, where="all_reduce", waits=True)
    said = stall([waiting, beat(1, doing="computing a step", silent_seconds=12)], LIMIT)
    assert said is not None
    assert said.startswith(
        "worker 1 (node node-1, process 101) has stalled for 12 s, last heard after step 7 of epoch 2"
    )
    assert "does not answer" in said
    assert said.endswith("worker 0 waited for that")


def test_the_worker_outside_the_collective_is_named():
    waiting = [beat(rank, still_seconds=12, where="all_reduce", waits=True) for rank in (0, 2)]
    said = stall([waiting[0], beat(1, still_seconds=12, doing="waiting for a batch", where="get"), waiting[1]], LIMIT)
    assert said is not None
    assert said.startswith("worker 1 ")
    assert "waiting for a batch: it stands in get" in said
    assert said.endswith("worker 0, worker 2 waited for that")


def test_workers_that_all_wait_are_all_named():
    said = stall([beat(rank, still_seconds=12, where="all_reduce", waits=True) for rank in (0, 1)], LIMIT)
    assert said is not None
    assert "worker 0 (" in said
    assert "worker 1 (" in said
    assert "a collective that not all have entered" in said


def test_nccl_writes_down_its_collectives_where_the_user_has_said_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "5")
    found = nccl_environment("birds")
    assert found["TORCH_FR_BUFFER_SIZE"] == "5"
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == found["TORCH_FR_DUMP_ON_TIMEOUT"] == "1"
    assert found["TORCH_FR_DUMP_TEMP_FILE"].endswith("nccl/birds/rank_")


def test_a_ray_that_is_not_there_is_named_in_bounded_time():
    with pytest.raises(SettingsError, match=r"no Ray answers at 127\.0\.0\.1:\d+ .*ray start --head"):
        refuse_silence(f"127.0.0.1:{free_ports(1)[0]}", seconds=0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_worker_is_named_and_leaves_the_same_bits(tmp_path: Path):
    data = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data")
    runs, ray = tmp_path / "runs", OwnRay()
    whole = unbroken(data, runs, 2, epochs=2)
    ray.start()
    try:
        options = [*hard_options(data, runs, "stopped", 2, epochs=2), "--workers.collective_timeout_seconds", "30"]
        with train_job(options, tmp_path / "stopped.log", env=ray.environment) as job:
            job.until(lambda: newest_step(runs / "stopped") >= 3, "a checkpoint")
            os.kill(named(ray.processes(), WORKER)[-1].pid, signal.SIGSTOP)
            begun = time.monotonic()
            job.until(lambda: "restart 1 of 3" in job.output, "the restart")
            seconds = time.monotonic() - begun
            assert job.wait() == 0, job.output
    finally:
        ray.stop()
    line = next(line for line in job.output.splitlines() if "restart 1 of 3" in line)
    assert re.match(
        r"worker [01] \(node \S+, process \d+\) has stalled for \d+ s, last heard after step \d+ of epoch [12]", line
    )
    assert "does not answer" in line
    assert "workers.collective_timeout_seconds" in line
    assert seconds < 30 + 45, line
    assert differing(whole, final_tensors(runs / "stopped")) == []
