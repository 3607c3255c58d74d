"""The `ray job submit` line of `paml submit`."""

import json
import sys
from pathlib import Path

import pytest

from paml.cli import main
from paml.cli.submit import submit_line
from paml.settings import UsageError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and current folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_a_local_ray_uses_this_python_and_this_folder(tmp_path: Path):
    Path("mine.yaml").write_text("epochs: 1\n")
    environment, line = submit_line(["train", "--config", "mine.yaml", "--epochs", "2"], {})
    assert environment == {}
    config = str(tmp_path / "work" / "mine.yaml")
    assert line[:4] == ["ray", "job", "submit", "--runtime-env-json"]
    assert line[5:] == ["--", sys.executable, "-m", "paml", "train", "--config", config, "--epochs", "2"]
    assert json.loads(line[4]) == {"env_vars": {"PAML_HOME": str(tmp_path / "work")}}


def test_a_cluster_uses_its_own_python_and_the_checkout():
    address = {"RAY_API_SERVER_ADDRESS": "https://ray.example.org"}
    job = ["--", "python", "-m", "paml", "train", "--config=openimages_v3"]
    assert submit_line(["train", "--config=openimages_v3"], address)[1] == ["ray", "job", "submit", *job]
    Path("paml").mkdir()
    Path("paml/__main__.py").touch()
    upload = ["--working-dir", "."]
    assert submit_line(["train", "--config=openimages_v3"], address)[1] == ["ray", "job", "submit", *upload, *job]
    own = ["--working-dir", "s3://b/code.zip", "--no-wait"]
    assert submit_line([*own, "train"], address)[1][3:6] == own


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {}),
        ({"RAY_AUTH_TOKEN": "t"}, {"RAY_AUTH_MODE": "token"}),
        ({"RAY_AUTH_TOKEN": "t", "RAY_AUTH_MODE": "disabled"}, {}),
    ],
)
def test_a_token_of_the_environment_is_used(given: dict[str, str], added: dict[str, str]):
    assert submit_line(["train"], given)[0] == added


def test_a_token_file_is_used(home: Path):
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("t")
    assert submit_line(["train"], {})[0] == {"RAY_AUTH_MODE": "token"}


def test_dry_run_only_prints_the_line(capsys: pytest.CaptureFixture[str]):
    assert main(["submit", "--dry_run", "tune", "--config", "tune_demo", "--help"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("$ ")
    assert "-m paml tune --config tune_demo --help" in output
    assert "--dry_run" not in output


def test_a_line_without_a_command_is_refused():
    with pytest.raises(UsageError):
        submit_line(["--no-wait"], {})
