"""Evidence for label issues: logits of all checkpoints, maps and thumbnails."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from paml.audit.issues import LabelIssues
from paml.audit.page import map_grays, thumbnail
from paml.data.decode import decode_rgb
from paml.data.loader import Batch
from paml.errors import DataError
from paml.models.boost import boost_lu
from paml.models.cam import pool_logits
from paml.runs.spec import OpenRun, load_model, open_runs
from paml.shards.reader import ShardReader
from paml.training.checkpoint import list_checkpoints, read_checkpoint
from paml.training.data import Split


def open_checkpoints(spec: str, count: int | None = None, device: torch.device | str = "cpu") -> list[OpenRun]:
    """Open the checkpoint that FOLDER[@CHECKPOINT][:alpha=A] names, which comes last, and older ones at ends of epochs.

    count: number of checkpoints in total; None opens all. Raises SettingsError, DataError, CheckpointError.
    """
    (run,) = checkpoints = open_runs({"": spec}, device)
    for name in reversed([name for name in list_checkpoints(run.folder) if name < run.checkpoint]):
        if len(checkpoints) == count:
            break
        if read_checkpoint(run.folder, name, groups=()).facts["step"] == 0:
            model = load_model(run.folder, run.settings, name).to(device)
            checkpoints.insert(0, dataclasses.replace(run, checkpoint=name, model=model))
    return checkpoints


class IssueImages(NamedTuple):
    """What the images of n issues show."""

    logits: np.ndarray
    """float32 [n, C]."""
    maps: list[np.ndarray]
    """uint8 [h, w] for each issue, of the newest checkpoint, as `map_grays` returns it."""
    thumbnails: list[bytes]
    """JPEG, one for each image."""
    thumbnail_of: dict[int, int]
    """Position of an image in the manifest to its position in `thumbnails`."""


def read_issue_images(
    checkpoints: Sequence[OpenRun], issues: LabelIssues, split: Split, batches: Iterable[Batch], reader: ShardReader
) -> IssueImages:
    """Read the images of the issues again and compute logits, maps and thumbnails.

    batches: of the images that have an issue. Raises DataError if an image can no longer be read.
    """
    logits = np.empty((len(issues), len(checkpoints)), np.float32)
    grays: list[np.ndarray] = [np.zeros((1, 1), np.uint8)] * len(issues)
    issues_of: dict[int, list[int]] = {}
    for number, index in enumerate(issues.image.tolist()):
        issues_of.setdefault(index, []).append(number)
    thumbnails: list[bytes] = []
    thumbnail_of: dict[int, int] = {}
    alpha = checkpoints[-1].alpha
    for batch in batches:
        maps = [checkpoint.maps(batch.images) for checkpoint in checkpoints]
        logits_CBK = np.stack([pool_logits(maps_BKHW, alpha).cpu().numpy() for maps_BKHW in maps])
        maps_BKHW = boost_lu(maps[-1], alpha).cpu().numpy()
        for image, index in enumerate(batch.index.tolist()):
            thumbnail_of[index] = len(thumbnails)
            thumbnails.append(thumbnail(decode_rgb(reader.read(index))))
            for number in issues_of[index]:
                logits[number] = logits_CBK[:, image, issues.cls[number]]
                grays[number] = map_grays(maps_BKHW[image, issues.cls[number]])
    for index in issues_of.keys() - thumbnail_of.keys():
        key = split.manifest.key(index)
        raise DataError(
            f"image {key} was scored but cannot be read again, because the shards changed: restart the audit"
        )
    return IssueImages(logits, grays, thumbnails, thumbnail_of)
