"""The network as others use it: bytes of pictures in, logits, probabilities and maps out, in one module."""

from collections.abc import Sequence

import torch
from torch import nn

from paml.data.device import Normaliser
from paml.models.boost import boost_lu
from paml.models.cam import CamClassifier


class Inference(nn.Module):
    """A classifier with its normalisation, boost and calibration: what is scored, served and exported.

    Takes uint8 RGB [B, H, W, 3]. Gives (logits [B, K], scores [B, K]), float32, and with `with_maps` also the boosted
    maps [B, K, h, w], float32, whose averages over h·w are the logits. Scores are sigmoid(slope·logit + offset); with
    slope 1 and offset 0, where there is no calibration, those of the network itself.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    slope_K: torch.Tensor
    offset_K: torch.Tensor

    def __init__(
        self,
        model: CamClassifier,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        alpha: float,
        slope: Sequence[float] | None = None,
        offset: Sequence[float] | None = None,
        with_maps: bool = False,
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.alpha = alpha
        self.with_maps = with_maps
        K = model.head.out_channels
        device = model.head.weight.device
        normaliser = Normaliser(mean, std, device)
        self.register_buffer("scale", normaliser.scale)
        self.register_buffer("shift", normaliser.shift)
        self.register_buffer("slope_K", _row(slope, 1.0, K, device))
        self.register_buffer("offset_K", _row(offset, 0.0, K, device))

    def forward(self, images_BHWC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        images = torch.addcmul(self.shift, images_BHWC.permute(0, 3, 1, 2).float(), self.scale)
        maps_BKHW = self.model.maps(images.contiguous(memory_format=torch.channels_last))
        maps_BKHW = boost_lu(maps_BKHW.float(), self.alpha)
        logits_BK = maps_BKHW.mean((2, 3))
        scores_BK = torch.sigmoid(self.slope_K * logits_BK + self.offset_K)
        return (logits_BK, scores_BK, maps_BKHW) if self.with_maps else (logits_BK, scores_BK)


def _row(values: Sequence[float] | None, default: float, size: int, device: torch.device) -> torch.Tensor:
    row = torch.full((size,), default) if values is None else torch.tensor(values, dtype=torch.float32)
    assert row.shape == (size,)
    return row.to(device)
