"""Saves the maps of a few validation labels after every epoch, to show how they develop."""

from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from paml import storage
from paml.data.decode import decode_into
from paml.errors import PamlError
from paml.labels.states import POSITIVE
from paml.models.boost import boost_lu
from paml.models.cam import CamClassifier, pool_logits
from paml.parsing import parse_errors_as
from paml.shards.reader import ShardReader
from paml.training.data import Split
from paml.training.evaluate import evaluation_mode, normalizer_of

COUNT = 4
_MAX_IMAGES = 400
"""Images to search for positive labels."""


class WatchedLabel(NamedTuple):
    """A positive label of an image."""

    pixels: np.ndarray
    """uint8 [S, S, 3], as in evaluation."""
    cls: int


def watched_labels(split: Split, size: int, seed: int) -> list[WatchedLabel]:
    """Up to COUNT positive labels of distinct classes and images; the same for the same data, `size` and `seed`.

    size: side of the images in pixels. Unreadable images are skipped; evaluation reports them.
    """
    reader = ShardReader(split.manifest)
    samples = np.random.default_rng(seed).permutation(len(split.samples))[:_MAX_IMAGES]
    watched: list[WatchedLabel] = []
    for sample in samples.tolist():
        labels = split.table.lookup(split.samples.row[[sample]])
        classes = {label.cls for label in watched}
        new = [int(cls) for cls in labels.cls[labels.state == POSITIVE] if int(cls) not in classes]
        if not new:
            continue
        pixels = np.empty((size, size, 3), np.uint8)
        try:
            decode_into(reader.read(int(split.samples.index[sample])), pixels)
        except (PamlError, OSError):
            continue
        watched.append(WatchedLabel(pixels, new[0]))
        if len(watched) == COUNT:
            break
    return watched


@torch.inference_mode()
def save_maps(run_folder: str, epoch: int, labels: list[WatchedLabel], model: CamClassifier, alpha: float) -> None:
    """Write the map [H, W] of each label, boosted with `alpha`, and its logit; computed in float32."""
    device = model.head.weight.device
    normalize, tensors = normalizer_of(model, device), dict[str, torch.Tensor]()
    with evaluation_mode(model):
        for position, label in enumerate(labels):
            maps_BKHW = model.maps(normalize(torch.from_numpy(label.pixels)[None].to(device), None)).float()
            tensors[f"map.{position}"] = boost_lu(maps_BKHW[0, label.cls], alpha).cpu().contiguous()
            tensors[f"logit.{position}"] = pool_logits(maps_BKHW, alpha)[0, label.cls].cpu()
    storage.write_bytes(_path(run_folder, epoch), save(tensors))


def load_maps(run_folder: str, epoch: int) -> list[tuple[np.ndarray, float]] | None:
    """(map, logit) of each watched label after an epoch; None if there are none. Raises DataError."""
    path = _path(run_folder, epoch)
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return None
    with parse_errors_as(path, "remove it to omit that epoch from the plot", also=(SafetensorError, RuntimeError)):
        tensors = load(data)
        positions = range(len(tensors) // 2)
        return [(tensors[f"map.{position}"].numpy(), float(tensors[f"logit.{position}"])) for position in positions]


def _path(run_folder: str, epoch: int) -> str:
    return storage.join(run_folder, "maps", f"epoch-{epoch:04d}.safetensors")
