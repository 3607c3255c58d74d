"""torchvision networks cut off at their last feature map."""

import itertools
import operator
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from paml.errors import SettingsError

_CUTS = {"resnet": "layer4", "resnext": "layer4", "wide_resnet": "layer4", "regnet": "trunk_output"}
_TRUNKS = ("mobilenet", "efficientnet", "convnext", "densenet", "vgg")
_CLASSIFIERS = ("fc.", "classifier.", "head.", "heads.")


def build_backbone(name: str, *, weights: str | None, feature_layer: str | None, output_stride: int) -> nn.Module:
    """A module from images [B, 3, H, W] to features [B, C, H/output_stride, W/output_stride].

    `weights`: 'imagenet' (torchvision's enum DEFAULT, fetched or cached), None (random), or a file
    (.safetensors, or a state dict that torch.load reads with weights_only=True) that holds at least the backbone.
    `feature_layer` names the last feature map of networks not listed here.
    Raises SettingsError for an unknown network, layer, stride, or weights that do not fit.
    """
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise SettingsError(f"model.backbone is {name!r}; torchvision knows {', '.join(sorted(known))}")
    pretrained = None
    if weights == "imagenet":
        pretrained = "DEFAULT"
    try:
        network = torchvision.models.get_model(name, weights=pretrained)
    except OSError as error:
        raise SettingsError(
            f"ImageNet weights of {name} could not be fetched ({error}); give a file as model.weights, or null "
            "for random ones"
        ) from error
    trunk = _cut(network, name, feature_layer)
    if weights not in (None, "imagenet"):
        kept = {value.data_ptr() for value in trunk.state_dict().values()}
        load_partial(network, weights, {key for key, v in network.state_dict().items() if v.data_ptr() in kept})
    _reduce_stride(trunk, output_stride)
    return trunk


def place_of(trunk: nn.Module, name: str, feature_layer: str | None, layer: str) -> int:
    """How many parts of the backbone `trunk` of network `name` come before `layer`, named as in the whole network.

    Raises SettingsError with the names that are allowed: the backbone's parts but the first, before which is nothing.
    """
    prefix = "features." if feature_layer is None and name.startswith(_TRUNKS) else ""
    parts = [prefix + child for child, _ in trunk.named_children()] if isinstance(trunk, nn.Sequential) else []
    if not parts[1:]:
        raise SettingsError(f"model.train_from is {layer!r}, but this backbone of {name} is not made of parts in a row")
    if layer not in parts[1:]:
        raise SettingsError(f"model.train_from is {layer!r}; {name} can be trained from {', '.join(parts[1:])}")
    return parts.index(layer)


def load_partial(network: nn.Module, path: str, needed: set[str] | None = None) -> None:
    """Load a state dict that may lack what nobody uses. Raises SettingsError where it does not fit.

    What the file holds must fit by name and shape; what it lacks must be the tail of the network (the classifier,
    and with `needed` all layers that are not named there), since silently random layers in the middle would train
    to a bad model. BatchNorm's counts of batches, which older files lack and nothing here reads, may be missing.
    """
    from paml.storage import StorageError, read_bytes

    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load

            state = load(read_bytes(path))
        else:
            import io

            state = torch.load(io.BytesIO(read_bytes(path)), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise SettingsError(f"model.weights: no file {path}") from error
    except (StorageError, OSError) as error:
        raise SettingsError(f"model.weights: {path} cannot be read: {error}") from error
    except Exception as error:  # what a foreign file raises depends on how far it looks like one of weights
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise SettingsError(
            f"model.weights: {path} holds no weights: {said}. Give a .safetensors file or a "
            "state dict saved by torch.save"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        kind = f"a dict of {', '.join(map(str, list(state)[:3]))}" if isinstance(state, dict) else type(state).__name__
        raise SettingsError(f"model.weights: {path} holds {kind}, not a state dict (names to tensors)")
    own = network.state_dict()
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    for key, value in state.items():
        if key not in fitting and not key.startswith(_CLASSIFIERS):
            found = tuple(value.shape)
            wanted = tuple(own[key].shape) if key in own else "no such tensor"
            raise SettingsError(f"model.weights: {path} does not fit: {key} is {found}, the network has {wanted}")
    missing = [
        key
        for key in own
        if key not in fitting
        and (key in needed if needed is not None else not key.startswith(_CLASSIFIERS))
        and "num_batches_tracked" not in key
    ]
    if missing:
        raise SettingsError(f"model.weights: {path} lacks {len(missing)} tensors of the backbone, e.g. {missing[0]}")
    network.load_state_dict(fitting, strict=False)


def _cut(network: nn.Module, name: str, feature_layer: str | None) -> nn.Module:
    if feature_layer is None and name.startswith(_TRUNKS) and hasattr(network, "features"):
        return network.get_submodule("features")
    layer = feature_layer or next((cut for start, cut in _CUTS.items() if name.startswith(start)), None)
    if layer is None:
        children = ", ".join(child for child, _ in network.named_children())
        raise SettingsError(f"name the last feature map of {name} by model.feature_layer; its parts are: {children}")
    names = [child for child, _ in network.named_children()]
    if layer in names:
        kept = names[: names.index(layer) + 1]
        return nn.Sequential(OrderedDict((child, network.get_submodule(child)) for child in kept))
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    nodes = get_graph_node_names(network)[1]
    if layer not in nodes and not any(node.startswith(layer + ".") for node in nodes):
        raise SettingsError(f"model.feature_layer {layer!r} is no layer of {name}; it has {', '.join(nodes)}")
    return _OnlyMap(create_feature_extractor(network, {layer: "map"}))


class _OnlyMap(nn.Module):
    """torchvision's feature extractor answers with a dict; a backbone answers with its map."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.extractor(images)["map"]


def _stride(module: nn.Module) -> int:
    """Of a convolution or a pooling; 1 where its sides differ."""
    stride: Any = module.stride
    return stride if isinstance(stride, int) else stride[0] if len(set(stride)) == 1 else 1


def _strided(trunk: nn.Module) -> list[tuple[int, nn.Module]]:
    """(side of its input, module) of every module with a stride above 1, for a 256-pixel picture."""
    found: list[tuple[int, nn.Module]] = []

    def note(module: nn.Module, inputs: tuple) -> None:
        found.append((inputs[0].shape[-1], module))

    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    hooks = [
        module.register_forward_pre_hook(note)
        for module in trunk.modules()
        if isinstance(module, kinds) and _stride(module) > 1
    ]
    was_training = trunk.training
    trunk.eval()
    with torch.no_grad():
        trunk(torch.zeros(1, 3, 256, 256))
    trunk.train(was_training)
    for hook in hooks:
        hook.remove()
    return found


def _reduce_stride(trunk: nn.Module, output_stride: int) -> None:
    """Take the stride from the deepest level until the features come at `output_stride` pixels each.

    No dilation is put in its place: larger maps at nearly no cost, at the price of a smaller receptive field.
    """
    strided = _strided(trunk)
    stride_at = {side: _stride(module) for side, module in strided}
    levels = sorted(stride_at, reverse=True)
    allowed = list(itertools.accumulate((stride_at[side] for side in levels), operator.mul))
    if output_stride not in allowed:
        raise SettingsError(f"model.output_stride is {output_stride}; this backbone allows {allowed}")
    dropped = levels[allowed.index(output_stride) + 1 :]
    for side, module in strided:
        if side in dropped:
            module.stride = (1, 1) if isinstance(module, nn.Conv2d) else 1  # pyright: ignore
