"""A worker that hangs is named, and the run continues without it to the same weights."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from paml.distributed.cluster import check_reachable
from paml.distributed.hangs import Heartbeat, describe_hang
from paml.distributed.local_head import free_ports
from paml.distributed.ray_train import nccl_environment
from paml.errors import SettingsError
from tests.helpers.jobs import WORKER, newest_step, prepare_scenes, processes_named, train_job, write_scenes
from tests.helpers.kills import OwnRay, differing, final_tensors, hard_options, uninterrupted

LIMIT = 10.0


def heartbeat(rank: int, **changes: object) -> Heartbeat:
    """Of a healthy worker in step 7 of epoch 2."""
    fields = {"rank": rank, "node": f"node-{rank}", "pid": 100 + rank, "epoch": 2, "step": 7}
    return Heartbeat(**(fields | changes))  # pyright: ignore[reportArgumentType]


def test_workers_with_progress_are_not_named():
    assert describe_hang([heartbeat(0, idle_seconds=4, silent_seconds=5), heartbeat(1)], LIMIT) is None


def test_a_finished_worker_may_be_silent():
    assert describe_hang([heartbeat(0), heartbeat(1, ended=True, silent_seconds=1000)], LIMIT) is None


def test_the_silent_worker_is_named_with_node_step_and_epoch():
    waiting = heartbeat(0, activity="computing a step", idle_seconds=12, location="all_reduce", in_collective=True)
    message = describe_hang([waiting, heartbeat(1, activity="computing a step", silent_seconds=12)], LIMIT)
    assert message is not None
    assert message.startswith("worker 1 (node node-1, process 101)")
    assert "12 s" in message
    assert "step 7 of epoch 2" in message
    assert "stopped" in message
    assert message.rpartition("; ")[2].startswith("worker 0 ")


def test_the_worker_outside_the_collective_is_named():
    first, last = (heartbeat(rank, idle_seconds=12, location="all_reduce", in_collective=True) for rank in (0, 2))
    cause = heartbeat(1, idle_seconds=12, activity="waiting for a batch", location="get")
    message = describe_hang([first, cause, last], LIMIT)
    assert message is not None
    assert message.startswith("worker 1 ")
    assert "waiting for a batch: in get" in message
    assert message.rpartition("; ")[2].startswith("worker 0, worker 2 ")


def test_workers_that_all_wait_are_all_named():
    beats = [heartbeat(rank, idle_seconds=12, location="all_reduce", in_collective=True) for rank in (0, 1)]
    message = describe_hang(beats, LIMIT)
    assert message is not None
    assert "worker 0 (" in message
    assert "worker 1 (" in message
    assert "collective" in message.rpartition("; ")[2]


def test_nccl_dumps_its_collectives_unless_the_user_set_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "5")
    variables = nccl_environment("birds")
    assert variables["TORCH_FR_BUFFER_SIZE"] == "5"
    assert variables["TORCH_FR_DUMP_ON_TIMEOUT"] == "1"
    assert variables["TORCH_FR_DUMP_TEMP_FILE"].endswith("nccl/birds/rank_")


def test_an_unreachable_ray_is_named_in_bounded_time():
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(SettingsError, match=rf"{address} .*ray start --head"):
        check_reachable(address, seconds=0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_replaces_a_stopped_worker_and_ends_with_the_same_weights(tmp_path: Path):
    data = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data")
    runs, ray = tmp_path / "runs", OwnRay()
    reference = uninterrupted(data, runs, 2, epochs=2)
    ray.start()
    try:
        options = [*hard_options(data, runs, "stopped", 2, epochs=2), "--workers.collective_timeout_seconds", "30"]
        with train_job(options, tmp_path / "stopped.log", env=ray.environment) as job:
            job.until(lambda: newest_step(runs / "stopped") >= 3, "a checkpoint")
            os.kill(processes_named(ray.processes(), WORKER)[-1].pid, signal.SIGSTOP)
            start = time.monotonic()
            job.until(lambda: "restart 1 of 3" in job.output, "the restart")
            seconds = time.monotonic() - start
            assert job.wait() == 0, job.output
    finally:
        ray.stop()
    line = next(line for line in job.output.splitlines() if "restart 1 of 3" in line)
    assert re.match(r"worker [01] \(node \S+, process \d+\) .* \d+ s, .* step \d+ of epoch [12]", line)
    assert "workers.collective_timeout_seconds" in line
    assert seconds < 30 + 120, line
    assert differing(reference, final_tensors(runs / "stopped")) == []
