"""What a cluster does to the processes of Ray: a head that is lost comes back, a node is told to end."""

import time
from pathlib import Path

import pytest

from tests.helpers.heads import head_and_nodes, processes, tell_to_end
from tests.helpers.jobs import WORKER, gone, named, newest_step, prepare_scenes, write_scenes
from tests.helpers.kills import STEPS, differing, final_tensors, hard_options, unbroken


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_outlives_the_head_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    data, runs = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data"), tmp_path / "runs"
    epochs = 40
    whole = unbroken(data, runs, 2, epochs)
    with head_and_nodes(tmp_path) as cluster:
        cluster.add("--num-cpus=2", '--resources={"driver": 1}')
        cluster.add("--num-cpus=1")
        options = hard_options(data, runs, "lost", 2, epochs)
        lost = cluster.submit("lost", *options, "--workers.cpus_per_worker", "1")
        lost.until(lambda: newest_step(runs / "lost") >= STEPS, "the first epoch")
        assert len(named(cluster.processes(), WORKER)) == 2
        begun = time.monotonic()
        cluster.kill_head()
        before = newest_step(runs / "lost")
        while newest_step(runs / "lost") == before:  # while there is no head
            assert time.monotonic() - begun < 60
            time.sleep(0.02)
        to_checkpoint = time.monotonic() - begun
        time.sleep(3)
        cluster.start()
        away, at_return = time.monotonic() - begun, newest_step(runs / "lost")
        assert at_return < epochs * STEPS, "the run was over before the head was back: this shows nothing"
        assert lost.wait() == "SUCCEEDED", lost.output
        said = lost.output
        left = cluster.processes()
    assert not gone(left)
    print(f"checkpoint {to_checkpoint:.1f} s after the head's death; back after {away:.1f} s, at step {at_return}")
    assert "restart 1 of" not in said
    assert newest_step(runs / "lost") == epochs * STEPS
    assert differing(whole, final_tensors(runs / "lost")) == []


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_node_that_is_told_to_end_announces_itself_and_waits_for_the_checkpoint(tmp_path: Path) -> None:
    data, runs = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data"), tmp_path / "runs"
    epochs = 20
    options = [*hard_options(data, runs, "moved", 2, epochs), "--checkpoint.every_steps", "100000"]
    with head_and_nodes(tmp_path) as cluster:
        cluster.add("--num-cpus=2", '--resources={"driver": 1}')
        going = cluster.add("--num-cpus=1")
        moved = cluster.submit("moved", *options, "--workers.cpus_per_worker", "1")
        moved.until(lambda: newest_step(runs / "moved") >= STEPS, "the first epoch")
        assert named(processes(going), WORKER)
        cluster.add("--num-cpus=1")
        left = processes(going)
        tell_to_end(going)
        begun = time.monotonic()
        moved.until(lambda: "the workers have left a checkpoint" in moved.output, "leave of the workers")
        to_leave = time.monotonic() - begun
        left_at = newest_step(runs / "moved")
        going.wait(90)
        to_end = time.monotonic() - begun
        assert not gone(left)
        assert moved.wait() == "SUCCEEDED", moved.output
        said = moved.output
    print(f"the workers left {to_leave:.1f} s after the signal, the node ended {to_end:.1f} s after it")
    assert to_leave < 30
    assert "is about to go" in said
    assert "restart 1 of" not in said
    assert f"going on at epoch {left_at // STEPS + 1}, step {left_at % STEPS} of {STEPS}" in said
    assert newest_step(runs / "moved") == epochs * STEPS
