"""The CAM classifier: logits are averages of boosted class activation maps (Kim et al., CVPR 2023, eq. 2-5)."""

import torch
from torch import nn

from paml.errors import SettingsError
from paml.models.backbones import BackboneInfo, ModelSettings, build_backbone
from paml.models.boost import boost_lu


class CamClassifier(nn.Module):
    """Backbone, 1x1 convolution with bias to K maps, boost, global average pooling in float32.

    The first `front_parts` of the backbone can be skipped: if `on_features` is set, all methods take the output of
    `front` instead of images. The model holds the weights of the whole network in either case. A model of embeddings
    has no backbone: on vectors, [B, C, 1, 1], it is a linear layer.
    """

    def __init__(self, backbone: nn.Module, info: BackboneInfo, num_classes: int, front_parts: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.info = info
        self.head = nn.Conv2d(info.channels, num_classes, kernel_size=1)
        self.front_parts = front_parts
        self.on_features = info.embeddings

    @property
    def front(self) -> nn.Module:
        """The parts before model.train_from: images [B, 3, H, W] to features [B, C, h, w]."""
        return self._parts(slice(None, self.front_parts))

    def maps(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Class activation maps without boost, [B, K, H, W], in the precision of the autocast region."""
        backbone = self._parts(slice(self.front_parts, None)) if self.on_features else self.backbone
        return self.head(backbone(images_BCHW))

    def _parts(self, which: slice) -> nn.Module:
        assert isinstance(self.backbone, nn.Sequential)
        return self.backbone[which]  # shares the modules

    def forward(self, images_BCHW: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
        """Logits [B, K], float32."""
        return pool_logits(self.maps(images_BCHW), alpha)


def pool_logits(maps_BKHW: torch.Tensor, alpha: float) -> torch.Tensor:
    """Logits [B, K], float32: the average over H*W of boost_lu(maps, alpha).

    Pooling in float32 avoids the ties of 16-bit logits, which would blur the ranks that rejection uses.
    """
    return boost_lu(maps_BKHW.float(), alpha).mean((2, 3))


def build_model(settings: ModelSettings, num_classes: int, *, seed: int = 0) -> CamClassifier:
    """The network with its weights. Random weights depend on `seed`; the global generators are not changed.

    Raises SettingsError.
    """
    if num_classes < 1:
        raise SettingsError(f"the number of classes is {num_classes}; it must be at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone, info = build_backbone(settings)
        front_parts = 0 if settings.train_from is None else info.parts_before(settings.train_from)
        model = CamClassifier(backbone, info, num_classes, front_parts)
    set_requires_grad(model, settings)
    if settings.batch_norm == "sync":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore


def _frozen_parts(model: CamClassifier, settings: ModelSettings) -> list[nn.Module]:
    parts = list(model.backbone.children())
    if not 0 <= settings.frozen_layers <= len(parts):
        raise SettingsError(f"model.frozen_layers is {settings.frozen_layers}; the backbone has {len(parts)} parts")
    return parts[: max(settings.frozen_layers, model.front_parts)]


def set_requires_grad(model: CamClassifier, settings: ModelSettings, *, head_only: bool = False) -> None:
    """Turn gradients on for all parameters except those of frozen parts, or for the head alone."""
    model.requires_grad_(True)
    for module in [model.backbone] if head_only else _frozen_parts(model, settings):
        module.requires_grad_(False)


def set_training(model: CamClassifier, settings: ModelSettings, *, head_only: bool = False) -> None:
    """Training mode; BatchNorm uses its stored statistics in frozen parts and where only the head is trained."""
    model.train()
    if head_only:
        model.backbone.eval()
    for module in _frozen_parts(model, settings):
        module.eval()
    if settings.batch_norm == "frozen":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
