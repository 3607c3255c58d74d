"""A run in one process: metrics, best epoch, checkpoints, and errors that stop it."""

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
from paml.runs.evaluate import EvaluateSettings, evaluate
from paml.settings import flatten, unflatten
from paml.shards import Manifest
from paml.training.checkpoint import list_checkpoints, newest_checkpoint, read_checkpoint
from paml.training.loop import train
from paml.training.result import Result
from paml.training.settings import TrainSettings
from paml.training.world import World
from tests.helpers.prepared import CLASSES, tiny_settings
from tests.helpers.runs import MemoryJournal, quiet, run

TRUTH = {"train_truth": "labels/train-full.arrow"}


@pytest.fixture(scope="module")
def finished(
    prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainSettings, Result, MemoryJournal, list[str]]:
    """A run of LL-R with EMA weights, two alphas and full truth."""
    settings = tiny_settings(
        prepared,
        tmp_path_factory.mktemp("finished"),
        data=TRUTH,
        boost={"eval_also": (1.0,)},
        optimizer={"ema_decay": 0.5, "learning_rate": 3e-3},
        epochs=4,
        checkpoint={"keep": 1},
    )
    journal, lines = MemoryJournal(), []
    result = train(settings, World(), quiet(lines, record_metrics=journal.metrics))
    (Path(settings.run.folder) / "run.json").write_text(json.dumps({"settings": flatten(settings)}))
    return settings, result, journal, lines


def test_the_metrics_of_every_epoch_are_in_the_journal(finished) -> None:
    _, result, journal, lines = finished
    assert [step for step, _ in journal.epochs[:4]] == [1, 2, 3, 4]
    expected = {"train/loss", "train/learning_rate", "train/images_per_second", "train/bad_images"}
    expected |= {
        "val/mAP",
        "val/micro_AP",
        "val/micro_F1",
        "groups/G1",
        "groups/G5",
        "val/mAP_alpha_1",
        "rejection/rejected",
    }
    expected |= {"rejection/rejected_fraction", "rejection/precision", "rejection/recall"}
    for step, metrics in journal.epochs[:4]:
        assert expected <= metrics.keys()
        assert result.history[step - 1] == pytest.approx({"epoch": step, **metrics}, nan_ok=True)
        assert math.isfinite(metrics["train/loss"])
        assert not any("probe" in name for name in metrics)
    assert journal.epochs[-1][0] == result.best["5"]["epoch"]
    assert {"test/mAP", "test/G3", "test/mAP_alpha_1"} <= journal.epochs[-1][1].keys()
    assert not any(name.startswith("val/") for name in journal.epochs[-1][1])
    assert len([line for line in lines if line.startswith("epoch ")]) == 4
    assert result.history[-1]["train/loss"] < result.history[0]["train/loss"]


def test_exactly_the_fraction_of_the_paper_is_rejected_and_none_in_the_first_epoch(finished, prepared: Path) -> None:
    _, result, _, _ = finished
    table = LabelTable.open(prepared / "labels" / "train.arrow")
    unobserved = 46 * len(CLASSES) - table.num_annotations
    for metrics in result.history:
        rejected = metrics["rejection/rejected"]
        rate = 0.05 * (metrics["epoch"] - 1)
        assert rate * unobserved <= rejected <= rate * unobserved + 6 * math.ceil(rate)
        assert metrics["rejection/rejected_fraction"] == pytest.approx(rejected / unobserved)
        if rejected:
            hits = metrics["rejection/rejected_false_negatives"]
            assert metrics["rejection/precision"] == pytest.approx(hits / rejected)
            truth = LabelTable.open(prepared / "labels" / "train-full.arrow")
            missing = truth.class_counts()[0].sum() - table.class_counts()[0].sum()
            assert metrics["rejection/recall"] == pytest.approx(hits / missing)


def test_the_best_epoch_has_the_highest_validation_map(finished) -> None:
    _, result, _, _ = finished
    for alpha, name in (("5", "val/mAP"), ("1", "val/mAP_alpha_1")):
        maps = [metrics[name] for metrics in result.history]
        assert result.best[alpha]["map"] == max(maps)
        assert result.best[alpha]["epoch"] == maps.index(max(maps)) + 1


def test_the_newest_and_the_best_checkpoints_are_retained(finished) -> None:
    settings, result, _, _ = finished
    names = list_checkpoints(settings.run.folder)
    assert set(names) == {best["checkpoint"] for best in result.best.values()} | {"step-000000024"}
    for name in names:
        read_checkpoint(settings.run.folder, name)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_evaluating_the_run_later_gives_the_same_scores(split: str, finished, tmp_path: Path) -> None:
    settings, result, _, _ = finished
    lines: list[str] = []
    evaluation = EvaluateSettings(run=settings.run.folder, split=split, per_class=str(tmp_path / "classes.parquet"))
    rows = evaluate(evaluation, lines.append)
    assert list(rows) == ["alpha 5", "alpha 1"]
    if split == "test":
        assert rows["alpha 5"].map == pytest.approx(result.test["5"].map, abs=1e-6)
        np.testing.assert_allclose(rows["alpha 5"].per_class, result.test["5"].per_class, atol=1e-6)
    else:
        assert rows["alpha 5"].map == pytest.approx(result.best["5"]["map"], abs=1e-6)
    assert "G5" in lines[0]
    assert (tmp_path / "classes.parquet").exists()


def test_evaluating_a_missing_run_checkpoint_or_split_is_refused(finished, tmp_path: Path) -> None:
    settings, _, _, _ = finished
    with pytest.raises(DataError, match=r"run\.json is missing"):
        evaluate(EvaluateSettings(run=str(tmp_path)))
    with pytest.raises(SettingsError, match=r"'step-1'.*step-0000"):
        evaluate(EvaluateSettings(run=settings.run.folder, checkpoint="step-1"))
    with pytest.raises(DataError, match=r"nowhere.*`paml prepare`"):
        evaluate(EvaluateSettings(run=settings.run.folder, split="nowhere"))


def test_a_result_survives_json(finished) -> None:
    _, result, _, _ = finished
    loaded = Result.from_json(json.loads(json.dumps(result.to_json())))
    assert loaded.best == result.best
    assert loaded.test["1"].groups == result.test["1"].groups
    np.testing.assert_array_equal(loaded.test["1"].per_class, result.test["1"].per_class)


@pytest.mark.parametrize("loss", ["an", "iu", "ll-ct", "ll-cp"])
def test_losses_train_and_report_rejection_and_recovery(loss: str, prepared: Path, tmp_path: Path) -> None:
    result = run(tiny_settings(prepared, tmp_path, loss={"name": loss}, data={"probe_fraction": 0.2}, epochs=3))
    assert result is not None
    assert result.history[-1]["train/loss"] < result.history[0]["train/loss"]
    last = result.history[-1]
    assert ("rejection/rejected" in last) == loss.startswith("ll-")
    assert ("rejection/probe_recall" in last) == loss.startswith("ll-")
    assert ("recovery/recovered" in last) == (loss in ("ll-ct", "ll-cp"))
    if loss == "ll-cp":
        assert last["recovery/recovered_total"] == sum(f["rejection/rejected"] for f in result.history)


def test_full_labels_train(prepared: Path, tmp_path: Path) -> None:
    data = {"train_labels": "labels/train-full.arrow"}
    assert run(tiny_settings(prepared, tmp_path, loss={"name": "full"}, data=data)) is not None


def test_patience_ends_a_run_without_improvement(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        prepared,
        tmp_path,
        model={"batch_norm": "frozen"},
        optimizer={"learning_rate": 1e-30},
        patience=2,
        epochs=9,
    )
    result = run(settings)
    assert result is not None
    assert [metrics["epoch"] for metrics in result.history] == [1, 2, 3]
    assert result.best["5"]["epoch"] == 1
    again = run(settings)
    assert again is not None
    assert len(again.history) == 3


def test_a_non_finite_loss_stops_the_run_and_its_images_are_named(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        prepared,
        tmp_path,
        optimizer={"name": "sgd", "learning_rate": 1e30, "schedule": "one_cycle", "momentum": 0.0},
        model={"batch_norm": "frozen"},
        checkpoint={"every_steps": 1, "keep": None},
    )
    with pytest.raises(NonFiniteLossError) as caught:
        run(settings)
    manifest = Manifest.open(prepared / "shards" / "train")
    assert re.search(r"step \d in epoch 1 is not finite on worker 0", str(caught.value))
    named = re.findall(r"\b[0-9a-f]{16}\b", str(caught.value))
    assert len(named) == 8
    assert set(named) <= set(manifest.keys().to_pylist())
    assert "optimizer.learning_rate" in str(caught.value)
    for name in list_checkpoints(str(tmp_path / "tiny")):
        weights = read_checkpoint(str(tmp_path / "tiny"), name).tensors["weights"]
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_non_finite_weights_are_not_saved(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        prepared,
        tmp_path,
        optimizer={"name": "sgd", "learning_rate": 1e30, "weight_decay": 1e20},
        checkpoint={"every_steps": 1},
    )
    with pytest.raises(NonFiniteLossError, match="weights after step 1 of epoch 1"):
        run(settings)
    assert newest_checkpoint(str(tmp_path / "tiny"))[0] is None


def test_unreadable_images_are_skipped_counted_and_named(prepared: Path, tmp_path: Path) -> None:
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
    lines: list[str] = []
    result = train(tiny_settings(root, tmp_path, data={"max_bad_fraction": 0.1}), World(), quiet(lines))
    assert [metrics["train/bad_images"] for metrics in result.history] == [1, 1]
    for title in ("epoch 1", "epoch 2"):
        line = next(line for line in lines if line.startswith(f"{title}: skipped 1 unreadable"))
        assert keys["train"] in line
        assert "CRC-32" in line
    assert any("validation: skipped 1 unreadable" in line and keys["validation"] in line for line in lines)
    with pytest.raises(DataError, match=rf"data\.max_bad_fraction.*{keys['train']}"):
        run(tiny_settings(root, tmp_path / "strict"))


def test_a_rate_that_rejects_too_much_gives_a_warning(prepared: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    train(tiny_settings(prepared, tmp_path, loss={"reject_rate_step": 0.5}), World(), quiet(lines))
    assert any(line.startswith("warning: loss.reject_rate_step") and "0.5" in line for line in lines)


def test_missing_data_are_refused_and_the_command_that_prepares_them_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`paml prepare`"):
        run(tiny_settings(tmp_path / "none", tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"grad_accum_steps": 0}, "grad_accum_steps is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"workers": {"num_workers": 9}}, "num_workers is 9"),
        ({"workers": {"num_workers": 2, "min_workers": 3}}, "min_workers is 3"),
        ({"workers": {"num_workers": 2, "min_workers": 1}}, "set workers.cpus_per_worker"),
        ({"loss": {"reject_pool": 3}}, r"reject_pool is 3.*batch_size \(8\)"),
        ({"data": {"flip_prob": 1.5}}, "data.flip_prob is 1.5"),
        ({"data": {"min_crop_area": 0.0}}, "data.min_crop_area is 0.0"),
        ({"data": {"min_crop_area": 0.5}, "model": {"train_from": "conv5"}}, "set data.min_crop_area to 1"),
        ({"data": {"images": "some"}}, "data.images is 'some'"),
        ({"run": {"name": "a/b"}}, "run.name is 'a/b'"),
        ({"run": {"name": None, "resume": True}}, "run.resume needs run.name"),
    ],
)
def test_wrong_and_contradictory_settings_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        tiny_settings(tmp_path, tmp_path, **changes)


def test_settings_survive_json(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, tmp_path, boost={"eval_also": (1.0, 2.0)}, patience=3)
    assert unflatten(TrainSettings, json.loads(json.dumps(flatten(settings)))) == settings
    assert flatten(settings) == flatten(dataclasses.asdict(settings))
