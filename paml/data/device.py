"""Copy a batch to its device: normalize and mirror the images, scatter the labels to state matrices."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from paml.data.loader import Batch, LabelTriples
from paml.labels.states import UNOBSERVED


class DeviceBatch(NamedTuple):
    """A worker's part of a batch: b images, K classes."""

    images_BCHW: torch.Tensor
    """float32, normalized, channels_last in memory."""
    state_BK: torch.Tensor
    """int8, the label states for training."""
    probe_BK: torch.Tensor
    """int8, the hidden observed labels."""
    truth_BK: torch.Tensor | None
    """int8, full labels, if known."""
    slots_B: torch.Tensor
    """int64, slots in the global batch."""


def scatter_states(triples: LabelTriples, images: int, num_classes: int) -> torch.Tensor:
    """int8 [b, K] on the device of the triples; UNOBSERVED without a triple."""
    state_BK = torch.full((images, num_classes), UNOBSERVED, dtype=torch.int8, device=triples.image.device)
    state_BK.view(-1).index_copy_(0, triples.image * num_classes + triples.cls, triples.state)
    return state_BK


class Normalizer:
    """Converts uint8 RGB to the value range of the backbone."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.scale = (1.0 / (255.0 * torch.tensor(std))).view(1, 3, 1, 1).to(device)
        self.shift = (-torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1).to(device)

    def __call__(self, images_BHWC: torch.Tensor, flips_B: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 [b, H, W, 3] and bool [b] to float32 [b, 3, H, W], channels_last in memory."""
        images = images_BHWC.permute(0, 3, 1, 2)
        if flips_B is not None:
            images = torch.where(flips_B.view(-1, 1, 1, 1), images.flip(3), images)
        return torch.addcmul(self.shift, images.float(), self.scale).contiguous(memory_format=torch.channels_last)


def features_as_float(features_BHWC: torch.Tensor, flips_B: torch.Tensor | None = None) -> torch.Tensor:
    """float16 or float32 [b, h, w, C] to float32 [b, C, h, w], channels_last in memory. They are already mirrored."""
    return features_BHWC.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)


Normalize = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Converts a batch's images (or cached features) and flips to the network's input."""


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a device; asynchronously to a GPU."""
    if device.type == "cpu":
        return tensor
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def to_device(batch: Batch, num_classes: int, normalize: Normalize, device: torch.device) -> DeviceBatch:
    """Copy and prepare one batch, asynchronously on a GPU."""

    def states(triples: LabelTriples) -> torch.Tensor:
        return scatter_states(triples.to(device), len(batch), num_classes)

    return DeviceBatch(
        images_BCHW=normalize(move(batch.images, device), move(batch.flips, device)),
        state_BK=states(batch.labels),
        probe_BK=states(batch.probe),
        truth_BK=None if batch.truth is None else states(batch.truth),
        slots_B=move(batch.slots, device),
    )
