"""A lost and restarted head, and a node that receives SIGTERM."""

import time
from pathlib import Path

import pytest

from tests.helpers.heads import head_and_nodes, processes, tell_to_end
from tests.helpers.jobs import WORKER, newest_step, prepare_scenes, processes_named, survivors, write_scenes
from tests.helpers.kills import STEPS, differing, final_tensors, hard_options, uninterrupted


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_run_survives_the_loss_of_the_head_with_the_same_weights(tmp_path: Path) -> None:
    data, runs = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data"), tmp_path / "runs"
    epochs = 40
    reference = uninterrupted(data, runs, 2, epochs)
    with head_and_nodes(tmp_path) as cluster:
        cluster.add("--num-cpus=2", '--resources={"driver": 1}')
        cluster.add("--num-cpus=1")
        options = hard_options(data, runs, "lost", 2, epochs)
        lost = cluster.submit("lost", *options, "--workers.cpus_per_worker", "1")
        lost.until(lambda: newest_step(runs / "lost") >= STEPS, "the first epoch")
        assert len(processes_named(cluster.processes(), WORKER)) == 2
        start = time.monotonic()
        cluster.kill_head()
        before = newest_step(runs / "lost")
        while newest_step(runs / "lost") == before:
            assert time.monotonic() - start < 240
            time.sleep(0.02)
        to_checkpoint = time.monotonic() - start
        time.sleep(3)
        cluster.start()
        seconds_down, step = time.monotonic() - start, newest_step(runs / "lost")
        assert step < epochs * STEPS, "the run ended before the head was restarted: increase the epochs"
        assert lost.wait() == "SUCCEEDED", lost.output
        output = lost.output
        remaining = cluster.processes()
    assert not survivors(remaining)
    print(f"checkpoint {to_checkpoint:.1f} s after the kill; head restarted after {seconds_down:.1f} s, at step {step}")
    assert "restart 1 of" not in output
    assert newest_step(runs / "lost") == epochs * STEPS
    assert differing(reference, final_tensors(runs / "lost")) == []


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_terminating_node_is_drained_and_waits_for_the_checkpoint(tmp_path: Path) -> None:
    data, runs = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data"), tmp_path / "runs"
    epochs = 20
    options = [*hard_options(data, runs, "moved", 2, epochs), "--checkpoint.every_steps", "100000"]
    with head_and_nodes(tmp_path) as cluster:
        cluster.add("--num-cpus=2", '--resources={"driver": 1}')
        terminating = cluster.add("--num-cpus=1")
        moved = cluster.submit("moved", *options, "--workers.cpus_per_worker", "1")
        moved.until(lambda: newest_step(runs / "moved") >= STEPS, "the first epoch")
        assert processes_named(processes(terminating), WORKER)
        cluster.add("--num-cpus=1")
        remaining = processes(terminating)
        tell_to_end(terminating)
        start = time.monotonic()
        moved.until(lambda: "the workers wrote a checkpoint" in moved.output, "the workers to stop")
        to_stop = time.monotonic() - start
        step = newest_step(runs / "moved")
        terminating.wait(90)
        to_end = time.monotonic() - start
        assert not survivors(remaining)
        assert moved.wait() == "SUCCEEDED", moved.output
        output = moved.output
    print(f"the workers stopped {to_stop:.1f} s after the signal, the node ended {to_end:.1f} s after it")
    assert to_stop < 60
    assert "is being removed" in output
    assert "restart 1 of" not in output
    assert f"resuming at epoch {step // STEPS + 1}, step {step % STEPS} of {STEPS}" in output
    assert newest_step(runs / "moved") == epochs * STEPS
