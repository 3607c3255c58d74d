"""The command that repeats a training."""

import shlex
import sys
from pathlib import Path

import pytest

from paml.report import command_line, repeat_command
from paml.settings import read_settings
from paml.training.settings import RunSettings, TrainSettings
from tests.helpers.prepared import tiny_settings


def test_a_training_is_repeated_by_its_own_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/bin/paml", "train", "--data.root", "my data", "http://user:pass@host"])
    assert repeat_command(TrainSettings()) == "paml train --data.root 'my data' http://host"
    monkeypatch.setattr(sys, "argv", ["jobs/train_openimages.py", "--epochs", "3"])
    assert repeat_command(TrainSettings()) == "python jobs/train_openimages.py --epochs 3"
    monkeypatch.setattr(sys, "argv", ["/site-packages/paml/__main__.py", "train", "--epochs", "3"])
    assert repeat_command(TrainSettings()) == "paml train --epochs 3"


@pytest.mark.parametrize("program", ["/ray/workers/default_worker.py", "/x/bin/paml compare", "notebook"])
def test_a_training_of_another_program_is_repeated_by_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(sys, "argv", program.split())
    settings = tiny_settings(tmp_path / "a b", tmp_path, run={"resume": True})
    words = shlex.split(repeat_command(settings))
    assert words[:2] == ["paml", "train"]
    repeated = read_settings(TrainSettings, words[2:])
    assert repeated == tiny_settings(tmp_path / "a b", tmp_path)
    assert repeat_command(TrainSettings(run=RunSettings(name="x"))) == "paml train --run.name x"


def test_a_sweep_is_repeated_by_its_own_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/bin/paml", "tune", "--config", "tune_demo"])
    assert command_line() == "paml tune --config tune_demo"
