"""Training over several nodes, of which one is killed, one stands still and one is added."""

from pathlib import Path

import pytest

from tests.helpers.jobs import newest_step, prepare_scenes, train_job, write_scenes
from tests.helpers.kills import STEPS, differing, final_tensors, hard_options
from tests.helpers.nodes import nodes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_outlives_the_nodes_that_it_began_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    data, runs = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data"), tmp_path / "runs"
    with nodes(2) as cluster:
        with train_job(hard_options(data, runs, "whole", 2, 2), tmp_path / "whole.log", env=cluster.environment) as job:
            job.until(lambda: newest_step(runs / "whole") > 0, "a checkpoint")
            assert len(cluster.at_work()) == 2
            cluster.add()
            assert job.wait() == 0, job.output
        with train_job(hard_options(data, runs, "lost", 2, 2), tmp_path / "lost.log", env=cluster.environment) as job:
            job.until(lambda: newest_step(runs / "lost") >= 3, "step 3")
            cluster.kill(cluster.at_work()[-1])
            cluster.add()
            job.until(lambda: newest_step(runs / "lost") >= 6, "step 6, on the node that was spare")
            cluster.pause(cluster.at_work()[0])
            assert job.wait() == 0, job.output
            said = job.output
    assert newest_step(runs / "lost") == 2 * STEPS
    assert differing(final_tensors(runs / "whole"), final_tensors(runs / "lost")) == []
    assert "restart 1 of 3 from the newest checkpoint" in said
    assert "restart 2 of 3 from the newest checkpoint" in said
