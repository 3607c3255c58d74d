"""A run in one process: its figures, its best epoch, its checkpoints, and what stops it."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paml.errors import DataError, NonFiniteLossError, SettingsError
from paml.labels import LabelTable
from paml.shards import Manifest
from paml.training.checkpoint import committed, newest_checkpoint, read_checkpoint
from paml.training.loop import Result, train
from paml.training.score_run import EvaluateSettings, evaluate
from paml.training.settings import TrainSettings, flatten, unflatten
from paml.training.world import World
from tests.helpers.prepared import CLASSES, tiny_settings
from tests.helpers.runs import quiet, run

TRUTH = {"train_truth": "labels/train-full.arrow"}


class Kept:
    """A journal in memory."""

    def __init__(self) -> None:
        self.figures: list[tuple[int, dict[str, float]]] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.figures.append((step, values))


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSettings, Result, Kept, list[str]]:
    """A run of LL-R with averaged weights, two alphas and full truth."""
    settings = tiny_settings(
        prepared,
        tmp_path_factory.mktemp("finished"),
        data=TRUTH,
        boost={"eval_also": (1.0,)},
        optimiser={"average": 0.5, "learning_rate": 3e-3},
        epochs=4,
        checkpoint={"keep": 1},
    )
    journal, said = Kept(), []
    result = train(settings, World(), quiet(said, journal=journal))
    folder = Path(settings.run.storage) / settings.run.name
    (folder / "run.json").write_text(json.dumps({"settings": flatten(settings)}))
    return settings, result, journal, said


def test_every_epoch_has_its_figures_in_the_journal(finished) -> None:
    _, result, journal, said = finished
    assert [step for step, _ in journal.figures[:4]] == [1, 2, 3, 4]
    wanted = {"train/loss", "train/learning_rate", "train/images_per_second", "train/bad_images"}
    wanted |= {"val/map", "val/micro_ap", "groups/G1", "groups/G5", "val/map_alpha_1", "rejection/rejected"}
    wanted |= {"rejection/rejected_share", "rejection/precision", "rejection/recall"}
    for step, figures in journal.figures[:4]:
        assert wanted <= figures.keys()
        assert result.history[step - 1] == pytest.approx({"epoch": step, **figures}, nan_ok=True)
        assert math.isfinite(figures["train/loss"])
        assert not any("probe" in name for name in figures)
    assert journal.figures[-1][0] == result.best["5"]["epoch"]
    assert {"test/map", "test/G3", "test/map_alpha_1"} <= journal.figures[-1][1].keys()
    assert len([line for line in said if line.startswith("epoch ")]) == 4
    assert result.history[-1]["train/loss"] < result.history[0]["train/loss"]


def test_exactly_the_papers_share_is_rejected_and_none_in_the_first_epoch(finished, prepared: Path) -> None:
    _, result, _, _ = finished
    table = LabelTable.open(prepared / "labels" / "train.arrow")
    unobserved = 46 * len(CLASSES) - table.num_annotations
    for figures in result.history:
        rejected = figures["rejection/rejected"]
        rate = 0.05 * (figures["epoch"] - 1)
        assert rate * unobserved <= rejected <= rate * unobserved + 6 * math.ceil(rate)
        assert figures["rejection/rejected_share"] == pytest.approx(rejected / unobserved)
        if rejected:
            hits = figures["rejection/rejected_false_negatives"]
            assert figures["rejection/precision"] == pytest.approx(hits / rejected)
            truth = LabelTable.open(prepared / "labels" / "train-full.arrow")
            missing = truth.class_counts()[0].sum() - table.class_counts()[0].sum()
            assert figures["rejection/recall"] == pytest.approx(hits / missing)


def test_the_best_epoch_is_that_of_the_highest_validation_map(finished) -> None:
    _, result, _, _ = finished
    for alpha, name in (("5", "val/map"), ("1", "val/map_alpha_1")):
        maps = [figures[name] for figures in result.history]
        assert result.best[alpha]["map"] == max(maps)
        assert result.best[alpha]["epoch"] == maps.index(max(maps)) + 1


def test_the_newest_and_the_best_checkpoints_are_left(finished) -> None:
    settings, result, _, _ = finished
    names = committed(f"{settings.run.storage}/tiny")
    assert set(names) == {best["checkpoint"] for best in result.best.values()} | {"step-000000024"}
    for name in names:
        read_checkpoint(f"{settings.run.storage}/tiny", name)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_evaluating_the_run_later_gives_the_same_scores(split: str, finished, tmp_path: Path) -> None:
    settings, result, _, _ = finished
    said: list[str] = []
    wanted = EvaluateSettings(
        run=f"{settings.run.storage}/tiny", split=split, per_class=str(tmp_path / "classes.parquet")
    )
    rows = evaluate(wanted, said.append)
    assert list(rows) == ["alpha 5", "alpha 1"]
    if split == "test":
        assert rows["alpha 5"].map == pytest.approx(result.test["5"].map, abs=1e-6)
        np.testing.assert_allclose(rows["alpha 5"].per_class, result.test["5"].per_class, atol=1e-6)
    else:
        assert rows["alpha 5"].map == pytest.approx(result.best["5"]["map"], abs=1e-6)
    assert "G5" in said[0]
    assert (tmp_path / "classes.parquet").exists()


def test_evaluating_what_is_not_there_is_refused(finished, tmp_path: Path) -> None:
    settings, _, _, _ = finished
    with pytest.raises(DataError, match=r"holds no run \(run.json is missing\)"):
        evaluate(EvaluateSettings(run=str(tmp_path)))
    with pytest.raises(SettingsError, match=r"checkpoint 'step-1' is not in .*; there are step-"):
        evaluate(EvaluateSettings(run=f"{settings.run.storage}/tiny", checkpoint="step-1"))
    with pytest.raises(DataError, match=r"nowhere.* is not there. Prepare the data first"):
        evaluate(EvaluateSettings(run=f"{settings.run.storage}/tiny", split="nowhere"))


def test_a_result_survives_json(finished) -> None:
    _, result, _, _ = finished
    again = Result.from_json(json.loads(json.dumps(result.to_json())))
    assert again.best == result.best
    assert again.test["1"].groups == result.test["1"].groups
    np.testing.assert_array_equal(again.test["1"].per_class, result.test["1"].per_class)


@pytest.mark.parametrize("loss", ["an", "iu", "ll-ct", "ll-cp"])
def test_every_loss_trains_and_names_what_it_does(loss: str, prepared: Path, tmp_path: Path) -> None:
    result = run(tiny_settings(prepared, tmp_path, loss={"name": loss}, data={"probe": 0.2}, epochs=3))
    assert result is not None
    assert result.history[-1]["train/loss"] < result.history[0]["train/loss"]
    last = result.history[-1]
    assert ("rejection/rejected" in last) == loss.startswith("ll-")
    assert ("rejection/probe_recall" in last) == loss.startswith("ll-")
    if loss == "ll-cp":
        assert last["rejection/corrected_in_all"] == sum(f["rejection/rejected"] for f in result.history)


def test_full_labels_train(prepared: Path, tmp_path: Path) -> None:
    data = {"train_labels": "labels/train-full.arrow"}
    assert run(tiny_settings(prepared, tmp_path, loss={"name": "full"}, data=data)) is not None


def test_patience_ends_a_run_that_no_longer_improves(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        prepared,
        tmp_path,
        model={"batch_norm": "frozen"},
        optimiser={"learning_rate": 1e-30},
        patience=2,
        epochs=9,
    )
    result = run(settings)
    assert result is not None
    assert [figures["epoch"] for figures in result.history] == [1, 2, 3]
    assert result.best["5"]["epoch"] == 1
    again = run(settings)
    assert again is not None
    assert len(again.history) == 3


def test_a_loss_that_is_not_finite_stops_the_run_with_its_images_named(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        prepared,
        tmp_path,
        optimiser={"name": "sgd", "learning_rate": 1e30, "schedule": "one_cycle", "momentum": 0.0},
        model={"batch_norm": "frozen"},
        checkpoint={"every_steps": 1, "keep": None},
    )
    with pytest.raises(NonFiniteLossError) as caught:
        run(settings)
    manifest = Manifest.open(prepared / "shards" / "train")
    assert re.search(r"loss of step \d in epoch 1 is not finite on worker 0", str(caught.value))
    named = re.findall(r"\b[0-9a-f]{16}\b", str(caught.value))
    assert len(named) == 8
    assert set(named) <= set(manifest.keys().to_pylist())
    assert "Lower optimiser.learning_rate" in str(caught.value)
    for name in committed(str(tmp_path / "tiny")):
        weights = read_checkpoint(str(tmp_path / "tiny"), name).tensors["weights"]
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_weights_that_are_not_finite_are_never_kept(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        prepared,
        tmp_path,
        optimiser={"name": "sgd", "learning_rate": 1e30, "weight_decay": 1e20},
        checkpoint={"every_steps": 1},
    )
    with pytest.raises(NonFiniteLossError, match="weights after step 1 of epoch 1 are not finite"):
        run(settings)
    assert newest_checkpoint(str(tmp_path / "tiny"))[0] is None


def test_bad_images_are_left_out_counted_and_named(prepared: Path, tmp_path: Path) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(prepared, root)
    keys = {}
    for split in ("train", "validation"):
        manifest = Manifest.open(root / "shards" / split)
        keys[split] = manifest.key(3)
        path = Path(manifest.shard_path(int(manifest.shard[3])))
        data = bytearray(path.read_bytes())
        data[int(manifest.offset[3]) + 100] ^= 1
        path.write_bytes(data)
    said: list[str] = []
    result = train(tiny_settings(root, tmp_path, data={"max_bad_share": 0.1}), World(), quiet(said))
    assert [figures["train/bad_images"] for figures in result.history] == [1, 1]
    for title in ("epoch 1", "epoch 2"):
        line = next(line for line in said if line.startswith(f"{title}: 1 images could not be used"))
        assert keys["train"] in line
        assert "CRC-32" in line
    assert any("validation: 1 images could not be used" in line and keys["validation"] in line for line in said)
    with pytest.raises(DataError, match=rf"more than data.max_bad_share.*{keys['train']}"):
        run(tiny_settings(root, tmp_path / "strict"))


def test_a_rate_that_rejects_too_much_is_warned_of(prepared: Path, tmp_path: Path) -> None:
    said: list[str] = []
    train(tiny_settings(prepared, tmp_path, loss={"reject_rate_step": 0.5}), World(), quiet(said))
    assert any(line.startswith("warning: loss.reject_rate_step 0.5 rejects") for line in said)


def test_data_that_are_not_there_are_refused_with_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not there. Prepare the data first: `python jobs/prepare_openimages.py"):
        run(tiny_settings(tmp_path / "none", tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0; it must be at least 1, or null"),
        ({"patience": 0}, "patience is 0"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"precision": "fp8"}, "precision is 'fp8'; it must be auto, bf16, fp16 or fp32"),
        ({"workers": {"num_workers": 9}}, "num_workers is 9, more than the 8 slots"),
        ({"workers": {"num_workers": 2, "min_workers": 3}}, "min_workers is 3; it must be between 1 and"),
        ({"workers": {"num_workers": 2, "min_workers": 1}}, "workers.cpus_per_worker is null, a share of a cluster"),
        ({"workers": {"resize_seconds": -1}}, "workers.resize_seconds is -1"),
        ({"loss": {"reject_pool": 3}}, r"reject_pool is 3; it must divide batch_size \(8\)"),
        ({"data": {"flip": 1.5}}, "data.flip is 1.5; it must lie between 0 and 1"),
        ({"data": {"crop": 0.0}}, "data.crop is 0.0; it must be above 0 and at most 1"),
        ({"data": {"crop": 0.5}, "model": {"train_from": "conv5"}}, "set data.crop to 1, or model.train_from to null"),
        ({"data": {"prefetch": 0}}, "data.prefetch is 0"),
        ({"data": {"images": "some"}}, "data.images is 'some'; it must be observed, positive or all"),
        ({"run": {"name": "a/b"}}, "run.name is 'a/b'; it names a folder"),
    ],
)
def test_settings_that_contradict_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        tiny_settings(tmp_path, tmp_path, **changes)


def test_settings_survive_being_stored(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, tmp_path, boost={"eval_also": (1.0, 2.0)}, patience=3)
    assert unflatten(TrainSettings, json.loads(json.dumps(flatten(settings)))) == settings
    assert flatten(settings) == flatten(dataclasses.asdict(settings))
