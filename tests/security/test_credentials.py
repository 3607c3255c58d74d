"""Keys and passwords of the environment and of addresses are in nothing that a run prints or leaves."""

import sys
from pathlib import Path

import pytest

from paml import storage
from paml.cli import checked_settings, read_settings
from paml.distributed.run import run_training, train_run
from paml.errors import SettingsError
from paml.secrets import without_keys
from paml.tracking.view import default_tracking_uri, read_memory
from paml.training.settings import TrainSettings, flatten
from tests.helpers.prepared import tiny_settings

SECRETS = {
    "AWS_ACCESS_KEY_ID": "PLANTEDKEYONE",
    "AWS_SECRET_ACCESS_KEY": "PLANTEDKEYTWO",
    "AWS_SESSION_TOKEN": "PLANTEDKEYTHREE",
    "MLFLOW_TRACKING_USERNAME": "PLANTEDKEYFOUR",
    "MLFLOW_TRACKING_PASSWORD": "PLANTEDKEYFIVE",
    "MLFLOW_TRACKING_TOKEN": "PLANTEDKEYSIX",
    "RAY_AUTH_TOKEN": "PLANTEDKEYSEVEN",
}
ADDRESS = "PLANTEDKEYEIGHT"


def leaks(folder: Path, printed: str) -> list[str]:
    """Files below a folder, and what was printed, that hold a planted value."""
    found = [str(path) for path in folder.rglob("*") if path.is_file() and b"PLANTEDKEY" in path.read_bytes()]
    return found + [line for line in printed.splitlines() if "PLANTEDKEY" in line]


@pytest.mark.parametrize(
    "server",
    [
        pytest.param("away", marks=pytest.mark.slow),  # a run waits a minute for MLflow before it ends
        "sqlite",
    ],
)
def test_a_run_stores_and_prints_no_secret(
    server: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if server == "away":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{ADDRESS}@127.0.0.1:9")
    monkeypatch.setattr(sys, "argv", ["train.py", "--run.mlflow", "true", f"http://user:{ADDRESS}@host/x"])
    settings = tiny_settings(prepared, tmp_path / "runs", run={"mlflow": True, "system_seconds": None}, epochs=1)
    if server == "away":
        train_run(settings)
    else:
        run_training(settings)
        assert (tmp_path / "runs" / "mlflow.db").exists()
    printed = capfd.readouterr()
    assert "127.0.0.1:9" in printed.err + printed.out or server == "sqlite"
    assert (tmp_path / "runs" / "tiny" / "result.json").exists()
    assert leaks(tmp_path, printed.out + printed.err) == []


def test_the_search_for_leaks_finds_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(f"x {SECRETS['AWS_SESSION_TOKEN']}")
    assert leaks(tmp_path, f"{ADDRESS}\nok") == [str(tmp_path / "a"), ADDRESS]


def test_an_s3_address_with_keys_is_refused_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"s3://AKIA:{ADDRESS}@bucket/data"
    for name in ("data.root", "run.storage", "model.weights"):
        with pytest.raises(SettingsError, match=name) as refused:
            checked_settings(TrainSettings, {name: address}, "base", flatten(TrainSettings()))
        assert ADDRESS not in str(refused.value)
        monkeypatch.setattr(sys, "argv", ["job", f"--{name}", address])
        with pytest.raises(SystemExit):
            read_settings(TrainSettings, "a job")
        assert ADDRESS not in capsys.readouterr().err
    with pytest.raises(storage.StorageError, match="holds keys") as unread:
        storage.read_bytes(address)
    assert ADDRESS not in str(unread.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pass@host:5000/x", "http://host:5000/x"),
        ("see https://token@host, and s3://a:b@c/d", "see https://host, and s3://c/d"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("http://host/path@x", "http://host/path@x"),
        ("postgresql://u:p%40x@host/db", "postgresql://host/db"),
    ],
)
def test_an_address_is_shown_without_its_keys(text: str, shown: str) -> None:
    assert without_keys(text) == shown


def test_memories_of_before_are_cleaned_of_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:p@host")
    assert default_tracking_uri(None) == "http://u:p@host"
    (tmp_path / "mlflow.json").write_text('{"http://u:p@host": {"run_id": "r", "experiment_id": "e", "artifacts": {}}}')
    assert list(read_memory(str(tmp_path))) == ["http://host"]
