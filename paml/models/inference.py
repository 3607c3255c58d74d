"""The deployed network: from uint8 images to logits, probabilities and maps, in one module."""

from collections.abc import Sequence

import torch
from torch import nn

from paml.data.device import Normalizer
from paml.models.boost import boost_lu
from paml.models.cam import CamClassifier


class Inference(nn.Module):
    """A classifier with its normalization, boost and calibration: the module that is served and exported.

    Takes uint8 RGB [B, H, W, 3]. Returns (logits [B, K], scores [B, K]), float32; if `with_maps` is set also the
    boosted maps [B, K, h, w], float32, whose averages over h*w are the logits. Scores are
    sigmoid(slope * logit + offset); slope is 1 and offset 0 without calibration.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    slope_K: torch.Tensor
    offset_K: torch.Tensor

    def __init__(
        self,
        model: CamClassifier,
        *,
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
        normalizer = Normalizer(model.info.mean, model.info.std, device)
        self.register_buffer("scale", normalizer.scale)
        self.register_buffer("shift", normalizer.shift)
        self.register_buffer("slope_K", torch.tensor(slope or [1.0] * K, dtype=torch.float32, device=device))
        self.register_buffer("offset_K", torch.tensor(offset or [0.0] * K, dtype=torch.float32, device=device))
        assert self.slope_K.shape == self.offset_K.shape == (K,)

    def forward(self, images_BHWC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        images = torch.addcmul(self.shift, images_BHWC.permute(0, 3, 1, 2).float(), self.scale)
        maps_BKHW = self.model.maps(images.contiguous(memory_format=torch.channels_last))
        maps_BKHW = boost_lu(maps_BKHW.float(), self.alpha)
        logits_BK = maps_BKHW.mean((2, 3))
        scores_BK = torch.sigmoid(self.slope_K * logits_BK + self.offset_K)
        return (logits_BK, scores_BK, maps_BKHW) if self.with_maps else (logits_BK, scores_BK)
