"""Checkpoints: whole or absent, on local disk or S3, with nothing unpickled.

`<run>/checkpoints/step-000001234/` holds safetensors and one JSON file; COMMIT, written last, lists the size and
SHA-256 of each, and a folder without a COMMIT that agrees with its files does not count (S3 has no rename).
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
from paml.errors import CheckpointError, SettingsError
from paml.reading import parse_object, reading

SCHEMA_VERSION = 1
_NAME = re.compile(r"step-(\d{9})", re.ASCII)
_FILE = re.compile(r"facts\.json|\w+\.safetensors", re.ASCII)
_MEND = "remove that folder, so that the checkpoint before it is taken"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When checkpoints are written and which are kept. One is always written at the end of an epoch."""

    every_steps: int | None = None
    """Also after every so many steps of the optimiser within an epoch; null for epochs alone."""
    keep: int | None = 2
    """Newest checkpoints kept, beside those of the best epochs; null keeps all."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"checkpoint.{name} is {value}; it must be at least 1, or null")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a step left: named groups of tensors, and facts that JSON can hold."""

    tensors: dict[str, dict[str, torch.Tensor]]
    facts: dict[str, Any]


class OtherSchemaError(CheckpointError):
    """A checkpoint of another version of paml: whole, but not for this one to read."""


def _folder(run_folder: str) -> str:
    return storage.join(run_folder, "checkpoints")


def checkpoint_name(step: int) -> str:
    """The folder's name for a count of optimiser steps."""
    return f"step-{step:09d}"


def write_checkpoint(run_folder: str, step: int, checkpoint: Checkpoint) -> str:
    """Write all files, then COMMIT; returns the folder's name. A folder left without COMMIT is written anew."""
    name = checkpoint_name(step)
    folder = storage.join(_folder(run_folder), name)
    if storage.exists(storage.join(folder, "COMMIT")):
        try:
            read_checkpoint(run_folder, name)
            return name  # the same step of the same run computes the same bits
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
    """Read and verify; `groups` limits which tensors are read (None: all).

    Raises CheckpointError where COMMIT is absent, a file differs in size or digest, or is no safetensors or JSON at
    all, OtherSchemaError where another version of paml wrote it.
    """
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{name!r} is no checkpoint's name, which is step- and nine digits")
    folder = storage.join(_folder(run_folder), name)
    try:
        listed = storage.read_bytes(storage.join(folder, "COMMIT"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no COMMIT: it was never finished") from error
    with reading(f"{folder}/COMMIT", _MEND, CheckpointError):
        commit = parse_object(listed)
        version = commit["schema_version"]
        files = {file: (fact["size"], fact["sha256"]) for file, fact in commit["files"].items()}
    if version != SCHEMA_VERSION:
        raise OtherSchemaError(
            f"{folder} has schema version {version}, this paml reads {SCHEMA_VERSION}: go on with the paml that wrote "
            "it, or begin a run of another run.name"
        )
    other = [file for file in files if not _FILE.fullmatch(file)]
    if other:
        raise CheckpointError(f"{folder}/COMMIT is damaged: it lists {other[0]!r}, which is no file of a checkpoint")
    contents: dict[str, bytes] = {}
    for file, (size, sha256) in files.items():
        group = file.removesuffix(".safetensors")
        if file != "facts.json" and groups is not None and group not in groups:
            continue
        try:
            data = storage.read_bytes(storage.join(folder, file))
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder}/{file} is missing") from error
        if len(data) != size:
            raise CheckpointError(f"{folder}/{file} is damaged: it has {len(data)} bytes, written were {size}")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise CheckpointError(f"{folder}/{file} is damaged: its SHA-256 differs from that of what was written")
        contents[file] = data
    if "facts.json" not in contents:
        raise CheckpointError(f"{folder}/COMMIT is damaged: it does not list facts.json")
    with reading(f"{folder}/facts.json", _MEND, CheckpointError):
        facts = parse_object(contents.pop("facts.json"))
    tensors = {}
    for file, data in contents.items():
        with reading(f"{folder}/{file}", _MEND, CheckpointError, (SafetensorError,)):
            tensors[file.removesuffix(".safetensors")] = load(data)
    return Checkpoint(tensors, facts)


def committed(run_folder: str) -> list[str]:
    """Names of the folders that have a COMMIT, oldest first."""
    files = storage.list_files(_folder(run_folder))
    return sorted(name for name in {f.split("/")[0] for f in files if f.endswith("/COMMIT")} if _NAME.fullmatch(name))


def newest_checkpoint(run_folder: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint (None where there is none) and what was wrong with newer ones.

    Raises OtherSchemaError rather than pass over what another paml wrote: that would begin the run anew.
    """
    faults: list[str] = []
    for name in reversed(committed(run_folder)):
        try:
            return read_checkpoint(run_folder, name), faults
        except OtherSchemaError:
            raise
        except CheckpointError as error:
            faults.append(str(error))
    return None, faults


def tidy(run_folder: str, *, newest: str, keep: int | None, also: set[str]) -> None:
    """Remove all but the `keep` checkpoints up to `newest` and those named in `also`, and any never finished.

    One after `newest`, which was just written, was found damaged when the run was taken up: it goes too.
    """
    whole = [name for name in committed(run_folder) if name <= newest]
    kept = set(whole if keep is None else whole[-keep:]) | also
    found = {file.split("/")[0] for file in storage.list_files(_folder(run_folder))}
    for name in sorted(found - kept):
        if _NAME.fullmatch(name):
            _remove(storage.join(_folder(run_folder), name))


def _remove(folder: str) -> None:
    """COMMIT first, so that a removal cut short leaves nothing that looks whole."""
    storage.delete(storage.join(folder, "COMMIT"))
    storage.delete_folder(folder)
