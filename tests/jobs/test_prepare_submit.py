"""`ray job submit --working-dir . -- python jobs/prepare_openimages.py`, stopped and submitted again."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paml.distributed.local_head import ray_head
from paml.shards import Manifest, verify_shards
from tests.helpers.jobs import PREPARE, QUIET, ROOT, environment, write_scenes

RECIPE = "openimages_v3_data"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the parts that a job needs, in a folder that no installed paml refers to."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for part in ("paml", "jobs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def head(checkout: Path) -> Iterator[dict[str, str]]:
    # By default Ray kills a job three seconds after a stop; a busy machine needs longer to end it.
    os.environ.update(QUIET | {"RAY_JOB_STOP_WAIT_TIME_S": "30"})
    with ray_head(checkout, cpus=2) as found:
        yield environment(**found)


def ray_job(head: dict[str, str], checkout: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output of `ray job ...`."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", *arguments]
    done = subprocess.run(
        command, cwd=checkout, env=head, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_recipe_is_prepared_by_a_submitted_job(head: dict[str, str], checkout: Path, tmp_path: Path) -> None:
    """Relative paths are relative to PAML_HOME; local images and a local release replace the internet."""
    home = tmp_path / "home"
    scenes = write_scenes(home / "downloads", train=120, others=20)
    sources = ["--openimages.download_from", "null", "--images", str(scenes / "images"), "--images_from", "folder"]
    small_shards = ["--shards.size", "32", "--shards.samples_per_shard", "20", "--label_table.image_ids", "auto"]
    job = ["python", "jobs/prepare_openimages.py", "--config", RECIPE, *sources, *small_shards]
    variables = json.dumps({"env_vars": {"PAML_HOME": str(home)}})
    submit = ["submit", "--log-color=false", "--working-dir", ".", "--runtime-env-json", variables]

    status, output = ray_job(head, checkout, *submit, "--no-wait", "--submission-id", "to-be-stopped", "--", *job)
    assert status == 0, output
    out = home / "data" / "openimages_v3"
    end = time.monotonic() + 120
    while not (out / "shards" / "train").exists() and time.monotonic() < end:
        time.sleep(0.05)
    ray_job(head, checkout, "stop", "to-be-stopped")
    _, logs = ray_job(head, checkout, "logs", "to-be-stopped")
    finished = "prepared" in logs.splitlines()[-1] if logs else False
    if not finished:  # a late stop meets Ray's own handler while Ray shuts down
        assert "stopped" in logs
        assert "Traceback" not in logs

    status, output = ray_job(head, checkout, *submit, "--", *job)
    assert status == 0, output
    assert str(out) in output
    assert "Traceback" not in output
    assert not list(out.rglob(".partial"))

    alone = tmp_path / "alone"
    command = [sys.executable, PREPARE, "--config", RECIPE, *sources, *small_shards]
    command += ["--labels", str(home / "downloads" / "2017_11"), "--out", str(alone)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for split, count in (("train", 120), ("validation", 20), ("test", 20)):
        ours, theirs = out / "shards" / split, alone / "shards" / split
        assert verify_shards(ours).ok
        assert Manifest.open(ours).num_samples == count
        for path in (*theirs.glob("*.tar"), theirs / "manifest.arrow", theirs / "rejects.csv"):
            assert (ours / path.name).read_bytes() == path.read_bytes()
