"""Training on cached features: the same results as with a frozen front, and one cache for all runs."""

import json
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paml.data import readers
from paml.errors import DataError, SettingsError
from paml.models import ModelSettings, build_model
from paml.models.cam import set_training
from paml.runs.evaluate import EvaluateSettings, evaluate
from paml.settings import flatten
from paml.shards import Manifest
from paml.training.checkpoint import newest_checkpoint
from paml.training.data import open_data
from paml.training.features import features_folder
from paml.training.loop import train
from paml.training.result import Result
from paml.training.settings import TrainSettings
from paml.training.step import train_step
from paml.training.world import World
from tests.helpers.prepared import COUNTS, tiny_settings
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import batches_of, cached, quiet, run, state_of, trace_steps, uninterrupted_and_resumed
from tests.training.test_resume import FULL, assert_same_bits, newest

LAYER, FRONT = "stage3", 3
"""The first trained layer, and the number of parts before it."""
IMAGES = sum(COUNTS.values())
SGD = {"name": "sgd", "learning_rate": 0.03}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The feature cache of most tests."""
    return tmp_path_factory.mktemp("features")


def settings_of(root: Path, storage: Path, cache: Path, **changes: Any) -> TrainSettings:
    changes["model"] = {"train_from": LAYER} | changes.get("model", {})
    changes["data"] = {"features_dir": str(cache)} | changes.get("data", {})
    return tiny_settings(root, storage, **changes)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per image decoded in this process."""
    images: list[int] = []
    original = readers.decode_into

    def counting(*args: Any) -> None:
        images.append(1)
        original(*args)

    monkeypatch.setattr(readers, "decode_into", counting)
    return images


# The same results


def losses(settings: TrainSettings, *, rounded: bool = False) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of two epochs and the weights after them; `rounded` rounds the output of the front to float16."""
    data = open_data(settings.data)
    state = state_of(settings, data, World())
    if rounded:
        state.model.backbone[FRONT - 1].register_forward_hook(lambda module, args, out: out.half().float())  # pyright: ignore
    data, per_step = cached(state, data), []
    for _ in range(2):
        set_training(state.model, settings.model)
        for batch in batches_of(state, data, epoch=state.epoch):
            before = float(state.loss_sum)
            train_step(state, batch, last=False)
            per_step.append(float(state.loss_sum) - before)
        state.epoch, state.step = state.epoch + 1, 0
    return per_step, dict(state.model.state_dict())


def test_training_on_features_equals_training_with_a_frozen_front(prepared: Path, cache: Path) -> None:
    plain = tiny_settings(prepared, cache, model={"frozen_layers": FRONT}, optimizer=SGD)
    on_features, after = losses(settings_of(prepared, cache, cache, optimizer=SGD))
    rounded, expected = losses(plain, rounded=True)
    live, _ = losses(plain)
    assert live[-1] < 0.9 * live[0]
    np.testing.assert_allclose(on_features, rounded, rtol=1e-6)
    np.testing.assert_allclose(on_features[:4], live[:4], rtol=1e-3)
    np.testing.assert_allclose(on_features, live, rtol=1e-2)  # other labels may be rejected
    assert after.keys() == expected.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_two_workers_get_the_same_features_as_one(prepared: Path, cache: Path) -> None:
    settings = settings_of(
        prepared, cache, cache, data={"probe_fraction": 0.0}, model={"batch_norm": "frozen"}, optimizer=SGD
    )
    single, several = trace_steps(0, settings, 8), run_on_ranks(trace_steps, 2, settings, 8)
    for name in ("index", "flips", "slots"):
        for step in range(8):
            merged = np.concatenate([getattr(trace, name)[step] for trace in several])
            np.testing.assert_array_equal(merged, getattr(single, name)[step])
    np.testing.assert_allclose(several[0].losses, single.losses, atol=1e-5)
    assert several[0].counts == single.counts
    assert several[0].map == pytest.approx(single.map, abs=1e-3)


def test_a_resumed_run_ends_with_the_same_bits(prepared: Path, tmp_path: Path, cache: Path) -> None:
    whole, resumed = (settings_of(prepared, tmp_path / name, cache, **FULL) for name in ("whole", "resumed"))
    assert run(whole) is not None
    for stop in (2, 4, 3):
        assert run(resumed, stop_at=stop) is None
    assert run(resumed) is not None
    assert_same_bits(newest(whole), newest(resumed))


def test_workers_that_compute_the_features_resume_with_the_same_bits(prepared: Path, tmp_path: Path) -> None:
    changes = FULL | {"epochs": 2, "grad_accum_steps": 1}
    whole, resumed = (
        settings_of(prepared, tmp_path / name, tmp_path / "features", **changes) for name in ("whole", "resumed")
    )
    run_on_ranks(uninterrupted_and_resumed, 2, whole, resumed, [5])
    assert_same_bits(newest(whole), newest(resumed))


# The checkpoint is that of the whole network


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[TrainSettings, Result]:
    settings = settings_of(
        prepared, tmp_path_factory.mktemp("finished"), cache, optimizer={"ema_decay": 0.5, "learning_rate": 3e-3}
    )
    result = run(settings)
    assert result is not None
    (Path(settings.run.folder) / "run.json").write_text(json.dumps({"settings": flatten(settings)}))
    return settings, result


def test_evaluating_images_later_gives_the_scores_of_the_run(finished) -> None:
    settings, result = finished
    for split, expected in (("validation", result.best["5"]["map"]), ("test", result.test["5"].map)):
        rows = evaluate(EvaluateSettings(run=settings.run.folder, split=split), lambda text: None)
        assert rows["alpha 5"].map == pytest.approx(expected, abs=2e-3)


def test_the_checkpoint_is_that_of_the_whole_network_with_an_unchanged_front(finished) -> None:
    settings, _ = finished
    checkpoint = newest(settings)
    model = build_model(tiny_settings(Path(), Path()).model, 12, seed=settings.seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(checkpoint.tensors["ema"])
    front = tuple(f"backbone.{name}." for name, _ in list(model.backbone.named_children())[:FRONT])
    weights = checkpoint.tensors["weights"]
    assert all(torch.equal(weights[name], before[name]) for name in before if name.startswith(front))
    assert not torch.equal(weights["backbone.stage3.0.branch2.0.weight"], before["backbone.stage3.0.branch2.0.weight"])
    assert weights["backbone.stage3.0.branch2.1.running_mean"].any()


# One cache for many runs


def test_a_second_run_decodes_nothing(prepared: Path, tmp_path: Path, decoded: list[int]) -> None:
    features = tmp_path / "features"
    assert run(settings_of(prepared, tmp_path / "first", features)) is not None
    assert len(decoded) == IMAGES + COUNTS["train"]  # training images plain and mirrored
    decoded.clear()
    assert (
        run(settings_of(prepared, tmp_path / "second", features, loss={"name": "an"}, data={"flip_prob": 0.2}))
        is not None
    )
    assert not decoded


@pytest.mark.parametrize("changes", [{"seed": 4}, {"data": {"image_size": 48}}], ids=str)
def test_the_folder_depends_on_everything_that_affects_the_features(
    changes: dict, prepared: Path, tmp_path: Path, cache: Path, decoded: list[int]
) -> None:
    """Another seed gives other weights, since none are loaded."""
    shutil.copytree(cache, tmp_path / "features")
    settings = settings_of(prepared, tmp_path, tmp_path / "features", **changes)
    state = state_of(settings, data := open_data(settings.data), World())
    cached(state, data)
    assert len(decoded) == IMAGES + COUNTS["train"]


def test_without_flips_no_mirrored_features_are_computed(prepared: Path, tmp_path: Path, decoded: list[int]) -> None:
    settings = settings_of(prepared, tmp_path, tmp_path / "features", data={"flip_prob": 0.0})
    cached(state_of(settings, data := open_data(settings.data), World()), data)
    assert len(decoded) == IMAGES


def test_concurrent_runs_compute_each_file_once(prepared: Path, tmp_path: Path, decoded: list[int]) -> None:
    settings = settings_of(prepared, tmp_path, tmp_path / "features")
    states = [state_of(settings, open_data(settings.data), World()) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        opened = list(threads.map(lambda state: cached(state, open_data(settings.data)), states))
    assert len(decoded) == IMAGES + COUNTS["train"]
    for data in opened:
        assert data.train.features is not None
        assert opened[0].train.features is not None
        np.testing.assert_array_equal(data.train.features.mirrored, opened[0].train.features.mirrored)
        assert (data.train.features.mirrored != data.train.features.plain).any()


def largest(cache: Path) -> Path:
    """The folder of the largest features."""
    return max(cache.iterdir(), key=lambda folder: ((folder / "features.f16").stat().st_size, folder.name))


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "features.f16").read_bytes())
    data[len(data) // 2] ^= 4
    (folder / "features.f16").write_bytes(data)


def truncate(folder: Path) -> None:
    (folder / "features.f16").write_bytes((folder / "features.f16").read_bytes()[:-2])


def leave_incomplete(folder: Path) -> None:
    (folder / "features.json").unlink()
    (folder / "features.f16").rename(folder / ".0123.paml-tmp")


def damage_json(folder: Path) -> None:
    (folder / "features.json").write_text('{"size": 12')


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, leave_incomplete, damage_json])
def test_a_damaged_file_is_recomputed(damage: Any, prepared: Path, tmp_path: Path, decoded: list[int]) -> None:
    settings = settings_of(prepared, tmp_path, tmp_path / "features")
    state = state_of(settings, data := open_data(settings.data), World())
    before = cached(state, data)
    assert before.train.features is not None
    expected = np.array(before.train.features.plain), np.array(before.train.features.mirrored)
    damage(folder := largest(tmp_path / "features"))
    decoded.clear()
    after = cached(state, data, lines := [])
    assert after.train.features is not None
    assert len(decoded) == COUNTS["train"]
    assert any("are damaged" in line for line in lines) == (damage is not leave_incomplete)
    np.testing.assert_array_equal(after.train.features.plain, expected[0])
    np.testing.assert_array_equal(after.train.features.mirrored, expected[1])
    assert sorted(path.name for path in folder.iterdir()) == ["features.f16", "features.json", "lock"]


# Errors and unreadable images


def test_too_little_disk_space_is_detected_first(
    prepared: Path, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**6, 0, 12345)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SettingsError, match=r"need [\d,]+ bytes .* 12,345 bytes free: set data.features_dir"):
        run(settings_of(prepared, tmp_path, tmp_path / "features"))
    assert not decoded


def test_features_cannot_be_stored_in_a_bucket(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"data.features_dir is s3://bucket/x"):
        run(settings_of(prepared, tmp_path, Path("x"), data={"features_dir": "s3://bucket/x"}))


def test_features_beyond_float16_are_refused(prepared: Path, tmp_path: Path) -> None:
    settings = settings_of(prepared, tmp_path, tmp_path / "features")
    state = state_of(settings, data := open_data(settings.data), World())
    with torch.no_grad():
        state.model.backbone.get_parameter("stage2.0.branch1.3.weight").fill_(1e9)
    with pytest.raises(SettingsError, match="before stage3 exceed the range of float16"):
        cached(state, data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_from": "stage9"},
            "model.train_from is 'stage9'.*maxpool, stage2, stage3$",
        ),
        ({"train_from": "conv1"}, "'conv1'.*maxpool"),
        (
            {"train_from": "layer4.1", "backbone": "resnet18", "feature_layer": None, "output_stride": 32},
            "layer3, layer4$",
        ),
        (
            {"train_from": "14", "backbone": "mobilenet_v2", "feature_layer": None, "output_stride": 32},
            "'14'.*features.1, .*, features.18$",
        ),
        (
            {"train_from": "features.3", "backbone": "mobilenet_v2", "feature_layer": "features.5"},
            "model.train_from is 'features.3'",
        ),
    ],
)
def test_an_unknown_layer_is_refused_and_the_known_ones_are_listed(changes: dict, message: str) -> None:
    tiny = tiny_settings(Path(), Path(), model=changes).model
    with pytest.raises(SettingsError, match=message):
        build_model(tiny, 3)


@pytest.mark.parametrize(
    ("backbone", "layer", "parts"), [("mobilenet_v2", "features.14", 14), ("resnet18", "layer4", 7)]
)
def test_front_and_rest_form_the_network(backbone: str, layer: str, parts: int) -> None:
    model = build_model(ModelSettings(backbone=backbone, weights=None, train_from=layer), 3).eval()
    assert model.front_parts == parts
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole, features = model(images), model.front(images)
        model.on_features = True
        assert torch.equal(model(features), whole)


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path) -> tuple[Path, str, Path]:
    """(data folder, key, shard) with one damaged training image."""
    root = tmp_path / "damaged"
    shutil.copytree(prepared, root)
    manifest = Manifest.open(root / "shards" / "train")
    path = Path(manifest.shard_path(int(manifest.shard[13])))
    data = bytearray(path.read_bytes())
    data[int(manifest.offset[13]) + 100] ^= 1
    path.write_bytes(data)
    return root, manifest.key(13), path


def test_unreadable_images_are_skipped_counted_and_named(
    damaged: tuple[Path, str, Path], prepared: Path, tmp_path: Path, decoded: list[int]
) -> None:
    root, key, shard = damaged
    assert features_folder(tiny_settings(root, tmp_path).data) == str(root / "features")
    for name in ("first", "second"):
        lines: list[str] = []
        settings = settings_of(
            root, tmp_path / name, root / "features", data={"max_bad_fraction": 0.1, "features_dir": None}
        )
        result = train(settings, World(), quiet(lines))
        assert [metrics["train/bad_images"] for metrics in result.history] == [1, 1]
        for title in ("epoch 1", "epoch 2"):
            line = next(line for line in lines if line.startswith(f"{title}: skipped 1 unreadable"))
            assert key in line
            assert "CRC-32" in line
    assert len(list((root / "features").iterdir())) == 4
    with pytest.raises(DataError, match=rf"data\.max_bad_fraction.*{key}"):
        run(settings_of(root, tmp_path / "strict", root / "features"))
    shutil.copy(prepared / "shards" / "train" / shard.name, shard)
    decoded.clear()
    settings = settings_of(root, tmp_path / "repaired", root / "features")
    result = train(settings, World(), quiet(lines := []))
    assert any("images of train have been repaired" in line for line in lines)
    assert result.history[0]["train/bad_images"] == 0
    assert newest_checkpoint(f"{tmp_path}/repaired/tiny")[0] is not None
