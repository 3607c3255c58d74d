"""Invariant 7: a checkpoint is whole or absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paml.errors import CheckpointError, SettingsError
from paml.training.checkpoint import (
    Checkpoint,
    CheckpointSettings,
    OtherSchemaError,
    checkpoint_name,
    committed,
    newest_checkpoint,
    read_checkpoint,
    tidy,
    write_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]


def some(value: float) -> Checkpoint:
    tensors = {
        "weights": {"a": torch.full((3, 4, 2, 2), value).to(memory_format=torch.channels_last)},
        "progress": {"codes": torch.arange(5), "none": torch.empty(0, dtype=torch.int64)},
    }
    return Checkpoint(tensors, {"epoch": int(value), "map": float("nan")})


def write(run: Path, *steps: int) -> None:
    for step in steps:
        write_checkpoint(str(run), step, some(step))


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / checkpoint_name(step)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, 7)
    found = read_checkpoint(str(tmp_path), checkpoint_name(7))
    assert found.facts["epoch"] == 7
    assert set(found.tensors) == {"weights", "progress"}
    assert torch.equal(found.tensors["weights"]["a"], torch.full((3, 4, 2, 2), 7.0))
    assert torch.equal(found.tensors["progress"]["codes"], torch.arange(5))
    assert set(read_checkpoint(str(tmp_path), checkpoint_name(7), groups=("weights",)).tensors) == {"weights"}


FILES = ["weights.safetensors", "progress.safetensors", "facts.json", "COMMIT"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("fault", ["missing", "empty", "cut", "flipped bit", "longer"])
def test_a_damaged_file_makes_a_checkpoint_absent_and_the_one_before_serves(
    file: str, fault: str, tmp_path: Path
) -> None:
    write(tmp_path, 1, 2)
    path = folder(tmp_path, 2) / file
    data = bytearray(path.read_bytes())
    if fault == "missing":
        path.unlink()
    else:
        flipped = bytearray(data)
        flipped[-8 if file == "COMMIT" else -1] ^= 4
        path.write_bytes({"empty": b"", "cut": data[:-3], "flipped bit": flipped, "longer": data + b"}"}[fault])
    found, faults = newest_checkpoint(str(tmp_path))
    assert found is not None
    assert found.facts["epoch"] == 1
    if not (file == "COMMIT" and fault == "missing"):
        assert len(faults) == 1
        assert "step-000000002" in faults[0]
    with pytest.raises(CheckpointError):
        read_checkpoint(str(tmp_path), checkpoint_name(2))


@pytest.mark.parametrize("group", ["weights", "progress"])
def test_a_damaged_checkpoint_of_the_same_step_is_written_anew(group: str, tmp_path: Path) -> None:
    write(tmp_path, 3)
    path = folder(tmp_path, 3) / f"{group}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    write(tmp_path, 3)
    assert read_checkpoint(str(tmp_path), checkpoint_name(3)).facts["epoch"] == 3


def test_a_whole_checkpoint_of_the_same_step_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, 3)
    before = (folder(tmp_path, 3) / "weights.safetensors").stat().st_mtime_ns
    write(tmp_path, 3)
    assert (folder(tmp_path, 3) / "weights.safetensors").stat().st_mtime_ns == before


def test_no_checkpoint_at_all_is_no_fault(tmp_path: Path) -> None:
    assert newest_checkpoint(str(tmp_path / "nothing")) == (None, [])
    with pytest.raises(CheckpointError, match="no COMMIT: it was never finished"):
        read_checkpoint(str(tmp_path), checkpoint_name(1))


def test_another_schema_stops_rather_than_beginning_anew(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    path = folder(tmp_path, 2) / "COMMIT"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(OtherSchemaError, match="has schema version 99, this paml reads 1"):
        newest_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("keep", "also", "left"),
    [
        (2, set(), [4, 5]),
        (1, {2}, [2, 5]),
        (None, set(), [1, 2, 3, 4, 5]),
        (9, set(), [1, 2, 3, 4, 5]),
        (1, {5}, [5]),
    ],
)
def test_the_newest_and_the_best_are_kept(keep: int | None, also: set[int], left: list[int], tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, 5)
    tidy(str(tmp_path), newest=checkpoint_name(5), keep=keep, also={checkpoint_name(step) for step in also})
    assert committed(str(tmp_path)) == [checkpoint_name(step) for step in left]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == committed(str(tmp_path))


def test_what_was_never_finished_and_what_was_passed_over_goes_while_strangers_stay(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 9)
    half = folder(tmp_path, 5)
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    stranger = tmp_path / "checkpoints" / "notes.txt"
    stranger.write_text("mine")
    tidy(str(tmp_path), newest=checkpoint_name(2), keep=1, also=set())
    assert committed(str(tmp_path)) == [checkpoint_name(2)]
    assert not half.exists()
    assert stranger.read_text() == "mine"


WRITERS = """
import os, signal, sys, time
import torch
from paml.training.checkpoint import Checkpoint, tidy, write_checkpoint

def write_for_ever(run, said):
    step = 0
    while True:
        step += 1
        tensors = {name: {"a": torch.full((50_000,), float(step))} for name in ("weights", "optimiser")}
        name = write_checkpoint(run, step, Checkpoint(tensors, {"step": step}))
        tidy(run, newest=name, keep=2, also=set())
        os.write(said, b"x")

for attempt in range(int(sys.argv[2])):
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        write_for_ever(f"{sys.argv[1]}/{attempt}", said)
    os.close(said)
    steps = sum(len(os.read(heard, 1)) for _ in range(3))
    time.sleep(0.0031 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(steps + len(os.read(heard, 10_000)))
"""


def test_a_writer_killed_anywhere_leaves_a_whole_newest_checkpoint(tmp_path: Path) -> None:
    attempts = 8
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITERS, str(tmp_path), str(attempts)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, timeout=200, check=True)
    for attempt, said in enumerate(int(line) for line in ended.stdout.split()):
        found, faults = newest_checkpoint(str(tmp_path / str(attempt)))
        assert not faults
        assert found is not None
        step = found.facts["step"]
        assert said <= step <= said + 1
        for group in ("weights", "optimiser"):
            assert torch.equal(found.tensors[group]["a"], torch.full((50_000,), float(step)))
    assert attempt == attempts - 1


@pytest.mark.parametrize("name", ["every_steps", "keep"])
def test_settings_below_one_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"checkpoint.{name} is 0; it must be at least 1, or null"):
        CheckpointSettings(**{name: 0})
