"""Backbones: networks without their classifier, from images to a feature map.

A family of networks is one adapter, a module in `FAMILIES` with a function `build(settings)`. It returns a module from
images [B, 3, H, W] to features [B, C, h, w], and the names of its children in the whole network if it is a Sequential,
else (). `build_backbone` does what all families share: it sets the output stride and measures the channels.
"""

import importlib
import io
import itertools
import operator
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from paml.errors import SettingsError, check_setting
from paml.storage import StorageError, read_bytes

BatchNormMode = Literal["worker", "sync", "frozen"]
Normalization = Literal["imagenet", "half"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
NORMALIZATIONS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": (HALF, HALF)}
"""Mean and standard deviation of the channels, by name."""

FAMILIES = {"torchvision": "paml.models.torchvision_family"}
"""Modules of the families. A name without "<family>/" in front belongs to torchvision."""

_CLASSIFIERS = ("fc.", "classifier.", "head.", "heads.")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The network."""

    backbone: str = "resnet50"
    """A torchvision network: resnet18/34/50/101, mobilenet_v2, or another one with `feature_layer`. Training on
    data.embeddings sets it to embeddings/CHANNELS, no network."""
    weights: str | None = "imagenet"
    """'imagenet' (torchvision's DEFAULT weights), a file of weights, or null for random ones."""
    normalization: Normalization = "imagenet"
    """What the weights expect as input. imagenet: channels normalized by ImageNet's mean and standard deviation; half:
    by 0.5 and 0.5, to [-1, 1]."""
    feature_layer: str | None = None
    """Name of the last feature map; null uses the usual one for the families that paml knows."""
    output_stride: int = 32
    """Pixels of the image per cell of the map; 16 or 8 remove the last strides for larger maps."""
    frozen_layers: int = 0
    """Number of first parts of the backbone that are not trained (weights and BatchNorm); 0 trains all."""
    train_from: str | None = None
    """Train from this layer on (features.14, layer4), on features that are computed once for all images, plain and
    mirrored. The layers before it are not trained. null trains on images."""
    batch_norm: BatchNormMode = "worker"
    """worker: statistics per worker; sync: over all workers (GPU only); frozen: the loaded ones, never updated."""

    def __post_init__(self) -> None:
        for name, allowed in (("batch_norm", get_args(BatchNormMode)), ("normalization", NORMALIZATIONS)):
            value = getattr(self, name)
            check_setting(value in allowed, f"model.{name}", value, " or ".join(allowed))

    @property
    def embedding_channels(self) -> int | None:
        """Values per cell of the embeddings that the model takes (backbone embeddings/CHANNELS); None for images."""
        match = re.fullmatch(r"embeddings/([1-9]\d{0,8})", self.backbone, re.ASCII)
        return None if match is None else int(match[1])


def check_takes_images(settings: ModelSettings, model: str) -> None:
    """Raise SettingsError if `model`, a run or a model folder, takes embeddings."""
    if settings.embedding_channels is not None:
        raise SettingsError(
            f"{model} was trained on embeddings and takes no images: score it with `paml evaluate`, or apply "
            "head.weight and head.bias of its model/weights.safetensors to your vectors"
        )


@dataclass(frozen=True, kw_only=True)
class BackboneInfo:
    """Properties of a backbone."""

    channels: int
    stride: int
    """Pixels of the image per cell of the feature map, in each direction."""
    mean: tuple[float, float, float]
    """Subtracted from RGB in [0, 1]."""
    std: tuple[float, float, float]
    """Divides RGB in [0, 1]."""
    embeddings: bool = False
    """Whether the input is embeddings with `channels` values per cell; then there is no network and no image."""
    part_names: tuple[str, ...] = ()
    """Names of the parts in the whole network; empty if the backbone is not a sequence."""

    def parts_before(self, layer: str) -> int:
        """Number of parts before `layer`. Raises SettingsError for an unknown layer and for the first one."""
        allowed = self.part_names[1:]
        if layer not in allowed:
            reason = f"allowed are {', '.join(allowed)}" if allowed else "this backbone is not a sequence of parts"
            raise SettingsError(f"model.train_from is {layer!r}; {reason}")
        return self.part_names.index(layer)


def build_backbone(settings: ModelSettings) -> tuple[nn.Module, BackboneInfo]:
    """A module from images [B, 3, H, W] to features [B, C, H/output_stride, W/output_stride], and its properties.

    Raises SettingsError for an unknown network, layer or stride, and for weights that do not fit.
    """
    if channels := settings.embedding_channels:
        return nn.Sequential(), BackboneInfo(channels=channels, stride=1, mean=HALF, std=HALF, embeddings=True)
    family = settings.backbone.partition("/")[0] if "/" in settings.backbone else "torchvision"
    if family not in FAMILIES:
        raise SettingsError(f"model.backbone is {settings.backbone!r}; its family must be one of {', '.join(FAMILIES)}")
    trunk, part_names = importlib.import_module(FAMILIES[family]).build(settings)
    channels = _reduce_stride(trunk, settings)
    mean, std = NORMALIZATIONS[settings.normalization]
    return trunk, BackboneInfo(
        channels=channels, stride=settings.output_stride, mean=mean, std=std, part_names=part_names
    )


def load_weights(network: nn.Module, path: str, needed: set[str] | None = None) -> None:
    """Load a state dict from a file (.safetensors, or one that torch.load reads with weights_only=True).

    All tensors in the file must fit by name and shape, except the classifier's. All tensors of the network must be in
    the file, except the classifier's or, with `needed`, those not in `needed`: randomly initialized layers in the
    middle would train to a bad model without an error. BatchNorm's `num_batches_tracked` may be missing.
    Raises SettingsError.
    """
    state = _read_state_dict(path)
    own = network.state_dict()
    matching = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    for key, value in state.items():
        if key not in matching and not key.startswith(_CLASSIFIERS):
            expected = tuple(own[key].shape) if key in own else "no such tensor"
            raise SettingsError(
                f"model.weights: {path} does not fit: {key} is {tuple(value.shape)}, the network has {expected}"
            )
    required = {key for key in own if not key.startswith(_CLASSIFIERS)} if needed is None else needed
    missing = [key for key in own if key in required - matching.keys() and "num_batches_tracked" not in key]
    if missing:
        raise SettingsError(f"model.weights: {path} lacks {len(missing)} tensors of the backbone, e.g. {missing[0]}")
    network.load_state_dict(matching, strict=False)


def _read_state_dict(path: str) -> dict[str, torch.Tensor]:
    try:
        data = read_bytes(path)
        if path.endswith(".safetensors"):
            from safetensors.torch import load

            state = load(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise SettingsError(f"model.weights: no file {path}") from error
    except (StorageError, OSError) as error:
        raise SettingsError(f"model.weights: {path} cannot be read: {error}") from error
    except Exception as error:  # torch.load and safetensors raise many types for other files, with long advice
        raise SettingsError(
            f"model.weights: {path} is not a file of weights ({type(error).__name__}). Use a .safetensors file or a "
            "state dict saved by torch.save"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        kind = f"a dict of {', '.join(map(str, list(state)[:3]))}" if isinstance(state, dict) else type(state).__name__
        raise SettingsError(f"model.weights: {path} holds {kind}, not a state dict (names to tensors)")
    return state


def _stride(module: nn.Module) -> int:
    """Stride of a convolution or pooling; 1 if its sides differ."""
    stride: Any = module.stride
    return stride if isinstance(stride, int) else stride[0] if len(set(stride)) == 1 else 1


def _reduce_stride(trunk: nn.Module, settings: ModelSettings) -> int:
    """Remove the deepest strides until features have `settings.output_stride`; returns the number of channels.

    No dilation replaces them: larger maps at little cost, with a smaller receptive field.
    """
    strided: list[tuple[int, nn.Module]] = []  # (side of the input, module) of every module with a stride above 1

    def record(module: nn.Module, inputs: tuple) -> None:
        strided.append((inputs[0].shape[-1], module))

    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    modules = [module for module in trunk.modules() if isinstance(module, kinds) and _stride(module) > 1]
    hooks = [module.register_forward_pre_hook(record) for module in modules]
    trunk.eval()
    with torch.no_grad():
        features = trunk(torch.zeros(1, 3, 256, 256))
    trunk.train()
    for hook in hooks:
        hook.remove()
    if features.ndim != 4:
        raise SettingsError(
            f"the features of {settings.feature_layer or settings.backbone} have shape {tuple(features.shape)}, not "
            "[B, C, H, W]: set model.feature_layer to a layer that gives a map"
        )

    stride_at = {side: _stride(module) for side, module in strided}
    levels = sorted(stride_at, reverse=True)
    allowed = list(itertools.accumulate((stride_at[side] for side in levels), operator.mul))
    if settings.output_stride not in allowed:
        raise SettingsError(f"model.output_stride is {settings.output_stride}; {settings.backbone} allows {allowed}")
    removed = levels[allowed.index(settings.output_stride) + 1 :]
    for side, module in strided:
        if side in removed:
            module.stride = (1, 1) if isinstance(module, nn.Conv2d) else 1  # pyright: ignore
    return features.shape[1]
