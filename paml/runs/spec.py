"""Trained models named on a command line: FOLDER[@CHECKPOINT][:alpha=A], such as `runs/an@best:alpha=5`."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from paml.errors import CheckpointError, DataError, SettingsError
from paml.models.cam import CamClassifier, build_model
from paml.parsing import parse_errors_as
from paml.runs.folder import settings_of_run
from paml.training.checkpoint import list_checkpoints, read_checkpoint
from paml.training.data import Split, check_same_classes, open_split
from paml.training.evaluate import normalizer_of
from paml.training.settings import TrainSettings

_SPEC = re.compile(r"(?P<folder>.+?)(?:@(?P<checkpoint>[^@/:=]+))?(?::alpha=(?P<alpha>[^@/:=]+))?")


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A checkpoint of a run with its network in evaluation mode."""

    title: str
    folder: str
    checkpoint: str
    alpha: float
    """Boost of the maps in scoring."""
    settings: TrainSettings
    model: CamClassifier
    history: list[dict[str, Any]]
    """Metrics of every epoch of the run, also of those after the checkpoint."""

    @torch.inference_mode()
    def maps(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        """Raw maps, float32 [B, K, h, w], of uint8 images [B, H, W, 3].

        Computed in float32 whatever the training precision: ties between 16-bit scores would distort ranks.
        """
        device = self.model.head.weight.device
        return self.model.maps(normalizer_of(self.model, device)(images_BHWC.to(device), None)).float()


def open_runs(specs: Mapping[str, str], device: torch.device | str = "cpu") -> list[OpenRun]:
    """Open runs by title.

    The checkpoint is `best` (default: by validation mAP at that alpha, or at boost.eval if the run did not score that
    alpha), `newest` or a name such as step-000001234. Alpha defaults to the run's boost.eval. Titles of the same
    checkpoint share one network. Raises SettingsError, DataError, CheckpointError.
    """
    opened: list[OpenRun] = []
    for title, spec in specs.items():
        folder, which, alpha = parse_run(spec)
        settings = settings_of_run(folder)
        alpha = settings.boost.eval if alpha is None else alpha
        name, facts = choose_checkpoint(folder, settings, which, alpha)
        same = [run.model for run in opened if (run.folder, run.checkpoint) == (folder, name)]
        model = same[0] if same else load_model(folder, settings, name).to(device)
        opened.append(OpenRun(title, folder, name, alpha, settings, model, facts["history"]))
    return opened


def training_split_of(run: OpenRun, split: Split, root: str | None = None) -> tuple[Split, int]:
    """The training images and labels of a run that scores `split`, and the side of its images in pixels.

    root: prepared data folder; None uses the run's data.root. Raises SettingsError, DataError if `split` has other
    classes.
    """
    outputs = run.model.head.out_channels
    if outputs != split.table.num_classes:
        raise SettingsError(
            f"the run {run.folder} has {outputs} classes, {split.table.path} has {split.table.num_classes}: use a run "
            "and a table of the same classes"
        )
    shape, channels = split.manifest.settings.get("shape"), run.model.info.channels
    if run.model.info.embeddings and (shape or [0])[0] != channels:
        raise SettingsError(
            f"the run {run.folder} was trained on embeddings of {channels} values, those of {split.name} have shape "
            f"{shape}: use embeddings of the same network"
        )
    data = dataclasses.replace(run.settings.data, root=root or run.settings.data.root)
    train = open_split(data, data.train_split, data.train_labels, images=data.images)
    check_same_classes(train.table, split.table)
    return train, data.image_size or train.image_size


def parse_run(spec: str) -> tuple[str, str, float | None]:
    """(folder, checkpoint, alpha or None) of FOLDER[@CHECKPOINT][:alpha=A]. Raises SettingsError."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise SettingsError(
            f"cannot parse the run {spec!r}: use FOLDER[@CHECKPOINT][:alpha=A], as in runs/an@best:alpha=5"
        )
    alpha = None
    if match["alpha"] is not None:
        try:
            alpha = float(match["alpha"])
        except ValueError:
            alpha = math.nan
        if not (math.isfinite(alpha) and alpha >= 1):
            raise SettingsError(f"alpha of the run {spec!r} is {match['alpha']}; it must be at least 1 (1: no boost)")
    return match["folder"].rstrip("/") or "/", match["checkpoint"] or "best", alpha


def choose_checkpoint(run_folder: str, run: TrainSettings, which: str, alpha: float) -> tuple[str, dict[str, Any]]:
    """(name of the checkpoint, metadata of the run's newest one).

    which: as in `open_runs`. Raises DataError if the run has no checkpoint, or no best one, SettingsError for an
    unknown name.
    """
    names = list_checkpoints(run_folder)
    if not names:
        raise DataError(f"{run_folder} has no complete checkpoint yet: wait for the first one")
    facts = read_checkpoint(run_folder, names[-1], groups=()).facts
    with parse_errors_as(f"{run_folder}/checkpoints/{names[-1]}", "copy the run again", CheckpointError):
        best = facts["best"].get(f"{alpha:g}", facts["best"].get(f"{run.boost.eval:g}"))
        best_name = best["checkpoint"] if best else ""
    if which == "best" and best is None:
        raise DataError(
            f"{run_folder} has no best checkpoint yet, because no end-to-end epoch is complete: wait, or use newest"
        )
    name = {"newest": names[-1], "best": best_name}.get(which, which)
    if name not in names:
        raise SettingsError(f"{run_folder} has no checkpoint {name!r}; it has {', '.join(names)}")
    return name, facts


def load_model(run_folder: str, run: TrainSettings, name: str) -> CamClassifier:
    """The network of a checkpoint in evaluation mode, with EMA weights if the run keeps them.

    Raises CheckpointError, also if the weights do not fit the run's network.
    """
    group = "ema" if run.optimizer.ema_decay else "weights"
    checkpoint = read_checkpoint(run_folder, name, groups=(group,))
    path = f"{run_folder}/checkpoints/{name}"
    with parse_errors_as(path, "copy the run again", CheckpointError, (RuntimeError,)):
        model = build_model(dataclasses.replace(run.model, weights=None), checkpoint.facts["num_classes"])
        model.load_state_dict(checkpoint.tensors[group])
    return model.eval()
