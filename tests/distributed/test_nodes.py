"""Training over several nodes, of which some are killed, stand still, are added or are announced to go."""

import itertools
import json
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.jobs import newest_step, prepare_scenes, tiny_options, train_job, write_scenes
from tests.helpers.kills import STEPS, differing, final_tensors, hard_options, unbroken
from tests.helpers.nodes import nodes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_outlives_the_nodes_that_it_began_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    data, runs = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data"), tmp_path / "runs"
    whole = unbroken(data, runs, 2, epochs=2)
    options = hard_options(data, runs, "lost", 2, 2)
    with nodes(3) as cluster, train_job(options, tmp_path / "lost.log", env=cluster.environment) as job:
        job.until(lambda: newest_step(runs / "lost") >= 3, "step 3")
        assert len(cluster.at_work()) == 2
        cluster.kill(cluster.at_work()[-1])
        cluster.add()
        job.until(lambda: newest_step(runs / "lost") >= 6, "step 6, on the node that was spare")
        cluster.pause(cluster.at_work()[0])
        assert job.wait() == 0, job.output
        said = job.output
    assert newest_step(runs / "lost") == 2 * STEPS
    assert differing(whole, final_tensors(runs / "lost")) == []
    assert "restart 1 of 3 from the newest checkpoint" in said
    assert "restart 2 of 3 from the newest checkpoint" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_leaves_a_node_that_is_about_to_go_with_a_checkpoint(tmp_path: Path) -> None:
    data, runs = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data"), tmp_path / "runs"
    epochs = 30  # of less than a second each, and the notice takes five to be heard
    options = [*hard_options(data, runs, "moved", 2, epochs), "--checkpoint.every_steps", "100000"]
    with nodes(2) as cluster, train_job(options, tmp_path / "moved.log", env=cluster.environment) as job:
        job.until(lambda: newest_step(runs / "moved") >= STEPS, "the first epoch")
        spare, going = cluster.add(), cluster.at_work()[-1]
        cluster.announce(going, 60)
        begun = time.monotonic()
        job.until(lambda: "the workers have left a checkpoint" in job.output, "the workers to leave")
        seconds = time.monotonic() - begun
        left_at = newest_step(runs / "moved")
        job.until(lambda: spare in cluster.at_work(), "workers on the spare node")
        cluster.kill(going)
        assert job.wait() == 0, job.output
        said = job.output
    assert seconds < 30
    assert f"notice that Ray's node {going.node_id[:12]} is about to go" in said
    assert "restart 1 of" not in said
    assert f"going on at epoch {left_at // STEPS + 1}, step {left_at % STEPS} of {STEPS}" in said
    assert differing(unbroken(data, runs, 2, epochs), final_tensors(runs / "moved")) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_elastic_run_shrinks_and_grows_with_the_cluster(tmp_path: Path) -> None:
    data, runs = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data"), tmp_path / "runs"
    epochs = 50
    elastic = ["--workers.min_workers", "1", "--workers.cpus_per_worker", "1", "--workers.resize_seconds", "1"]
    settings = {"epochs": epochs, "model__batch_norm": "frozen", "optimiser__name": "sgd", "checkpoint__every_steps": 3}
    plain = tiny_options(data, runs, "elastic", workers__num_workers=2, **settings)
    with nodes(2) as cluster:
        with train_job([*plain, *elastic], tmp_path / "elastic.log", env=cluster.environment) as job:
            job.until(lambda: newest_step(runs / "elastic") >= STEPS, "the first epoch")
            cluster.kill(cluster.at_work()[-1])
            job.until(lambda: "going on with 1 of 2 workers" in job.output, "one worker")
            alone = newest_step(runs / "elastic")
            job.until(lambda: newest_step(runs / "elastic") > alone + STEPS, "an epoch of one worker")
            cluster.add()
            job.until(lambda: "the cluster has room for 1 more worker" in job.output, "the second worker")
            assert job.wait() == 0, job.output
            said = job.output
        with train_job(tiny_options(data, runs, "one", **settings), tmp_path / "one.log") as job:
            assert job.wait() == 0, job.output
    assert "restart 1 of 3" in said
    assert "restart 2 of 3" not in said
    history = {name: json.loads((runs / name / "result.json").read_text())["history"] for name in ("elastic", "one")}
    workers = [int(figures["train/workers"]) for figures in history["elastic"]]
    assert [count for count, _ in itertools.groupby(workers)] == [2, 1, 2]
    for elastic_epoch, epoch in zip(history["elastic"], history["one"], strict=True):
        assert elastic_epoch["train/loss"] == pytest.approx(epoch["train/loss"], rel=1e-4)
    weights = {name: final_tensors(runs / name) for name in ("elastic", "one")}
    for name, value in weights["one"].items():
        if name.startswith("weights/"):
            torch.testing.assert_close(weights["elastic"][name], value, rtol=1e-3, atol=1e-5)
