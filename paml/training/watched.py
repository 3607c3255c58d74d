"""A few labels of the validation split whose maps are kept after every epoch, so that one sees them come about."""

from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from paml import storage
from paml.data.decode import decode_into
from paml.data.device import Normalise
from paml.errors import PamlError
from paml.labels.states import POSITIVE
from paml.models.boost import boost_lu
from paml.models.cam import CamClassifier, pool_logits
from paml.reading import reading
from paml.shards.reader import ShardReader
from paml.training.data import Split
from paml.training.evaluate import evaluating

COUNT = 4
_LOOKED_AT = 400
"""Images looked through for labels: one with few observed positives need not be read to its end."""


class Watched(NamedTuple):
    """A positive label of an image."""

    pixels: np.ndarray
    """uint8 [S, S, 3], as the network is scored on it."""
    cls: int


def watched_labels(split: Split, size: int, seed: int) -> list[Watched]:
    """Up to COUNT positives of distinct classes in distinct images, the same for the same data, `size` and `seed`.

    size: side of the pictures, pixels. Fewer where the first images of a seeded order hold no more classes; an image
    that cannot be read is passed over (scoring has named it).
    """
    reader = ShardReader(split.manifest)
    drawn = np.random.default_rng(seed).permutation(len(split.samples))[:_LOOKED_AT]
    found: list[Watched] = []
    for sample in drawn.tolist():
        labels = split.table.lookup(split.samples.row[[sample]])
        seen = {label.cls for label in found}
        new = [int(cls) for cls in labels.cls[labels.state == POSITIVE] if int(cls) not in seen]
        if not new:
            continue
        pixels = np.empty((size, size, 3), np.uint8)
        try:
            decode_into(reader.read(int(split.samples.index[sample])), pixels)
        except (PamlError, OSError):
            continue
        found.append(Watched(pixels, new[0]))
        if len(found) == COUNT:
            break
    return found


@torch.inference_mode()
def keep_maps(
    run_folder: str,
    epoch: int,
    labels: list[Watched],
    model: CamClassifier,
    normalise: Normalise,
    alpha: float,
) -> None:
    """Write each label's map [H, W] as boosted with `alpha`, float32, and its logit, for this epoch of the run.

    Worked out in float32, whatever the run's precision.
    """
    device = model.head.weight.device
    tensors: dict[str, torch.Tensor] = {}
    with evaluating(model):
        for place, label in enumerate(labels):
            maps_BKHW = model.maps(normalise(torch.from_numpy(label.pixels)[None].to(device), None)).float()
            tensors[f"map.{place}"] = boost_lu(maps_BKHW[0, label.cls], alpha).cpu().contiguous()
            tensors[f"logit.{place}"] = pool_logits(maps_BKHW, alpha)[0, label.cls].cpu()
    storage.write_bytes(_path(run_folder, epoch), save(tensors))


def kept_maps(run_folder: str, epoch: int) -> list[tuple[np.ndarray, float]] | None:
    """(map, logit) of each watched label after an epoch; None where none were kept. Raises DataError."""
    path = _path(run_folder, epoch)
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return None
    with reading(path, "remove it: that epoch is then left out of the picture", also=(SafetensorError, RuntimeError)):
        tensors = load(data)
        places = range(len(tensors) // 2)
        return [(tensors[f"map.{place}"].numpy(), float(tensors[f"logit.{place}"])) for place in places]


def _path(run_folder: str, epoch: int) -> str:
    return storage.join(run_folder, "maps", f"epoch-{epoch:04d}.safetensors")
