"""The rejected labels of an epoch that are kept to be looked at: the strongest, an even sample, and counts by class.

What is kept is bounded whatever the epoch holds, and depends on the epoch's logits alone: not on the workers, nor on
whether the run was broken off and taken up. Axes: B images, K classes.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load, save

from paml import storage
from paml.losses.blocks import true_places

STRONGEST = 24
"""Labels kept of an epoch for their loss."""
DRAWN = 24
"""Labels kept of an epoch by lot: an even sample of all that were rejected, whatever their loss."""

_ODD, _OTHER_ODD, _LARGEST = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, (1 << 63) - 1


class Found(NamedTuple):
    """What a step has rejected, as far as an epoch may keep it."""

    places: torch.Tensor
    """int64 [n], image of the batch x K + class; some may stand twice."""
    logits: torch.Tensor
    """float32 [n]; -inf where the place was not rejected."""
    by_class: torch.Tensor
    """int64 [2, K]: labels rejected, and of them false negatives (0 where the truth is not known)."""


class Rejected:
    """What is kept of an epoch's rejected labels by one worker, or by all of them once they are merged."""

    def __init__(self, num_classes: int, seed: int, epoch: int) -> None:
        self.by_class = np.zeros((2, num_classes), np.int64)
        """Labels rejected, and of them false negatives."""
        self.codes = np.empty(0, np.int64)
        """int64 [n], image's place in the manifest x K + class, in rising order; n <= STRONGEST + DRAWN."""
        self.logits = np.empty(0, np.float32)
        """float32 [n]."""
        self.salt = (seed * 1_000_003 + epoch) * 2_654_435_761 % _LARGEST

    def add(self, codes: np.ndarray, logits: np.ndarray, by_class: np.ndarray) -> None:
        """Take in what a step, or another worker, has found; labels that are kept already may be among it."""
        self.by_class += by_class
        if len(self.codes) >= max(STRONGEST, DRAWN):  # most of a step's need not be sorted
            floor = np.partition(self.logits, -STRONGEST)[-STRONGEST]
            last = np.partition(lot(self.codes, self.salt), DRAWN - 1)[DRAWN - 1]
            may = (logits >= floor) | (lot(codes, self.salt) <= last)
            codes, logits = codes[may], logits[may]
        if not len(codes):
            return
        codes, first = np.unique(np.concatenate([self.codes, codes]), return_index=True)
        logits = np.concatenate([self.logits, logits])[first]
        kept = np.union1d(_strongest(logits), _drawn(codes, self.salt))
        self.codes, self.logits = codes[kept], logits[kept]

    def strongest(self) -> np.ndarray:
        """int64, places in `codes` of the labels with the highest loss, the highest first."""
        return _strongest(self.logits)

    def drawn(self) -> np.ndarray:
        """int64, places in `codes` of the labels drawn by lot, in the order of the lot."""
        return _drawn(self.codes, self.salt)


def lot(codes: Any, salt: int) -> Any:
    """A number in [0, 2^63) for each code, as if by chance: int64, of numpy or torch, in and out."""
    mixed = (codes ^ salt) * _ODD
    mixed = (mixed ^ (mixed >> 32)) * _OTHER_ODD
    mixed = (mixed ^ (mixed >> 29)) * _ODD
    return (mixed ^ (mixed >> 32)) & _LARGEST


def _strongest(logits: np.ndarray) -> np.ndarray:
    return np.argsort(-logits, kind="stable")[:STRONGEST]


def _drawn(codes: np.ndarray, salt: int) -> np.ndarray:
    return np.argsort(lot(codes, salt), kind="stable")[:DRAWN]


def find_rejected(
    logits_BK: torch.Tensor,
    rejected_BK: torch.Tensor,
    false_BK: torch.Tensor | None,
    index_B: torch.Tensor,
    salt: int,
) -> Found:
    """What a step has rejected: on a CPU all of it, elsewhere all that an epoch may keep of it, without waiting.

    logits_BK: of the network that chose the labels. false_BK: bool, false negatives, where the truth is known. index_B:
    int64, the images' places in the manifest. All on one device.
    """
    logits_BK = logits_BK.detach().float()
    if rejected_BK.device.type == "cpu":
        return _all(logits_BK, rejected_BK, false_BK)
    return _bounded(logits_BK, rejected_BK, false_BK, index_B, salt)


def _all(logits_BK: torch.Tensor, rejected_BK: torch.Tensor, false_BK: torch.Tensor | None) -> Found:
    classes = rejected_BK.shape[1]
    places = true_places(rejected_BK.numpy().reshape(-1))
    true = places[:0] if false_BK is None else places[false_BK.numpy().reshape(-1)[places]]
    counts = [np.bincount(found % classes, minlength=classes) for found in (places, true)]
    where = torch.from_numpy(places)
    return Found(where, logits_BK.reshape(-1)[where], torch.from_numpy(np.stack(counts)))


def _bounded(
    logits_BK: torch.Tensor,
    rejected_BK: torch.Tensor,
    false_BK: torch.Tensor | None,
    index_B: torch.Tensor,
    salt: int,
) -> Found:
    """Of shapes that do not depend on what was rejected."""
    classes = rejected_BK.shape[1]
    flat = torch.where(rejected_BK, logits_BK, -torch.inf).reshape(-1)
    codes_BK = index_B[:, None] * classes + torch.arange(classes, device=index_B.device)
    lots = torch.where(rejected_BK, lot(codes_BK, salt), _LARGEST).reshape(-1)
    strongest = flat.topk(min(STRONGEST, len(flat))).indices
    drawn = lots.topk(min(DRAWN, len(flat)), largest=False).indices
    places = torch.cat([strongest, drawn])
    true_BK = torch.zeros_like(rejected_BK) if false_BK is None else false_BK & rejected_BK
    return Found(places, flat[places], torch.stack([rejected_BK.sum(0), true_BK.sum(0)]))


def add_found(kept: Rejected, found: Found, index_B: np.ndarray) -> None:
    """Take a step's findings, on the CPU by now, into what is kept. index_B: int64, the images' places."""
    places, logits, by_class = (tensor.numpy() for tensor in found)
    places, logits = places[logits > -np.inf], logits[logits > -np.inf]
    classes = by_class.shape[1]
    kept.add(index_B[places // classes] * classes + places % classes, logits, by_class)


def keep_rejected(run_folder: str, epoch: int, kept: Rejected) -> None:
    """Write what is kept of an epoch into the run's folder, in the place of what stood there; nothing of nothing."""
    if kept.by_class[0].any():
        facts = {"codes": kept.codes, "logits": kept.logits, "by_class": kept.by_class}
        storage.write_bytes(_path(run_folder, epoch), save(facts))


def kept_rejected(run_folder: str, epoch: int, seed: int) -> Rejected | None:
    """What `keep_rejected` wrote, of a run of this seed; None where the epoch rejected nothing."""
    try:
        facts = load(storage.read_bytes(_path(run_folder, epoch)))
    except FileNotFoundError:
        return None
    kept = Rejected(facts["by_class"].shape[1], seed, epoch)
    kept.add(facts["codes"], facts["logits"], facts["by_class"])
    return kept


def _path(run_folder: str, epoch: int) -> str:
    return storage.join(run_folder, "rejected", f"epoch-{epoch:04d}.safetensors")
