"""Checkpoints that are either complete or ignored, on local disk or S3, without pickle.

`<run>/checkpoints/step-000001234/` contains safetensors files and facts.json. COMMIT is written last, since S3 has no
rename. It lists the size and SHA-256 of each file; a folder without a matching COMMIT is ignored.
"""

import dataclasses
import hashlib
import json
import re
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from paml import storage
from paml.errors import CheckpointError, check_setting
from paml.parsing import parse_errors_as, parse_json_object

SCHEMA_VERSION = 1
_NAME = re.compile(r"step-(\d{9})", re.ASCII)
_FILE = re.compile(r"facts\.json|\w+\.safetensors", re.ASCII)
_HINT = "remove that folder to use the checkpoint before it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When checkpoints are written and how many are retained. One is written after every epoch."""

    every_steps: int | None = None
    """Also write a checkpoint every N optimizer steps; null writes them after epochs only."""
    keep: int | None = 2
    """Number of latest checkpoints to retain, in addition to those of the best epochs; null retains all."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            value = getattr(self, name)
            check_setting(value is None or value >= 1, f"checkpoint.{name}", value, "1 or more, or null")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step: tensors by group and name, and facts for JSON."""

    tensors: dict[str, dict[str, torch.Tensor]]
    facts: dict[str, Any]


class SchemaVersionError(CheckpointError):
    """A checkpoint that another version of paml wrote in a format that this one cannot read."""


def _folder(run_folder: str, name: str = "") -> str:
    return storage.join(run_folder, "checkpoints", name)


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:09d}"


def write_checkpoint(run_folder: str, step: int, checkpoint: Checkpoint) -> str:
    """Write all files, then COMMIT. Returns the folder name. Replaces an incomplete folder of the same step."""
    name = checkpoint_name(step)
    folder = _folder(run_folder, name)
    if storage.exists(storage.join(folder, "COMMIT")):
        try:
            read_checkpoint(run_folder, name)
            return name  # the same step of the same run has the same content
        except CheckpointError:
            _remove(folder)
    files = {
        f"{group}.safetensors": save({key: value.detach().contiguous().cpu() for key, value in tensors.items()})
        for group, tensors in checkpoint.tensors.items()
    }
    files["facts.json"] = json.dumps(checkpoint.facts).encode()
    for file, data in files.items():
        storage.write_bytes(storage.join(folder, file), data)
    listed = {file: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for file, data in files.items()}
    commit = {"schema_version": SCHEMA_VERSION, "step": step, "files": listed}
    storage.write_bytes(storage.join(folder, "COMMIT"), json.dumps(commit).encode())
    return name


def read_checkpoint(run_folder: str, name: str, groups: tuple[str, ...] | None = None) -> Checkpoint:
    """Read and verify a checkpoint; `groups` selects tensors (None: all).

    Raises CheckpointError if COMMIT is missing or a file is damaged, SchemaVersionError if another version of paml
    wrote the checkpoint.
    """
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{name!r} is not a checkpoint name: use step- and nine digits")
    folder = _folder(run_folder, name)
    try:
        commit_bytes = storage.read_bytes(storage.join(folder, "COMMIT"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no COMMIT: it was not written to the end") from error
    with parse_errors_as(f"{folder}/COMMIT", _HINT, CheckpointError):
        commit = parse_json_object(commit_bytes)
        version = commit["schema_version"]
        files = {file: (fact["size"], fact["sha256"]) for file, fact in commit["files"].items()}
    if version != SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{folder} has schema version {version}, but this version of paml reads {SCHEMA_VERSION}: resume with the "
            "version that wrote it, or set another run.name"
        )
    unknown = [file for file in files if not _FILE.fullmatch(file)]
    if unknown:
        raise CheckpointError(f"{folder}/COMMIT is damaged: {unknown[0]!r} is not a file name of a checkpoint")
    contents: dict[str, bytes] = {}
    for file, (size, sha256) in files.items():
        if file != "facts.json" and groups is not None and file.removesuffix(".safetensors") not in groups:
            continue
        try:
            data = storage.read_bytes(storage.join(folder, file))
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder}/{file} is missing") from error
        if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
            raise CheckpointError(f"{folder}/{file} is damaged: its size or SHA-256 differs from the one in COMMIT")
        contents[file] = data
    with parse_errors_as(f"{folder}/facts.json", _HINT, CheckpointError):
        facts = parse_json_object(contents.pop("facts.json"))
    tensors = {}
    for file, data in contents.items():
        with parse_errors_as(f"{folder}/{file}", _HINT, CheckpointError, (SafetensorError,)):
            tensors[file.removesuffix(".safetensors")] = load(data)
    return Checkpoint(tensors, facts)


def list_checkpoints(run_folder: str) -> list[str]:
    """Names of the folders that have a COMMIT, oldest first."""
    files = storage.list_files(_folder(run_folder))
    return sorted(name for name in {f.split("/")[0] for f in files if f.endswith("/COMMIT")} if _NAME.fullmatch(name))


def newest_checkpoint(run_folder: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint, or None, and the problems of newer ones.

    Raises SchemaVersionError instead of skipping checkpoints of another version, which would restart the run.
    """
    problems: list[str] = []
    for name in reversed(list_checkpoints(run_folder)):
        try:
            return read_checkpoint(run_folder, name), problems
        except SchemaVersionError:
            raise
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


def prune_checkpoints(run_folder: str, *, newest: str, keep: int | None, also_keep: set[str]) -> None:
    """Remove all but the last `keep` checkpoints up to `newest`, which was just written, and those in `also_keep`.

    Checkpoints after `newest` were damaged when the run was resumed; they and incomplete ones are removed too.
    """
    complete = [name for name in list_checkpoints(run_folder) if name <= newest]
    retained = set(complete if keep is None else complete[-keep:]) | also_keep
    present = {file.split("/")[0] for file in storage.list_files(_folder(run_folder))}
    for name in sorted(present - retained):
        if _NAME.fullmatch(name):
            _remove(_folder(run_folder, name))


def _remove(folder: str) -> None:
    """Delete COMMIT first, so that an interrupted removal leaves no checkpoint that looks complete."""
    storage.delete(storage.join(folder, "COMMIT"))
    storage.delete_folder(folder)
