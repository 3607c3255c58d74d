"""The CAM classifier: logits are the averages of boosted class activation maps (Kim et al., CVPR 2023, eq. 2-5)."""

import dataclasses

import torch
from torch import nn

from paml.errors import SettingsError
from paml.models.backbones import build_backbone, place_of
from paml.models.boost import boost_lu

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The network."""

    backbone: str = "resnet50"
    """A torchvision network: resnet18/34/50/101, mobilenet_v2, or another with `feature_layer`."""
    weights: str | None = "imagenet"
    """'imagenet' (torchvision's DEFAULT weights), a file of weights, or null for random ones."""
    feature_layer: str | None = None
    """Last feature map, by name; null takes the usual one of the families that paml knows."""
    output_stride: int = 32
    """Pixels of the picture per cell of the map; 16 or 8 drop the last strides for larger maps."""
    frozen_layers: int = 0
    """The first so many parts of the backbone stay as loaded (weights and BatchNorm); 0 trains end to end."""
    train_from: str | None = None
    """Train this layer (features.14, layer4) and what follows on features computed once for all images, plain and
    mirrored; what comes before stays as loaded. Null trains on images."""
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from RGB in [0, 1]."""
    pixel_std: tuple[float, float, float] = IMAGENET_STD
    """Divides RGB in [0, 1]."""
    batch_norm: str = "worker"
    """'worker': statistics per worker; 'sync': over all workers (GPU); 'frozen': the loaded ones, never updated."""

    def __post_init__(self) -> None:
        if self.batch_norm not in ("worker", "sync", "frozen"):
            raise SettingsError(f"model.batch_norm is {self.batch_norm!r}; it must be worker, sync or frozen")
        if min(self.pixel_std) <= 0:
            raise SettingsError(f"model.pixel_std is {self.pixel_std}; every part must be above 0")


class CamClassifier(nn.Module):
    """Backbone, 1×1 convolution with bias to K maps, boost, global average pooling in float32.

    The first `front_parts` of the backbone can be left out: with `on_features` all methods take what `front` gives in
    the place of images. Either way the model holds the whole network's weights.
    """

    def __init__(self, backbone: nn.Module, channels: int, num_classes: int, front_parts: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(channels, num_classes, kernel_size=1)
        self.front_parts = front_parts
        self.on_features = False

    @property
    def front(self) -> nn.Module:
        """The parts before model.train_from: images [B, 3, H, W] to features [B, C, h, w]."""
        return self._parts(slice(None, self.front_parts))

    def maps(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Raw class activation maps, [B, K, H, W] in the precision of the autocast region."""
        backbone = self._parts(slice(self.front_parts, None)) if self.on_features else self.backbone
        return self.head(backbone(images_BCHW))

    def _parts(self, which: slice) -> nn.Module:
        assert isinstance(self.backbone, nn.Sequential)
        return self.backbone[which]  # shares the modules, and costs some microseconds

    def forward(self, images_BCHW: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
        """float32 logits [B, K]. Pooling in float32 keeps logits from tying as 16-bit ones do."""
        return pool_logits(self.maps(images_BCHW), alpha)


def pool_logits(maps_BKHW: torch.Tensor, alpha: float) -> torch.Tensor:
    """float32 logits [B, K] = average over H·W of boost_lu(maps, alpha)."""
    return boost_lu(maps_BKHW.float(), alpha).mean((2, 3))


def build_model(settings: ModelSettings, num_classes: int, *, seed: int = 0) -> CamClassifier:
    """The network with its weights; random parts are drawn from `seed`, the caller's generators stay untouched."""
    if num_classes < 1:
        raise SettingsError(f"the number of classes is {num_classes}; it must be at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(
            settings.backbone,
            weights=settings.weights,
            feature_layer=settings.feature_layer,
            output_stride=settings.output_stride,
        )
        backbone.eval()
        with torch.no_grad():
            features = backbone(torch.zeros(1, 3, 64, 64))
        if features.ndim != 4:
            raise SettingsError(
                f"{settings.feature_layer or settings.backbone} gives features of shape {tuple(features.shape)}; "
                "a map of four axes is needed: name another model.feature_layer"
            )
        front_parts = 0
        if settings.train_from is not None:
            front_parts = place_of(backbone, settings.backbone, settings.feature_layer, settings.train_from)
        model = CamClassifier(backbone.train(), features.shape[1], num_classes, front_parts)
    set_learning(model, settings)
    if settings.batch_norm == "sync":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore


def _frozen(model: CamClassifier, settings: ModelSettings) -> list[nn.Module]:
    parts = list(model.backbone.children())
    if not 0 <= settings.frozen_layers <= len(parts):
        raise SettingsError(f"model.frozen_layers is {settings.frozen_layers}; the backbone has {len(parts)} parts")
    return parts[: max(settings.frozen_layers, model.front_parts)]


def set_learning(model: CamClassifier, settings: ModelSettings, *, head_only: bool = False) -> None:
    """Which parameters take gradients: all but those of frozen parts, or the head's alone."""
    model.requires_grad_(True)
    for module in [model.backbone] if head_only else _frozen(model, settings):
        module.requires_grad_(False)


def set_training(model: CamClassifier, settings: ModelSettings, *, head_only: bool = False) -> None:
    """Training mode, with BatchNorm left on its stored statistics where they are frozen, or the head alone learns."""
    model.train()
    if head_only:
        model.backbone.eval()
    for module in _frozen(model, settings):
        module.eval()
    if settings.batch_norm == "frozen":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def head_parameters(model: CamClassifier) -> list[nn.Parameter]:
    """The parameters that learn at the head's rate."""
    return list(model.head.parameters())
