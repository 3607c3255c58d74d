"""Runs as they are compared: a title, a checkpoint, and the alpha that its maps are boosted with."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from paml.data.device import Normaliser
from paml.errors import SettingsError
from paml.models.cam import CamClassifier
from paml.training.score_run import choose_checkpoint, load_model, settings_of_run
from paml.training.settings import TrainSettings

_SPEC = re.compile(r"(?P<folder>.+?)(?:@(?P<checkpoint>[^@/:=]+))?(?::alpha=(?P<alpha>[^@/:=]+))?")


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A checkpoint of a run with its network, in evaluation mode."""

    title: str
    folder: str
    checkpoint: str
    alpha: float
    """Boost of its maps in scoring."""
    settings: TrainSettings
    model: CamClassifier
    history: list[dict[str, Any]]
    """Figures by epoch, of the whole run and not only up to the checkpoint."""

    @torch.inference_mode()
    def maps(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        """Raw maps, float32 [B, K, h, w], of uint8 images [B, H, W, 3].

        In float32 whatever the run was trained in: 16-bit scores would tie, and ties blur ranks.
        """
        device = self.model.head.weight.device
        normalise = Normaliser(self.settings.model.pixel_mean, self.settings.model.pixel_std, device)
        return self.model.maps(normalise(images_BHWC.to(device))).float()


def open_runs(specs: Mapping[str, str], device: torch.device | str = "cpu") -> list[OpenRun]:
    """Open titled runs, each given as FOLDER[@CHECKPOINT][:alpha=A], such as `runs/an@best:alpha=5`.

    The checkpoint is 'best' (the default: by validation when scored with that alpha, or with the run's boost.eval
    where it did not score that alpha), 'newest' or a name such as step-000001234; alpha is boost.eval unless given.
    Titles of one checkpoint share one network. Raises SettingsError, DataError, CheckpointError.
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


def parse_run(spec: str) -> tuple[str, str, float | None]:
    """(folder, checkpoint, alpha or None) of FOLDER[@CHECKPOINT][:alpha=A]. Raises SettingsError."""
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise SettingsError(f"the run {spec!r} is not FOLDER[@CHECKPOINT][:alpha=A], such as runs/an@best:alpha=5")
    alpha = None
    if found["alpha"] is not None:
        try:
            alpha = float(found["alpha"])
        except ValueError:
            alpha = math.nan
        if not (math.isfinite(alpha) and alpha >= 1):
            raise SettingsError(f"alpha of the run {spec!r} is {found['alpha']}; it must be at least 1 (1 is no boost)")
    return found["folder"].rstrip("/") or "/", found["checkpoint"] or "best", alpha
