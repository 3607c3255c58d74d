"""No output or file of a run holds keys or passwords from the environment or from addresses."""

import sys
from pathlib import Path

import pytest

from paml import api, storage
from paml.errors import SettingsError
from paml.pipeline import train_and_report
from paml.redact import redact_credentials
from paml.settings import UsageError, read_settings, settings_from_values
from paml.tracking.mlflow_sink import default_tracking_uri, read_state
from paml.training.settings import TrainSettings
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
    """Files of a folder, and planted values in the output, that leak."""
    found = [str(path) for path in folder.rglob("*") if path.is_file() and b"PLANTEDKEY" in path.read_bytes()]
    return found + [line for line in printed.splitlines() if "PLANTEDKEY" in line]


@pytest.mark.parametrize(
    "server",
    [
        pytest.param("away", marks=pytest.mark.slow),  # a run waits for MLflow before it ends
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
    monkeypatch.setattr(sys, "argv", ["train.py", "--run.trackers", '["mlflow"]', f"http://user:{ADDRESS}@host/x"])
    settings = tiny_settings(prepared, tmp_path / "runs", run={"trackers": ["mlflow"]}, epochs=1)
    if server == "away":
        train_and_report(settings)
    else:
        api.train(settings)
        assert (tmp_path / "runs" / "mlflow.db").exists()
    printed = capfd.readouterr()
    assert "127.0.0.1:9" in printed.err + printed.out or server == "sqlite"
    assert (tmp_path / "runs" / "tiny" / "result.json").exists()
    assert leaks(tmp_path, printed.out + printed.err) == []


def test_a_leak_is_detected(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(f"x {SECRETS['AWS_SESSION_TOKEN']}")
    assert leaks(tmp_path, f"{ADDRESS}\nok") == [str(tmp_path / "a"), ADDRESS]


def test_an_s3_address_with_credentials_is_refused_and_not_repeated() -> None:
    address = f"s3://AKIA:{ADDRESS}@bucket/data"
    for name in ("data.root", "run.storage", "model.weights"):
        with pytest.raises(SettingsError, match=name) as refused:
            settings_from_values(TrainSettings, {name: address}, "base")
        assert ADDRESS not in str(refused.value)
        with pytest.raises(UsageError, match=name) as refused:
            read_settings(TrainSettings, [f"--{name}", address])
        assert ADDRESS not in str(refused.value)
    with pytest.raises(storage.StorageError) as unread:
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
        ("postgresql://host/db?user=a&password=b#c", "postgresql://host/db?user=a&password=***#c"),
        ("'https://host/x?token=abc' failed", "'https://host/x?token=***' failed"),
        (
            "https://b/k?X-Amz-Credential=a%2Fb&X-Amz-Date=1&X-Amz-Signature=f0",
            "https://b/k?X-Amz-Credential=***&X-Amz-Date=1&X-Amz-Signature=***",
        ),
        ("https://b/k?sv=1&sig=a%3D&se=2, then", "https://b/k?sv=1&sig=***&se=2, then"),
        ("http://u:p@host?API_KEY=1", "http://host?API_KEY=***"),
        ("http://host/x?tokenizer=a&monkey=b&design=c", "http://host/x?tokenizer=a&monkey=b&design=c"),
    ],
)
def test_an_address_is_shown_without_its_credentials(text: str, shown: str) -> None:
    assert redact_credentials(text) == shown


def test_stored_tracker_state_has_no_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:p@host")
    assert default_tracking_uri(None) == "http://u:p@host"
    (tmp_path / "mlflow.json").write_text('{"http://u:p@host": {"run_id": "r", "experiment_id": "e", "artifacts": {}}}')
    assert list(read_state(str(tmp_path))) == ["http://host"]
