"""Adapter for torchvision's classification networks: they are cut after their last feature map."""

from collections import OrderedDict

import torch
from torch import nn

from paml.errors import SettingsError
from paml.models.backbones import ModelSettings, load_weights

_LAST_LAYER = {"resnet": "layer4", "resnext": "layer4", "wide_resnet": "layer4", "regnet": "trunk_output"}
_FEATURES = ("mobilenet", "efficientnet", "convnext", "densenet", "vgg")
"""Networks whose backbone is their submodule `features`."""


def build(settings: ModelSettings) -> tuple[nn.Module, tuple[str, ...]]:
    """The network up to its last feature map, or up to `feature_layer`. Raises SettingsError."""
    import torchvision

    name = settings.backbone.removeprefix("torchvision/")
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise SettingsError(f"model.backbone is {name!r}; torchvision has {', '.join(sorted(known))}")
    try:
        network = torchvision.models.get_model(name, weights="DEFAULT" if settings.weights == "imagenet" else None)
    except OSError as error:
        raise SettingsError(
            f"the ImageNet weights of {name} could not be downloaded ({error}). Set model.weights to a file, or to "
            "null for random weights"
        ) from error
    trunk, part_names = _cut(network, name, settings.feature_layer)
    if settings.weights not in (None, "imagenet"):
        used = {value.data_ptr() for value in trunk.state_dict().values()}
        needed = {key for key, value in network.state_dict().items() if value.data_ptr() in used}
        load_weights(network, settings.weights, needed)
    return trunk, part_names


def _cut(network: nn.Module, name: str, feature_layer: str | None) -> tuple[nn.Module, tuple[str, ...]]:
    if feature_layer is None and name.startswith(_FEATURES) and hasattr(network, "features"):
        features = network.get_submodule("features")
        return features, tuple(f"features.{child}" for child, _ in features.named_children())
    layer = feature_layer or next((last for start, last in _LAST_LAYER.items() if name.startswith(start)), None)
    children = [child for child, _ in network.named_children()]
    if layer is None:
        raise SettingsError(
            f"set model.feature_layer to the last feature map of {name}; its parts are {', '.join(children)}"
        )
    if layer in children:
        used = children[: children.index(layer) + 1]
        return nn.Sequential(OrderedDict((child, network.get_submodule(child)) for child in used)), tuple(used)
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    nodes = get_graph_node_names(network)[1]
    if layer not in nodes and not any(node.startswith(layer + ".") for node in nodes):
        raise SettingsError(f"model.feature_layer is {layer!r}; {name} has {', '.join(nodes)}")
    return _FeatureMap(create_feature_extractor(network, {layer: "map"})), ()


class _FeatureMap(nn.Module):
    """Returns the map from the dict that torchvision's feature extractor returns."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.extractor(images)["map"]
