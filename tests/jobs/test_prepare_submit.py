"""`ray job submit --working-dir . -- python jobs/prepare_openimages.py --config ...`, stopped and submitted again."""

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

RECIPE = "jobs/recipes/openimages_v3_data.yaml"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a job needs, at a place where no installed paml points to."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for part in ("paml", "jobs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def head(checkout: Path) -> Iterator[dict[str, str]]:
    # After three seconds, by default, Ray kills a job that is to stop; a busy machine takes longer to say so and end.
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
    """Relative paths begin at PAML_HOME; the images and the release are here in place of the internet."""
    home = tmp_path / "home"
    scenes = write_scenes(home / "downloads", train=120, others=20)
    sources = ["--release_from", "null", "--images", str(scenes / "images"), "--images_from", "folder"]
    small = ["--shards.size", "32", "--shards.samples_per_shard", "20", "--labels.image_ids", "auto"]
    job = ["python", "jobs/prepare_openimages.py", "--config", RECIPE, *sources, *small]
    variables = json.dumps({"env_vars": {"PAML_HOME": str(home)}})
    submit = ["submit", "--log-color=false", "--working-dir", ".", "--runtime-env-json", variables]

    status, said = ray_job(head, checkout, *submit, "--no-wait", "--submission-id", "to-be-stopped", "--", *job)
    assert status == 0, said
    out = home / "data" / "openimages_v3"
    end = time.monotonic() + 120
    while not (out / "shards" / "train").exists() and time.monotonic() < end:
        time.sleep(0.05)
    ray_job(head, checkout, "stop", "to-be-stopped")
    _, logs = ray_job(head, checkout, "logs", "to-be-stopped")
    finished = "prepared: give data.root" in logs
    if not finished:  # one that comes too late meets Ray's own handler, in the midst of Ray's end
        assert "stopped; the same command goes on where this one stood" in logs
        assert "Traceback" not in logs

    status, said = ray_job(head, checkout, *submit, "--", *job)
    assert status == 0, said
    assert f"prepared: give data.root = {out}" in said
    assert "Traceback" not in said
    assert not list(out.rglob(".partial"))

    alone = tmp_path / "alone"
    command = [sys.executable, PREPARE, "--config", str(ROOT / RECIPE), *sources, *small]
    command += ["--release", str(home / "downloads" / "2017_11"), "--out", str(alone)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for split, count in (("train", 120), ("validation", 20), ("test", 20)):
        ours, theirs = out / "shards" / split, alone / "shards" / split
        assert verify_shards(ours).ok
        assert Manifest.open(ours).num_samples == count
        for path in (*theirs.glob("*.tar"), theirs / "manifest.arrow", theirs / "rejects.csv"):
            assert (ours / path.name).read_bytes() == path.read_bytes()
