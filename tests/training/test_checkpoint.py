"""Invariant 7: a checkpoint is complete or ignored."""

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
    SchemaVersionError,
    checkpoint_name,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]


def checkpoint_of(value: float) -> Checkpoint:
    tensors = {
        "weights": {"a": torch.full((3, 4, 2, 2), value).to(memory_format=torch.channels_last)},
        "progress": {"codes": torch.arange(5), "none": torch.empty(0, dtype=torch.int64)},
    }
    return Checkpoint(tensors, {"epoch": int(value), "map": float("nan")})


def write(run: Path, *steps: int) -> None:
    for step in steps:
        write_checkpoint(str(run), step, checkpoint_of(step))


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / checkpoint_name(step)


def test_a_checkpoint_is_read_as_written(tmp_path: Path) -> None:
    write(tmp_path, 7)
    checkpoint = read_checkpoint(str(tmp_path), checkpoint_name(7))
    assert checkpoint.facts["epoch"] == 7
    assert set(checkpoint.tensors) == {"weights", "progress"}
    assert torch.equal(checkpoint.tensors["weights"]["a"], torch.full((3, 4, 2, 2), 7.0))
    assert torch.equal(checkpoint.tensors["progress"]["codes"], torch.arange(5))
    assert set(read_checkpoint(str(tmp_path), checkpoint_name(7), groups=("weights",)).tensors) == {"weights"}


FILES = ["weights.safetensors", "progress.safetensors", "facts.json", "COMMIT"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped bit", "longer"])
def test_a_checkpoint_with_a_damaged_file_is_skipped(file: str, damage: str, tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    path = folder(tmp_path, 2) / file
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        flipped = bytearray(data)
        flipped[-8 if file == "COMMIT" else -1] ^= 4
        path.write_bytes({"empty": b"", "cut": data[:-3], "flipped bit": flipped, "longer": data + b"}"}[damage])
    checkpoint, problems = newest_checkpoint(str(tmp_path))
    assert checkpoint is not None
    assert checkpoint.facts["epoch"] == 1
    if not (file == "COMMIT" and damage == "missing"):
        assert len(problems) == 1
        assert "step-000000002" in problems[0]
    with pytest.raises(CheckpointError):
        read_checkpoint(str(tmp_path), checkpoint_name(2))


@pytest.mark.parametrize("group", ["weights", "progress"])
def test_a_damaged_checkpoint_of_the_same_step_is_replaced(group: str, tmp_path: Path) -> None:
    write(tmp_path, 3)
    path = folder(tmp_path, 3) / f"{group}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    write(tmp_path, 3)
    assert read_checkpoint(str(tmp_path), checkpoint_name(3)).facts["epoch"] == 3


def test_an_intact_checkpoint_of_the_same_step_is_not_rewritten(tmp_path: Path) -> None:
    write(tmp_path, 3)
    before = (folder(tmp_path, 3) / "weights.safetensors").stat().st_mtime_ns
    write(tmp_path, 3)
    assert (folder(tmp_path, 3) / "weights.safetensors").stat().st_mtime_ns == before


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    assert newest_checkpoint(str(tmp_path / "nothing")) == (None, [])
    with pytest.raises(CheckpointError, match="no COMMIT"):
        read_checkpoint(str(tmp_path), checkpoint_name(1))


def test_another_schema_version_is_not_skipped(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    path = folder(tmp_path, 2) / "COMMIT"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(SchemaVersionError, match="schema version 99"):
        newest_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("keep", "also", "retained"),
    [
        (2, set(), [4, 5]),
        (1, {2}, [2, 5]),
        (None, set(), [1, 2, 3, 4, 5]),
        (9, set(), [1, 2, 3, 4, 5]),
        (1, {5}, [5]),
    ],
)
def test_the_newest_and_the_best_are_retained(
    keep: int | None, also: set[int], retained: list[int], tmp_path: Path
) -> None:
    write(tmp_path, 1, 2, 3, 4, 5)
    prune_checkpoints(
        str(tmp_path), newest=checkpoint_name(5), keep=keep, also_keep={checkpoint_name(step) for step in also}
    )
    assert list_checkpoints(str(tmp_path)) == [checkpoint_name(step) for step in retained]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == list_checkpoints(str(tmp_path))


def test_incomplete_and_damaged_checkpoints_are_removed_and_other_files_are_not(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 9)
    incomplete = folder(tmp_path, 5)
    incomplete.mkdir()
    (incomplete / "weights.safetensors").write_bytes(b"half")
    notes = tmp_path / "checkpoints" / "notes.txt"
    notes.write_text("mine")
    prune_checkpoints(str(tmp_path), newest=checkpoint_name(2), keep=1, also_keep=set())
    assert list_checkpoints(str(tmp_path)) == [checkpoint_name(2)]
    assert not incomplete.exists()
    assert notes.read_text() == "mine"


WRITERS = """
import os, signal, sys, time
import torch
from paml.training.checkpoint import Checkpoint, prune_checkpoints, write_checkpoint

def write_forever(run, pipe):
    step = 0
    while True:
        step += 1
        tensors = {name: {"a": torch.full((50_000,), float(step))} for name in ("weights", "optimizer")}
        name = write_checkpoint(run, step, Checkpoint(tensors, {"step": step}))
        prune_checkpoints(run, newest=name, keep=2, also_keep=set())
        os.write(pipe, b"x")

for attempt in range(int(sys.argv[2])):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        write_forever(f"{sys.argv[1]}/{attempt}", writer)
    os.close(writer)
    steps = sum(len(os.read(reader, 1)) for _ in range(3))
    time.sleep(0.0031 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(steps + len(os.read(reader, 10_000)))
"""


def test_a_killed_writer_leaves_an_intact_checkpoint(tmp_path: Path) -> None:
    attempts = 8
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITERS, str(tmp_path), str(attempts)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, timeout=200, check=True)
    for attempt, written in enumerate(int(line) for line in ended.stdout.split()):
        checkpoint, problems = newest_checkpoint(str(tmp_path / str(attempt)))
        assert not problems
        assert checkpoint is not None
        step = checkpoint.facts["step"]
        assert written <= step <= written + 1
        for group in ("weights", "optimizer"):
            assert torch.equal(checkpoint.tensors[group]["a"], torch.full((50_000,), float(step)))
    assert attempt == attempts - 1


@pytest.mark.parametrize("name", ["every_steps", "keep"])
def test_settings_below_one_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"checkpoint.{name} is 0"):
        CheckpointSettings(**{name: 0})
