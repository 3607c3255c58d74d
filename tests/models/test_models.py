"""The CAM network: boost and its gradient, map sizes, weights from files, frozen parts."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from paml.errors import SettingsError
from paml.models import BoostSettings, CamClassifier, ModelSettings, boost_lu, build_model
from paml.models.backbones import build_backbone
from paml.models.cam import pool_logits, set_training
from paml.models.inference import Inference

IMAGES = torch.linspace(-1, 1, 4 * 3 * 64 * 64).view(4, 3, 64, 64)


def tiny(**changes) -> ModelSettings:
    return ModelSettings(**({"backbone": "mobilenet_v2", "weights": None} | changes))


def test_boost_multiplies_positive_values_only() -> None:
    maps = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0])
    torch.testing.assert_close(boost_lu(maps, 5.0), torch.tensor([-2.0, 0.0, 0.0, 5e-30, 15.0]), rtol=0, atol=0)
    assert torch.equal(boost_lu(maps, 5.0), torch.maximum(maps, 5.0 * maps))
    assert torch.equal(boost_lu(maps, 1.0), maps)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 5.0])
def test_gradient_of_a_positive_value_is_alpha_over_the_area(alpha: float) -> None:
    torch.manual_seed(0)
    height, width = 3, 5
    maps = torch.randn(2, 4, height, width, requires_grad=True)
    pool_logits(maps, alpha).sum().backward()
    expected = torch.where(maps > 0, alpha, 1.0) / (height * width)
    assert (maps > 0).any()
    assert (maps <= 0).any()
    torch.testing.assert_close(maps.grad, expected)


def test_gradient_of_the_maps_in_a_whole_network() -> None:
    model = build_model(tiny(), 3).eval()
    maps = model.maps(IMAGES).detach().requires_grad_()
    area = maps.shape[2] * maps.shape[3]
    pool_logits(maps, 4.0).sum().backward()
    torch.testing.assert_close(maps.grad, torch.where(maps > 0, 4.0, 1.0) / area)
    torch.testing.assert_close(model(IMAGES, 4.0), pool_logits(maps, 4.0))


@pytest.mark.parametrize("alpha", [0.0, 0.99, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["train", "eval", "eval_also"])
def test_an_alpha_below_one_is_refused(alpha: float, name: str) -> None:
    with pytest.raises(SettingsError, match=f"boost.{name} is .* at least 1"):
        BoostSettings(**{name: (alpha,) if name == "eval_also" else alpha})


def test_an_alpha_scored_twice_is_refused() -> None:
    assert BoostSettings(eval=5.0, eval_also=(1.0,)).scored == (5.0, 1.0)
    for repeated in [(5.0,), (1.0, 1.0)]:
        with pytest.raises(SettingsError, match=r"eval_also .*\("):
            BoostSettings(eval=5.0, eval_also=repeated)


def test_logits_are_pooled_in_float32_under_autocast() -> None:
    model = build_model(tiny(), 6).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        maps = model.maps(IMAGES)
        logits = model(IMAGES, 5.0)
    assert maps.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert torch.equal(logits, pool_logits(maps, 5.0))
    maps = torch.randn(8, 100, 7, 7).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = pool_logits(maps, 5.0)
    exact = torch.where(maps > 0, 5.0 * maps.double(), maps.double()).mean((2, 3))
    torch.testing.assert_close(logits.double(), exact, rtol=1e-6, atol=1e-6)
    assert len(logits.unique()) > 700  # in 16 bits there would be about 300


@pytest.mark.parametrize(
    ("backbone", "layer"), [("resnet18", None), ("mobilenet_v2", None), ("shufflenet_v2_x0_5", "conv5")]
)
def test_halving_the_output_stride_doubles_the_maps(backbone: str, layer: str | None) -> None:
    sides = {}
    for stride in (32, 16, 8):
        trunk, info = build_backbone(
            ModelSettings(backbone=backbone, weights=None, feature_layer=layer, output_stride=stride)
        )
        trunk.eval()
        assert (info.stride, info.mean) == (stride, (0.485, 0.456, 0.406))
        with torch.no_grad():
            sides[stride] = tuple(trunk(torch.zeros(1, 3, 64, 96)).shape[2:])
    assert sides == {32: (2, 3), 16: (4, 6), 8: (8, 12)}


def test_a_smaller_stride_does_not_change_the_weights() -> None:
    usual, larger = build_model(tiny(), 3, seed=4), build_model(tiny(output_stride=16), 3, seed=4)
    for (name, one), (other_name, other) in zip(usual.state_dict().items(), larger.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)


def test_an_impossible_output_stride_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"output_stride is 12; .*\[2, 4, 8, 16, 32\]"):
        build_backbone(ModelSettings(backbone="mobilenet_v2", weights=None, output_stride=12))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "mobilenet_v2"])
def test_named_backbones_build_and_give_logits(backbone: str) -> None:
    check_builds(backbone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone",
    [
        "resnet101",
        "resnext50_32x4d",
        "wide_resnet50_2",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "convnext_tiny",
        "densenet121",
        "vgg11_bn",
        "regnet_y_400mf",
    ],
)
def test_other_families_build_and_give_logits(backbone: str) -> None:
    check_builds(backbone)


def check_builds(backbone: str) -> None:
    model = build_model(ModelSettings(backbone=backbone, weights=None), 7).eval()
    with torch.no_grad():
        maps = model.maps(IMAGES[:1])
        assert maps.shape == (1, 7, 2, 2)
        torch.testing.assert_close(model(IMAGES[:1], 1.0), maps.mean((2, 3)))
    assert model.head.bias is not None
    assert model.head.kernel_size == (1, 1)


@pytest.mark.parametrize(
    ("backbone", "layer", "shape"),
    [
        ("shufflenet_v2_x0_5", "stage3", (1, 96, 4, 4)),
        ("squeezenet1_1", "features", (1, 512, 3, 3)),
        ("resnet18", "layer3.1.conv1", (1, 256, 4, 4)),
    ],
)
def test_other_networks_build_with_a_feature_layer(backbone: str, layer: str, shape: tuple) -> None:
    spec = ModelSettings(backbone=backbone, weights=None, feature_layer=layer, output_stride=16)
    trunk, info = build_backbone(spec)
    trunk.eval()
    assert info.channels == shape[1]
    with torch.no_grad():
        assert trunk(torch.zeros(1, 3, 64, 64)).shape == shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet19"}, "model.backbone is 'resnet19'; .*resnet18"),
        ({"backbone": "timm/resnet18"}, "model.backbone is 'timm/resnet18'; .*torchvision"),
        ({"backbone": "shufflenet_v2_x0_5"}, "model.feature_layer .*conv1, .*conv5"),
        ({"backbone": "squeezenet1_1", "feature_layer": "classifier"}, r"\(1, 1000, 15, 15\)|output_stride"),
        ({"train_from": "features.0"}, "train_from is 'features.0'; .*features.1, "),
        ({"train_from": "layer4"}, "train_from is 'layer4'; .*features.1, "),
        ({"feature_layer": "layer9"}, "model.feature_layer is 'layer9'; mobilenet_v2 has .*features"),
        ({"batch_norm": "none"}, "batch_norm is 'none'"),
        ({"frozen_layers": 99}, "frozen_layers is 99; .*19"),
    ],
)
def test_invalid_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build_model(tiny(**changes), 3)


def test_a_head_without_classes_is_refused() -> None:
    with pytest.raises(SettingsError, match="classes is 0"):
        build_model(tiny(), 0)


# Weights from files


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    """State dict of torchvision's mobilenet_v2 with 1000 classes."""
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(11)
        return torchvision.models.mobilenet_v2(weights=None).state_dict()


def saved(state: dict[str, torch.Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("cut", ["whole", "no classifier", "other classifier", "no counts of batches"])
def test_weights_are_loaded_from_a_file(kind: str, cut: str, whole: dict, tmp_path: Path) -> None:
    state = dict(whole)
    if cut == "no classifier":
        state = {name: value for name, value in whole.items() if not name.startswith("classifier")}
    if cut == "other classifier":
        state |= {"classifier.1.weight": torch.zeros(5, 1280), "classifier.7.extra": torch.zeros(2)}
    if cut == "no counts of batches":
        state = {name: value for name, value in whole.items() if "num_batches_tracked" not in name}
    model = build_model(tiny(weights=saved(state, tmp_path / f"weights.{kind}")), 3)
    loaded = model.backbone.state_dict()
    assert len(loaded) > 100
    for name, value in loaded.items():
        assert torch.equal(value, whole[f"features.{name}"]), name


def test_weights_that_do_not_fit_are_refused(whole: dict, tmp_path: Path) -> None:
    first = "features.0.0.weight"
    broken = {
        r"lacks 1 .*features.0.0.weight": {k: v for k, v in whole.items() if k != first},
        r"features.0.0.weight is \(1, 2\), .*\(32, 3, 3, 3\)": whole | {first: torch.zeros(1, 2)},
        r"encoder.0 is \(1,\)": whole | {"encoder.0": torch.zeros(1)},
        r"a dict of epoch, model": {"epoch": torch.zeros(1), "model": whole},
    }
    for message, state in broken.items():
        path = tmp_path / "weights.pth"
        torch.save(state, path)
        with pytest.raises(SettingsError, match=message):
            build_model(tiny(weights=str(path)), 3)


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no file .*absent\.pth"):
        build_model(tiny(weights=str(tmp_path / "absent.pth")), 3)
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no weights at all")
        with pytest.raises(SettingsError, match=r"text\.(pth|safetensors) is not a file of weights"):
            build_model(tiny(weights=str(tmp_path / name)), 3)


def test_files_of_weights_are_not_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "harm", "done"))

    torch.save({"features.0.0.weight": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(SettingsError, match=r"weights\.pth is not a file of weights"):
        build_model(tiny(weights=str(tmp_path / "weights.pth")), 3)
    assert not (tmp_path / "harm").exists()


# Seeds and frozen parts


def test_random_weights_depend_on_the_seed_only_and_do_not_change_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (build_model(tiny(), 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [dict(model.state_dict()) for model in (one, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])


def trained_once(settings: ModelSettings) -> tuple[set[str], CamClassifier]:
    """Names of the tensors that a training step changes, and the model."""
    torch.manual_seed(0)
    model = build_model(settings, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    set_training(model, settings)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 3, 64, 64), 5.0).square().sum().backward()
    optimizer.step()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}, model


def test_frozen_batch_norm_trains_its_weights_but_not_its_statistics() -> None:
    changed, _ = trained_once(tiny(batch_norm="frozen"))
    assert not {name for name in changed if "running" in name or "num_batches" in name}
    assert "head.weight" in changed
    assert "backbone.0.1.bias" in changed
    free, _ = trained_once(tiny())
    assert {name for name in free if "running_mean" in name}


def test_frozen_layers_are_not_changed() -> None:
    changed, model = trained_once(tiny(frozen_layers=4))
    frozen = tuple(f"backbone.{part}." for part in range(4))
    assert not {name for name in changed if name.startswith(frozen)}
    assert {name for name in changed if name.startswith("backbone.4.") and "running" in name}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith(frozen)
    }


def test_the_network_is_channels_last() -> None:
    weight = build_model(tiny(), 3).get_parameter("backbone.1.conv.0.0.weight")
    first = build_model(tiny(), 3).get_parameter("backbone.0.0.weight")
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ("half", (0.5,) * 3, (0.5,) * 3)],
)
def test_inference_normalizes_as_the_settings_say(name: Any, mean: tuple, std: tuple) -> None:
    model = build_model(tiny(normalization=name), 3, seed=9).eval()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8))
    assert (model.info.mean, model.info.std) == (mean, std)
    with torch.no_grad():
        expected = model(((images / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2), 5.0)
        torch.testing.assert_close(Inference(model, alpha=5.0)(images)[0], expected, atol=1e-5, rtol=0)


def test_an_unknown_normalization_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"model\.normalization is 'none'"):
        tiny(normalization="none")


def test_inference_equals_its_parts() -> None:
    model = build_model(tiny(), 3, seed=9).eval()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8))
    mean, std = torch.tensor(model.info.mean), torch.tensor(model.info.std)
    own: dict[str, Any] = {"alpha": 5.0}
    with torch.no_grad():
        expected = model(((images / 255 - mean) / std).permute(0, 3, 1, 2), 5.0)
        logits, scores = Inference(model, **own)(images)
        _, calibrated, maps = Inference(model, **own, slope=[1, 2, 3], offset=[0, 1, -1], with_maps=True)(images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores, logits.sigmoid())
    slope, offset = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, -1.0])
    torch.testing.assert_close(calibrated, (slope * logits + offset).sigmoid())
    torch.testing.assert_close(maps.mean((2, 3)), logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sync_batch_norm_replaces_batch_norm() -> None:
    model = build_model(tiny(batch_norm="sync"), 3)
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}


def test_layers_after_the_feature_layer_need_no_weights(tmp_path: Path) -> None:
    cut = tiny(backbone="resnet18", feature_layer="layer2", output_stride=8)
    weights = {name: torch.full_like(value, 0.5) for name, value in build_model(cut, 3).backbone.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    loaded = build_model(dataclasses.replace(cut, weights=str(path)), 3).backbone.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items() if "num_batches" not in name)
    with pytest.raises(SettingsError, match=r"lacks 50 .*layer3.0.conv1.weight"):
        build_model(tiny(backbone="resnet18", weights=str(path)), 3)
