"""The rejected labels of an epoch that are saved for inspection: highest losses, a random sample, counts per class.

The selection has a fixed size and depends on the logits of the epoch only, not on the number of workers or on where
the run was resumed. Axes: B images, K classes.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load, save

from paml import storage
from paml.losses.blocks import nonzero_positions

NUM_HIGHEST_LOSS = 24
"""Number of labels saved for their high loss."""
NUM_SAMPLED = 24
"""Number of labels saved as a random sample of all rejected ones."""

_ODD, _OTHER_ODD, _LARGEST = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, (1 << 63) - 1


class StepRejections(NamedTuple):
    """The labels rejected in a step: all of them, or those that an epoch may save."""

    entries: torch.Tensor
    """int64 [n], image in the batch × K + class. May contain duplicates."""
    logits: torch.Tensor
    """float32 [n]; -inf for entries that were not rejected."""
    by_class: torch.Tensor
    """int64 [2, K]: number of rejected labels, and of false negatives among them (0 if the truth is unknown)."""


class EpochRejections:
    """The saved labels of an epoch, of one worker or merged over all."""

    def __init__(self, num_classes: int, seed: int, epoch: int) -> None:
        self.by_class = np.zeros((2, num_classes), np.int64)
        """Number of rejected labels per class, and of false negatives among them."""
        self.codes = np.empty(0, np.int64)
        """int64 [n], position in the manifest × K + class, sorted; n ≤ NUM_HIGHEST_LOSS + NUM_SAMPLED."""
        self.logits = np.empty(0, np.float32)
        """float32 [n]."""
        self.salt = (seed * 1_000_003 + epoch) * 2_654_435_761 % _LARGEST

    def arrays(self) -> dict[str, np.ndarray]:
        """The arguments of `add` that give these labels."""
        return {"codes": self.codes, "logits": self.logits, "by_class": self.by_class}

    def add(self, codes: np.ndarray, logits: np.ndarray, by_class: np.ndarray) -> None:
        """Add labels of a step or of another worker. Labels that are saved already may be among them."""
        self.by_class += by_class
        if len(self.codes) >= max(NUM_HIGHEST_LOSS, NUM_SAMPLED):  # skip most labels without sorting them
            lowest = np.partition(self.logits, -NUM_HIGHEST_LOSS)[-NUM_HIGHEST_LOSS]
            last = np.partition(sample_key(self.codes, self.salt), NUM_SAMPLED - 1)[NUM_SAMPLED - 1]
            candidates = (logits >= lowest) | (sample_key(codes, self.salt) <= last)
            codes, logits = codes[candidates], logits[candidates]
        if not len(codes):
            return
        self.codes, first = np.unique(np.concatenate([self.codes, codes]), return_index=True)
        self.logits = np.concatenate([self.logits, logits])[first]
        selected = np.union1d(self.highest_loss(), self.random_sample())
        self.codes, self.logits = self.codes[selected], self.logits[selected]

    def add_step(self, step: StepRejections, index_B: np.ndarray) -> None:
        """Add the labels of a step, which must be on the CPU. index_B: int64, positions in the manifest."""
        entries, logits, by_class = (tensor.numpy() for tensor in step)
        entries, logits = entries[logits > -np.inf], logits[logits > -np.inf]
        num_classes = by_class.shape[1]
        self.add(index_B[entries // num_classes] * num_classes + entries % num_classes, logits, by_class)

    def highest_loss(self) -> np.ndarray:
        """int64, positions in `codes` of the labels with the highest losses, in descending order."""
        return np.argsort(-self.logits, kind="stable")[:NUM_HIGHEST_LOSS]

    def random_sample(self) -> np.ndarray:
        """int64, positions in `codes` of the random sample, in random order."""
        return np.argsort(sample_key(self.codes, self.salt), kind="stable")[:NUM_SAMPLED]


def sample_key(codes: Any, salt: int) -> Any:
    """Pseudorandom number in [0, 2^63) for each code: int64, from numpy to numpy and from torch to torch."""
    mixed = (codes ^ salt) * _ODD
    mixed = (mixed ^ (mixed >> 32)) * _OTHER_ODD
    mixed = (mixed ^ (mixed >> 29)) * _ODD
    return (mixed ^ (mixed >> 32)) & _LARGEST


def find_rejections(
    logits_BK: torch.Tensor,
    rejected_BK: torch.Tensor,
    false_BK: torch.Tensor | None,
    index_B: torch.Tensor,
    salt: int,
) -> StepRejections:
    """The labels rejected in a step: all of them on a CPU, the candidates of `EpochRejections` on a GPU.

    logits_BK: logits that the rejection was based on. false_BK: bool, the false negatives, if the truth is known.
    index_B: int64, positions in the manifest. All on one device; nothing waits for a GPU.
    """
    logits_BK, num_classes = logits_BK.detach().float(), rejected_BK.shape[1]
    if rejected_BK.device.type == "cpu":
        entries = nonzero_positions(rejected_BK.numpy().reshape(-1))
        false = entries[:0] if false_BK is None else entries[false_BK.numpy().reshape(-1)[entries]]
        by_class = [np.bincount(group % num_classes, minlength=num_classes) for group in (entries, false)]
        index = torch.from_numpy(entries)
        return StepRejections(index, logits_BK.reshape(-1)[index], torch.from_numpy(np.stack(by_class)))
    return _candidates(logits_BK, rejected_BK, false_BK, index_B, salt)


def _candidates(
    logits_BK: torch.Tensor,
    rejected_BK: torch.Tensor,
    false_BK: torch.Tensor | None,
    index_B: torch.Tensor,
    salt: int,
) -> StepRejections:
    """A selection whose shape does not depend on the number of rejected labels, which would require a sync."""
    num_classes = rejected_BK.shape[1]
    logits = torch.where(rejected_BK, logits_BK, -torch.inf).reshape(-1)
    codes_BK = index_B[:, None] * num_classes + torch.arange(num_classes, device=index_B.device)
    keys = torch.where(rejected_BK, sample_key(codes_BK, salt), _LARGEST).reshape(-1)
    highest_loss = logits.topk(min(NUM_HIGHEST_LOSS, len(logits))).indices
    sampled = keys.topk(min(NUM_SAMPLED, len(keys)), largest=False).indices
    entries = torch.cat([highest_loss, sampled])
    false_BK = torch.zeros_like(rejected_BK) if false_BK is None else false_BK & rejected_BK
    return StepRejections(entries, logits[entries], torch.stack([rejected_BK.sum(0), false_BK.sum(0)]))


def save_rejected(run_folder: str, epoch: int, rejections: EpochRejections) -> None:
    """Write an epoch's labels to the run folder, or nothing if no label was rejected."""
    if rejections.by_class[0].any():
        storage.write_bytes(_path(run_folder, epoch), save(rejections.arrays()))


def load_rejected(run_folder: str, epoch: int, seed: int) -> EpochRejections | None:
    """The labels saved by `save_rejected` in a run with this seed; None if the epoch rejected nothing."""
    try:
        arrays = load(storage.read_bytes(_path(run_folder, epoch)))
    except FileNotFoundError:
        return None
    rejections = EpochRejections(arrays["by_class"].shape[1], seed, epoch)
    rejections.add(**arrays)
    return rejections


def _path(run_folder: str, epoch: int) -> str:
    return storage.join(run_folder, "rejected", f"epoch-{epoch:04d}.safetensors")
