"""`ray job submit`, with --working-dir . and without, from a checkout that nothing else knows of."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paml.distributed.local_head import ray_head
from tests.helpers.jobs import QUIET, ROOT, environment, newest_step, prepare_scenes, tiny_options, write_scenes

WHERE = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))
import ray
from paml.distributed import cluster, ray_train
from paml.training.settings import WorkerSettings

ray_train.connect(WorkerSettings())

@ray.remote(num_cpus=0.1, runtime_env=cluster.task_environment())
def where():
    import paml
    return paml.__file__

print("a worker has", ray.get(where.remote()))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a job needs, at a place where no installed paml points to."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for part in ("paml", "jobs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "where.py").write_text(WHERE)
    return folder


@pytest.fixture(scope="module")
def head(checkout: Path) -> Iterator[dict[str, str]]:
    os.environ.update(QUIET)
    with ray_head(checkout, cpus=2) as found:
        yield environment(**found)


def submit(head: dict[str, str], checkout: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output of `ray job submit`."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--log-color=false", *arguments]
    done = subprocess.run(
        command, cwd=checkout, env=head, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_find_the_jobs_own_paml(head: dict[str, str], checkout: Path):
    status, said = submit(head, checkout, "--", "python", "where.py")
    assert status == 0, said
    assert f"a worker has {checkout / 'paml' / '__init__.py'}" in said

    status, said = submit(head, checkout, "--working-dir", ".", "--", "python", "where.py")
    assert status == 0, said
    (line,) = [line for line in said.splitlines() if "a worker has" in line]
    assert "_ray_pkg_" in line


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("upload", [False, True], ids=["without", "with_working_dir"])
def test_submitted_job_trains(head: dict[str, str], checkout: Path, tmp_path: Path, upload: bool):
    data = prepare_scenes(write_scenes(tmp_path / "scenes", train=60, others=20), tmp_path / "data")
    options = tiny_options(data, tmp_path / "runs", "submitted", epochs=1, workers__num_workers=2)
    before = ["--working-dir", "."] if upload else []
    status, said = submit(head, checkout, *before, "--", "python", "jobs/train_openimages.py", *options)
    assert status == 0, said
    assert newest_step(tmp_path / "runs" / "submitted") == 3
    assert "test scores of submitted" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_submitted_job_fails_with_its_message(head: dict[str, str], checkout: Path, tmp_path: Path):
    nothing = tmp_path / "nothing"
    command = ["--", "python", "jobs/train_openimages.py", "--data.root", str(nothing)]
    status, said = submit(head, checkout, *command)
    assert status == 1
    assert f"error: {nothing}" in said
    assert "Traceback" not in said

    status, said = submit(head, checkout, "--", "python", "jobs/train_openimages.py")
    assert status == 1
    assert "python jobs/prepare_openimages.py --config jobs/recipes/openimages_v3_data.yaml" in said
