"""Training on several nodes while some are killed, paused, added or drained."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.jobs import Job, newest_step, prepare_scenes, tiny_options, train_job, write_scenes
from tests.helpers.kills import STEPS, differing, final_tensors, hard_options, uninterrupted
from tests.helpers.nodes import nodes

RESIZE_QUICKLY = """
import sys
from paml.cli import main
from paml.distributed import capacity
capacity.RESIZE_SECONDS = 1.0
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_survives_the_loss_of_its_nodes_with_the_same_weights(tmp_path: Path) -> None:
    data, runs = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data"), tmp_path / "runs"
    reference = uninterrupted(data, runs, 2, epochs=2)
    options = hard_options(data, runs, "lost", 2, 2)
    with nodes(3) as cluster, train_job(options, tmp_path / "lost.log", env=cluster.environment) as job:
        job.until(lambda: newest_step(runs / "lost") >= 3, "step 3")
        assert len(cluster.at_work()) == 2
        cluster.kill(cluster.at_work()[-1])
        cluster.add()
        job.until(lambda: newest_step(runs / "lost") >= 6, "step 6, on the spare node")
        cluster.pause(cluster.at_work()[0])
        assert job.wait() == 0, job.output
        output = job.output
    assert newest_step(runs / "lost") == 2 * STEPS
    assert differing(reference, final_tensors(runs / "lost")) == []
    assert "restart 1 of 3" in output
    assert "restart 2 of 3" in output


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_run_leaves_a_draining_node_with_a_checkpoint(tmp_path: Path) -> None:
    data, runs = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data"), tmp_path / "runs"
    epochs = 30  # of less than a second each; the notice takes five seconds to arrive
    options = [*hard_options(data, runs, "moved", 2, epochs), "--checkpoint.every_steps", "100000"]
    with nodes(2) as cluster, train_job(options, tmp_path / "moved.log", env=cluster.environment) as job:
        job.until(lambda: newest_step(runs / "moved") >= STEPS, "the first epoch")
        spare, draining = cluster.add(), cluster.at_work()[-1]
        cluster.announce(draining, 60)
        job.until(lambda: "the workers wrote a checkpoint" in job.output, "the workers to stop")
        step = newest_step(runs / "moved")
        job.until(lambda: spare in cluster.at_work(), "workers on the spare node")
        cluster.kill(draining)
        assert job.wait() == 0, job.output
        output = job.output
    assert f"node {draining.node_id[:12]} is being removed" in output
    assert "restart 1 of" not in output
    assert f"resuming at epoch {step // STEPS + 1}, step {step % STEPS} of {STEPS}" in output
    assert differing(uninterrupted(data, runs, 2, epochs), final_tensors(runs / "moved")) == []


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_an_elastic_run_shrinks_and_grows_with_the_cluster(tmp_path: Path) -> None:
    data, runs = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data"), tmp_path / "runs"
    epochs = 50
    settings = {"epochs": epochs, "model__batch_norm": "frozen", "optimizer__name": "sgd", "checkpoint__every_steps": 3}
    options = tiny_options(data, runs, "elastic", workers__num_workers=2, **settings)
    options += ["--workers.min_workers", "1", "--workers.cpus_per_worker", "1"]
    command = [sys.executable, "-c", RESIZE_QUICKLY, *options]
    with nodes(2) as cluster:
        with Job(command, tmp_path / "elastic.log", env=cluster.environment) as job:
            job.until(lambda: newest_step(runs / "elastic") >= STEPS, "the first epoch")
            cluster.kill(cluster.at_work()[-1])
            job.until(lambda: "training with 1 of 2 workers" in job.output, "one worker")
            alone = newest_step(runs / "elastic")
            job.until(lambda: newest_step(runs / "elastic") > alone + STEPS, "an epoch with one worker")
            cluster.add()
            job.until(lambda: "resources for 1 more worker" in job.output, "the second worker")
            assert job.wait() == 0, job.output
            output = job.output
        with train_job(tiny_options(data, runs, "one", **settings), tmp_path / "one.log") as job:
            assert job.wait() == 0, job.output
    assert "restart 1 of 3" in output
    assert "restart 2 of 3" not in output
    history = {name: json.loads((runs / name / "result.json").read_text())["history"] for name in ("elastic", "one")}
    workers = [int(metrics["train/workers"]) for metrics in history["elastic"]]
    assert [count for count, _ in itertools.groupby(workers)] == [2, 1, 2]
    for elastic, single in zip(history["elastic"], history["one"], strict=True):
        assert elastic["train/loss"] == pytest.approx(single["train/loss"], rel=1e-4)
    weights = {name: final_tensors(runs / name) for name in ("elastic", "one")}
    for name, value in weights["one"].items():
        if name.startswith("weights/"):
            torch.testing.assert_close(weights["elastic"][name], value, rtol=1e-3, atol=1e-5)
