"""Training from a named layer: the same numbers as with the front frozen live, of features that runs share."""

import json
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paml.data import decoders
from paml.errors import DataError, SettingsError
from paml.models import ModelSettings, build_model
from paml.models.cam import set_training
from paml.shards import Manifest
from paml.training.checkpoint import newest_checkpoint
from paml.training.data import open_data
from paml.training.features import features_folder
from paml.training.loop import Result, train
from paml.training.score_run import EvaluateSettings, evaluate
from paml.training.settings import TrainSettings, flatten
from paml.training.step import train_step
from paml.training.world import World
from tests.helpers.prepared import COUNTS, tiny_settings
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import batches_of, cached, quiet, run, state_of, trace_steps, unbroken_and_resumed
from tests.training.test_resume import EVERYTHING, assert_same_bits, newest

LAYER, FRONT = "stage3", 3
"""The layer trained from, and how many parts come before it."""
IMAGES = sum(COUNTS.values())
SGD = {"name": "sgd", "learning_rate": 0.03}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of most tests."""
    return tmp_path_factory.mktemp("features")


def settings_of(root: Path, storage: Path, cache: Path, **changes: Any) -> TrainSettings:
    changes["model"] = {"train_from": LAYER} | changes.get("model", {})
    changes["data"] = {"features_dir": str(cache)} | changes.get("data", {})
    return tiny_settings(root, storage, **changes)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each image decoded in this process."""
    found: list[int] = []
    whole = decoders.decode_into

    def counting(*given: Any) -> None:
        found.append(1)
        whole(*given)

    monkeypatch.setattr(decoders, "decode_into", counting)
    return found


# The same numbers


def losses(settings: TrainSettings, *, rounded: bool = False) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of two epochs' steps, and the weights after them; `rounded` cuts what the live front gives to float16."""
    data = open_data(settings.data)
    state = state_of(settings, data, World())
    if rounded:
        state.model.backbone[FRONT - 1].register_forward_hook(lambda module, given, out: out.half().float())  # pyright: ignore
    data, found = cached(state, data), []
    for _ in range(2):
        set_training(state.model, settings.model)
        for batch in batches_of(state, data, epoch=state.epoch):
            before = float(state.loss_sum)
            train_step(state, batch, last=False)
            found.append(float(state.loss_sum) - before)
        state.epoch, state.step = state.epoch + 1, 0
    return found, dict(state.model.state_dict())


def test_training_on_features_is_training_with_the_front_frozen(prepared: Path, kept: Path) -> None:
    plain = tiny_settings(prepared, kept, model={"frozen_layers": FRONT}, optimiser=SGD)
    on_features, after = losses(settings_of(prepared, kept, kept, optimiser=SGD))
    rounded, same = losses(plain, rounded=True)
    live, _ = losses(plain)
    assert live[-1] < 0.9 * live[0]
    np.testing.assert_allclose(on_features, rounded, rtol=1e-6)
    np.testing.assert_allclose(on_features[:4], live[:4], rtol=1e-3)
    np.testing.assert_allclose(on_features, live, rtol=1e-2)  # other labels may be rejected by then
    assert after.keys() == same.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, same[name], rtol=1e-4, atol=1e-5)


def test_two_workers_see_the_same_features_as_one(prepared: Path, kept: Path) -> None:
    settings = settings_of(prepared, kept, kept, data={"probe": 0.0}, model={"batch_norm": "frozen"}, optimiser=SGD)
    alone, several = trace_steps(0, settings, 8), run_on_ranks(trace_steps, 2, settings, 8)
    for name in ("places", "flips", "slots"):
        for step in range(8):
            together = np.concatenate([getattr(trace, name)[step] for trace in several])
            np.testing.assert_array_equal(together, getattr(alone, name)[step])
    np.testing.assert_allclose(several[0].losses, alone.losses, atol=1e-5)
    assert several[0].counts == alone.counts
    assert several[0].map == pytest.approx(alone.map, abs=1e-3)


def test_a_stopped_run_ends_with_the_same_bits(prepared: Path, tmp_path: Path, kept: Path) -> None:
    whole, broken = (settings_of(prepared, tmp_path / name, kept, **EVERYTHING) for name in ("whole", "broken"))
    assert run(whole) is not None
    for stop in (2, 4, 3):
        assert run(broken, stop_at=stop) is None
    assert run(broken) is not None
    assert_same_bits(newest(whole), newest(broken))


def test_workers_that_make_the_features_go_on_with_the_same_bits(prepared: Path, tmp_path: Path) -> None:
    changes = EVERYTHING | {"epochs": 2, "accumulate": 1}
    whole, broken = (
        settings_of(prepared, tmp_path / name, tmp_path / "features", **changes) for name in ("whole", "broken")
    )
    run_on_ranks(unbroken_and_resumed, 2, whole, broken, [5])
    assert_same_bits(newest(whole), newest(broken))


# The checkpoint is that of a whole network


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory, kept: Path) -> tuple[TrainSettings, Result]:
    settings = settings_of(
        prepared, tmp_path_factory.mktemp("finished"), kept, optimiser={"average": 0.5, "learning_rate": 3e-3}
    )
    result = run(settings)
    assert result is not None
    facts = {"settings": flatten(settings)}
    (Path(settings.run.storage) / "tiny" / "run.json").write_text(json.dumps(facts))
    return settings, result


def test_scoring_images_later_gives_the_scores_of_the_run(finished) -> None:
    settings, result = finished
    for split, wanted in (("validation", result.best["5"]["map"]), ("test", result.test["5"].map)):
        rows = evaluate(EvaluateSettings(run=f"{settings.run.storage}/tiny", split=split), lambda text: None)
        assert rows["alpha 5"].map == pytest.approx(wanted, abs=2e-3)


def test_the_checkpoint_fits_a_network_that_is_trained_whole_and_holds_the_front_as_loaded(finished) -> None:
    settings, _ = finished
    found = newest(settings)
    model = build_model(tiny_settings(Path(), Path()).model, 12, seed=settings.seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(found.tensors["averaged"])
    front = tuple(f"backbone.{name}." for name, _ in list(model.backbone.named_children())[:FRONT])
    weights = found.tensors["weights"]
    assert all(torch.equal(weights[name], before[name]) for name in before if name.startswith(front))
    assert not torch.equal(weights["backbone.stage3.0.branch2.0.weight"], before["backbone.stage3.0.branch2.0.weight"])
    assert weights["backbone.stage3.0.branch2.1.running_mean"].any()


# One cache for many runs


def test_a_second_run_decodes_nothing(prepared: Path, tmp_path: Path, decoded: list[int]) -> None:
    cache = tmp_path / "features"
    assert run(settings_of(prepared, tmp_path / "first", cache)) is not None
    assert len(decoded) == IMAGES + COUNTS["train"]  # training images plain and mirrored
    decoded.clear()
    assert run(settings_of(prepared, tmp_path / "second", cache, loss={"name": "an"}, data={"flip": 0.2})) is not None
    assert not decoded


@pytest.mark.parametrize(
    "changes", [{"seed": 4}, {"model": {"pixel_std": (0.3,) * 3}}, {"data": {"image_size": 48}}], ids=str
)
def test_what_decides_the_numbers_decides_the_folder(
    changes: dict, prepared: Path, tmp_path: Path, kept: Path, decoded: list[int]
) -> None:
    """Another seed draws other weights here, since none are loaded."""
    shutil.copytree(kept, tmp_path / "features")
    settings = settings_of(prepared, tmp_path, tmp_path / "features", **changes)
    state = state_of(settings, data := open_data(settings.data), World())
    cached(state, data)
    assert len(decoded) == IMAGES + COUNTS["train"]


def test_without_flips_nothing_mirrored_is_made(prepared: Path, tmp_path: Path, decoded: list[int]) -> None:
    settings = settings_of(prepared, tmp_path, tmp_path / "features", data={"flip": 0.0})
    cached(state_of(settings, data := open_data(settings.data), World()), data)
    assert len(decoded) == IMAGES


def test_of_several_that_ask_at_once_one_makes_each_file(prepared: Path, tmp_path: Path, decoded: list[int]) -> None:
    settings = settings_of(prepared, tmp_path, tmp_path / "features")
    states = [state_of(settings, open_data(settings.data), World()) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda state: cached(state, open_data(settings.data)), states))
    assert len(decoded) == IMAGES + COUNTS["train"]
    for data in found:
        assert data.train.features is not None
        assert found[0].train.features is not None
        np.testing.assert_array_equal(data.train.features.mirrored, found[0].train.features.mirrored)
        assert (data.train.features.mirrored != data.train.features.plain).any()


def largest(cache: Path) -> Path:
    """The folder of the features with the most bytes."""
    return max(cache.iterdir(), key=lambda folder: ((folder / "features.f16").stat().st_size, folder.name))


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "features.f16").read_bytes())
    data[len(data) // 2] ^= 4
    (folder / "features.f16").write_bytes(data)


def cut_short(folder: Path) -> None:
    (folder / "features.f16").write_bytes((folder / "features.f16").read_bytes()[:-2])


def never_finish(folder: Path) -> None:
    (folder / "features.json").unlink()
    (folder / "features.f16").rename(folder / ".0123.paml-tmp")


def spoil_the_facts(folder: Path) -> None:
    (folder / "features.json").write_text('{"size": 12')


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, never_finish, spoil_the_facts])
def test_a_damaged_file_is_made_anew(damage: Any, prepared: Path, tmp_path: Path, decoded: list[int]) -> None:
    settings = settings_of(prepared, tmp_path, tmp_path / "features")
    state = state_of(settings, data := open_data(settings.data), World())
    before = cached(state, data)
    assert before.train.features is not None
    wanted = np.array(before.train.features.plain), np.array(before.train.features.mirrored)
    damage(folder := largest(tmp_path / "features"))
    decoded.clear()
    after = cached(state, data, said := [])
    assert after.train.features is not None
    assert len(decoded) == COUNTS["train"]
    assert any("are damaged and will" in line for line in said) == (damage is not never_finish)
    np.testing.assert_array_equal(after.train.features.plain, wanted[0])
    np.testing.assert_array_equal(after.train.features.mirrored, wanted[1])
    assert sorted(path.name for path in folder.iterdir()) == ["features.f16", "features.json", "lock"]


# What is refused, and images that are bad


def test_too_little_room_is_said_before_anything_is_computed(
    prepared: Path, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**6, 0, 12345)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        SettingsError, match=r"need [\d,]+ bytes .* whose disk has 12,345 bytes free: set data.features_dir"
    ):
        run(settings_of(prepared, tmp_path, tmp_path / "features"))
    assert not decoded


def test_a_bucket_is_no_place_for_features(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"data.features_dir is s3://bucket/x; it must be a local folder"):
        run(settings_of(prepared, tmp_path, Path("x"), data={"features_dir": "s3://bucket/x"}))


def test_features_beyond_float16_are_refused(prepared: Path, tmp_path: Path) -> None:
    settings = settings_of(prepared, tmp_path, tmp_path / "features")
    state = state_of(settings, data := open_data(settings.data), World())
    with torch.no_grad():
        state.model.backbone.get_parameter("stage2.0.branch1.3.weight").fill_(1e9)
    with pytest.raises(SettingsError, match="features before stage3 pass the range of float16"):
        cached(state, data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_from": "stage9"},
            "model.train_from is 'stage9'; shufflenet_v2_x0_5 can be trained from maxpool, stage2, stage3",
        ),
        ({"train_from": "conv1"}, "can be trained from maxpool"),
        (
            {"train_from": "layer4.1", "backbone": "resnet18", "feature_layer": None, "output_stride": 32},
            "layer3, layer4$",
        ),
        (
            {"train_from": "14", "backbone": "mobilenet_v2", "feature_layer": None, "output_stride": 32},
            "mobilenet_v2 can be trained from features.1, .*, features.18$",
        ),
        (
            {"train_from": "features.3", "backbone": "mobilenet_v2", "feature_layer": "features.5"},
            "not made of parts in a row",
        ),
    ],
)
def test_an_unknown_layer_is_refused_with_those_allowed(changes: dict, message: str) -> None:
    tiny = tiny_settings(Path(), Path(), model=changes).model
    with pytest.raises(SettingsError, match=message):
        build_model(tiny, 3)


@pytest.mark.parametrize(
    ("backbone", "layer", "parts"), [("mobilenet_v2", "features.14", 14), ("resnet18", "layer4", 7)]
)
def test_front_and_back_make_the_network(backbone: str, layer: str, parts: int) -> None:
    model = build_model(ModelSettings(backbone=backbone, weights=None, train_from=layer), 3).eval()
    assert model.front_parts == parts
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole, features = model(images), model.front(images)
        model.on_features = True
        assert torch.equal(model(features), whole)


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path) -> tuple[Path, str, Path]:
    """(data, key, shard) with one training image that is not as it was."""
    root = tmp_path / "damaged"
    shutil.copytree(prepared, root)
    manifest = Manifest.open(root / "shards" / "train")
    path = Path(manifest.shard_path(int(manifest.shard[13])))
    data = bytearray(path.read_bytes())
    data[int(manifest.offset[13]) + 100] ^= 1
    path.write_bytes(data)
    return root, manifest.key(13), path


def test_bad_images_are_left_out_counted_and_named(
    damaged: tuple[Path, str, Path], prepared: Path, tmp_path: Path, decoded: list[int]
) -> None:
    root, key, shard = damaged
    assert features_folder(tiny_settings(root, tmp_path).data) == str(root / "features")
    for name in ("first", "second"):
        said: list[str] = []
        settings = settings_of(
            root, tmp_path / name, root / "features", data={"max_bad_share": 0.1, "features_dir": None}
        )
        result = train(settings, World(), quiet(said))
        assert [figures["train/bad_images"] for figures in result.history] == [1, 1]
        for title in ("epoch 1", "epoch 2"):
            line = next(line for line in said if line.startswith(f"{title}: 1 images could not be used"))
            assert key in line
            assert "CRC-32" in line
    assert len(list((root / "features").iterdir())) == 4
    with pytest.raises(DataError, match=rf"more than data.max_bad_share.*{key}"):
        run(settings_of(root, tmp_path / "strict", root / "features"))
    shutil.copy(prepared / "shards" / "train" / shard.name, shard)
    decoded.clear()
    settings = settings_of(root, tmp_path / "mended", root / "features")
    result = train(settings, World(), quiet(said := []))
    assert any("bad images of train have been mended" in line for line in said)
    assert result.history[0]["train/bad_images"] == 0
    assert newest_checkpoint(f"{tmp_path}/mended/tiny")[0] is not None
