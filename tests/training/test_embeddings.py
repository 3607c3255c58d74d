"""Training on embeddings: a linear layer or a map head, on a user's own file, with everything else unchanged."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.audit.audit import AuditSettings, audit
from paml.data import embeddings
from paml.data.settings import DataSettings
from paml.errors import DataError, PamlError, SettingsError
from paml.explain.analysis import ExplainSettings, explain
from paml.inference.calibrate import CalibrateSettings, calibrate_run
from paml.inference.predictor import open_predictor
from paml.losses import LOSSES
from paml.models import ModelSettings, build_model
from paml.pipeline import train_and_report
from paml.runs.evaluate import EvaluateSettings, evaluate
from paml.runs.folder import Run
from paml.runs.train import train
from paml.tracking.registry import RegisterSettings, register_run
from paml.training.data import open_data
from paml.training.settings import TrainSettings
from tests.helpers.prepared import tiny_settings, write_states
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import finish, run
from tests.training.test_resume import FULL, assert_same_bits, newest

COUNTS = {"train": 180, "validation": 70, "test": 50}
KEYS = {split: [f"{split}/{number:03d}.jpg" for number in range(count)] for split, count in COUNTS.items()}
ALL = [key for keys in KEYS.values() for key in keys]
C, K = 24, 6


def vectors(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(len(ALL), C, *size)).astype(np.float32)


VECTORS = vectors()
TRUTH = VECTORS @ np.random.default_rng(1).normal(size=(C, K)) > 2.5
"""bool[N, K], linear in the vectors."""


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Label tables only: a third of train, all of validation and test."""
    root, end = tmp_path_factory.mktemp("labels"), 0
    for split, count in COUNTS.items():
        truth = TRUTH[end : end + count]
        end += count
        seen = np.ones_like(truth) if split != "train" else np.random.default_rng(5).random(truth.shape) < 1 / 3
        seen[:, 0] = True
        write_states(root / "labels" / f"{split}.arrow", KEYS[split], truth, seen)
    return root


@pytest.fixture(autouse=True)
def forget_files() -> None:
    embeddings._open.cache_clear()


def save_npy(folder: Path, values: np.ndarray, keys: list[str] = ALL) -> Path:
    np.save(folder / "vectors.npy", values)
    (folder / "keys.txt").write_text("".join(f"{key}\n" for key in keys))
    return folder / "vectors.npy"


def save_parquet(folder: Path, values: Any, keys: list[Any] = ALL, name: str = "vectors.parquet", **table: Any) -> Path:
    if isinstance(values, np.ndarray):
        values = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    pq.write_table(pa.table({"key": keys, "vector": values} | table), folder / name, row_group_size=64)
    return folder / name


def settings_of(labels: Path, folder: Path, file: Path, **changes: Any) -> TrainSettings:
    changes["data"] = {"embeddings": str(file), "features_dir": str(folder / "features")} | changes.get("data", {})
    plain = {"boost": {"train": 1.0, "eval": 1.0}, "optimizer": {"learning_rate": 1e-2}, "batch_size": 20}
    settings = tiny_settings(labels, folder / "runs", **plain | changes)
    return dataclasses.replace(settings, model=ModelSettings())


def opened(labels: Path, folder: Path, file: Path, **data: Any) -> dict[str, np.ndarray]:
    """The embedding of each key of train, [H, W, C]."""
    split = open_data(settings_of(labels, folder, file, data=data).data).train
    assert split.features is not None
    return {split.manifest.key(index): split.features.plain[index] for index in split.samples.index}


# Files


def as_list(kind: Any, dtype: type) -> Any:
    return lambda folder: save_parquet(folder, pa.array(list(VECTORS.astype(dtype)), kind))


def keys_as_npy(folder: Path) -> Path:
    file = save_npy(folder, VECTORS)
    (folder / "keys.txt").unlink()
    np.save(folder / "vectors.keys.npy", np.array(ALL))
    return file


def keys_as_bytes(folder: Path) -> Path:
    file = save_npy(folder, VECTORS)
    (folder / "keys.txt").unlink()
    np.save(folder / "keys.npy", np.array(ALL, "S"))
    return file


def one_file_per_split(folder: Path) -> Path:
    for split, keys in KEYS.items():
        start = ALL.index(keys[0])
        save_parquet(folder, VECTORS[start : start + len(keys)], keys, f"{split}.parquet")
    return folder / "{split}.parquet"


FORMATS = {
    "npy": lambda folder: save_npy(folder, VECTORS),
    "npy, big-endian float64": lambda folder: save_npy(folder, VECTORS.astype(">f8")),
    "npy, Fortran order": lambda folder: save_npy(folder, np.asfortranarray(VECTORS)),
    "npy, keys as npy": keys_as_npy,
    "npy, keys as bytes": keys_as_bytes,
    "parquet, fixed size": lambda folder: save_parquet(folder, VECTORS),
    "parquet, lists": as_list(pa.list_(pa.float32()), np.float32),
    "parquet, large lists of float64": as_list(pa.large_list(pa.float64()), np.float64),
    "parquet, other columns": lambda folder: save_parquet(folder, VECTORS, size=[7] * len(ALL), url=ALL),
    "parquet, one file per split": one_file_per_split,
}


@pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)
def test_each_format_gives_the_same_vectors(save: Any, labels: Path, tmp_path: Path) -> None:
    values = opened(labels, tmp_path, save(tmp_path))
    assert values.keys() == set(KEYS["train"])
    for key, value in values.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, VECTORS[ALL.index(key)].reshape(1, 1, C))


@pytest.mark.parametrize("save", [save_npy, save_parquet])
def test_half_precision_is_kept(save: Any, labels: Path, tmp_path: Path) -> None:
    values = opened(labels, tmp_path, save(tmp_path, VECTORS.astype(np.float16)))
    assert {value.dtype for value in values.values()} == {np.dtype(np.float16)}
    np.testing.assert_array_equal(values[ALL[7]].reshape(C), VECTORS[7].astype(np.float16))


def test_maps_have_their_channels_last(labels: Path, tmp_path: Path) -> None:
    maps = vectors(2, 3)
    values = opened(labels, tmp_path, save_npy(tmp_path, maps))
    np.testing.assert_array_equal(values[ALL[9]], maps[9].transpose(1, 2, 0))


def test_a_file_in_a_bucket(s3: str, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paml import storage

    monkeypatch.setenv("PAML_CACHE", str(tmp_path / "cache"))
    for name in ("vectors.npy", "keys.txt"):
        storage.copy(str(save_npy(tmp_path, VECTORS).with_name(name)), f"{s3}/here/{name}")
    values = opened(labels, tmp_path, Path("x"), embeddings=f"{s3}/here/vectors.npy")
    np.testing.assert_array_equal(values[ALL[3]].reshape(C), VECTORS[3])


def test_the_conversion_is_reused_until_the_file_changes_or_the_conversion_is_damaged(
    labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions: list[str] = []
    convert = embeddings._convert
    monkeypatch.setattr(embeddings, "_convert", lambda path, *rest: (conversions.append(path), convert(path, *rest)))
    settings = settings_of(labels, tmp_path, save_npy(tmp_path, VECTORS)).data

    def digest() -> str:
        embeddings._open.cache_clear()
        return open_data(settings).train.manifest.digest

    first = digest()
    assert (digest(), len(conversions)) == (first, 1)
    (converted,) = (tmp_path / "features").glob("*/vectors-*.npy")
    content = bytearray(converted.read_bytes())
    content[-3] ^= 1
    converted.write_bytes(content)
    assert (digest(), len(conversions)) == (first, 2)
    save_npy(tmp_path, VECTORS, [*ALL[1:], ALL[0]])
    assert digest() != first, "the same vectors with other keys are other data"
    assert len(conversions) == 3


# Files that are refused


def changed(index: Any, value: float) -> np.ndarray:
    values = VECTORS.copy()
    values[index] = value
    return values


def without_keys(folder: Path) -> Path:
    file = save_npy(folder, VECTORS)
    (folder / "keys.txt").unlink()
    return file


def two_files_of_keys(folder: Path) -> Path:
    np.save(folder / "keys.npy", np.array(ALL))
    return save_npy(folder, VECTORS)


def pickled(folder: Path) -> Path:
    file = save_npy(folder, VECTORS)
    np.save(file, np.array([{}, 1], object), allow_pickle=True)
    return file


def pickled_keys(folder: Path) -> Path:
    file = without_keys(folder)
    np.save(folder / "keys.npy", np.array(ALL, object), allow_pickle=True)
    return file


def truncated(folder: Path) -> Path:
    file = save_parquet(folder, VECTORS)
    file.write_bytes(file.read_bytes()[:-100])
    return file


def empty(folder: Path) -> Path:
    file = save_npy(folder, VECTORS)
    file.write_bytes(b"")
    return file


def ragged(folder: Path) -> Path:
    rows = [row.tolist() for row in VECTORS]
    rows[100] = rows[100][:-1]
    return save_parquet(folder, pa.array(rows, pa.list_(pa.float32())))


def with_null(folder: Path) -> Path:
    rows: list[Any] = [row.tolist() for row in VECTORS]
    rows[100][3] = None
    return save_parquet(folder, pa.array(rows, pa.list_(pa.float32())))


def null_vector(folder: Path) -> Path:
    rows: list[Any] = [row.tolist() for row in VECTORS]
    rows[100] = None
    return save_parquet(folder, pa.array(rows, pa.list_(pa.float32(), C)))


REFUSED = {
    "missing": (lambda folder: folder / "none.npy", "none.npy does not exist"),
    "no keys": (without_keys, "keys.txt"),
    "two files of keys": (two_files_of_keys, "keys.txt and .*keys.npy exist"),
    "fewer keys": (lambda folder: save_npy(folder, VECTORS, ALL[:-1]), "300 rows.*299 keys"),
    "NaN": (lambda folder: save_npy(folder, changed((100, 3), np.nan)), f"'{ALL[100]}'.*NaN"),
    "infinite": (lambda folder: save_parquet(folder, changed((299, 0), -np.inf)), f"'{ALL[299]}'"),
    "too large": (lambda folder: save_npy(folder, VECTORS.astype(float) * 1e300), f"'{ALL[0]}'.*float32"),
    "null value": (with_null, f"'{ALL[100]}'"),
    "null vector": (null_vector, "size=24 .*size=0"),
    "ragged": (ragged, f"'{ALL[100]}' has {C - 1} values, others have {C}"),
    "duplicate": (lambda folder: save_npy(folder, VECTORS, [*ALL[:-1], ALL[4]]), f"1 keys .*'{ALL[4]}'"),
    "empty key": (lambda folder: save_npy(folder, VECTORS, [*ALL[:-1], ""]), "key of row 300"),
    "null key": (lambda folder: save_parquet(folder, VECTORS, [*ALL[:-1], None]), "key of row 300"),
    "three axes": (lambda folder: save_npy(folder, VECTORS[:, :, None]), r"\[300, 24, 1\]"),
    "no rows": (lambda folder: save_npy(folder, VECTORS[:0], []), r"\[0, 24\]"),
    "integers": (lambda folder: save_npy(folder, VECTORS.astype(np.int8)), "int8"),
    "two vectors": (lambda folder: save_parquet(folder, VECTORS, more=[[1.0]] * len(ALL)), "more .list"),
    "no vector": (lambda folder: save_parquet(folder, ALL), "key .string.*vector .string"),
    "pickled": (pickled, "vectors.npy.*Python objects"),
    "pickled keys": (pickled_keys, "vectors.npy.*Python objects"),
    "truncated": (truncated, "vectors.parquet"),
    "empty": (empty, "vectors.npy"),
}


@pytest.mark.parametrize(("save", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_cannot_be_used_is_refused(save: Any, message: str, labels: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as error:
        opened(labels, tmp_path, save(tmp_path))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "features").glob("*/*vectors*")), "nothing is left"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, len(ALL)))
def test_keys_of_less_than_half_of_the_images_are_refused(tmp_path_factory, labels: Path, wrong: int) -> None:
    folder = tmp_path_factory.mktemp("wrong")
    keys = [key.replace(".jpg", "") if number < wrong else key for number, key in enumerate(ALL)]
    file = save_npy(folder, VECTORS, keys)
    if 2 * wrong <= COUNTS["train"]:
        assert len(opened(labels, folder, file)) == COUNTS["train"] - wrong
    else:
        with pytest.raises(DataError, match=r"of the \d+ images of .*'\w+/\d+.jpg', the embeddings '\w+/\d+'"):
            opened(labels, folder, file)


def test_too_little_disk_space_is_detected_first(labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 12345))  # pyright: ignore
    with pytest.raises(SettingsError, match=r"need 28,800 bytes.*12,345 bytes free: set data.features_dir"):
        opened(labels, tmp_path, save_npy(tmp_path, VECTORS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boost": {"train": 2.0}}, "boost is 2"),
        ({"boost": {"eval_also": (5.0,)}}, "boost is 5"),
        ({"data": {"embeddings": "vectors.npz"}}, "vectors.npz"),
        ({"data": {"min_crop_area": 0.5}}, "data.min_crop_area"),
    ],
)
def test_settings_that_need_images_or_maps_are_refused(
    changes: dict, message: str, labels: Path, tmp_path: Path
) -> None:
    changes.setdefault("boost", {}).setdefault("eval", 1.0)
    changes["boost"].setdefault("train", 1.0)
    with pytest.raises(SettingsError, match=message):
        run(settings_of(labels, tmp_path, save_npy(tmp_path, VECTORS), **changes))


def test_a_backbone_of_embeddings_needs_the_file() -> None:
    with pytest.raises(SettingsError, match=r"set data\.embeddings"):
        TrainSettings(data=DataSettings(root="x"), model=ModelSettings(backbone="embeddings/24"))


# The model


@pytest.mark.parametrize("size", [(1, 1), (2, 4)])
def test_logits_are_those_of_a_linear_layer(size: tuple[int, int]) -> None:
    """On small integers every sum is exact, so the order of additions does not matter."""
    model = build_model(ModelSettings(backbone=f"embeddings/{C}", weights=None), K).eval()
    linear = torch.nn.Linear(C, K)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.copy_(torch.randint(-8, 9, parameter.shape))
        linear.weight.copy_(model.head.weight.reshape(K, C))
        linear.bias.copy_(model.head.bias)  # pyright: ignore
        maps = torch.randint(-8, 9, (5, C, *size)).float()
        assert torch.equal(model(maps), linear(maps.mean((2, 3))))
        per_cell = linear(maps.permute(0, 2, 3, 1))
        boosted = torch.where(per_cell > 0, 4 * per_cell, per_cell).mean((1, 2))
        assert torch.equal(model(maps, 4.0), boosted)


def test_the_initial_weights_are_those_of_a_linear_layer() -> None:
    model = build_model(ModelSettings(backbone=f"embeddings/{C}", weights=None), K, seed=4)
    torch.manual_seed(4)
    assert torch.equal(model.head.weight.reshape(K, C), torch.nn.Linear(C, K).weight)


# Runs


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_npy(tmp_path_factory.mktemp("file"), VECTORS)


@pytest.mark.parametrize("loss", sorted(LOSSES.keys() - {"full"}))
def test_every_loss_for_partial_labels_learns(loss: str, file: Path, labels: Path, tmp_path: Path) -> None:
    result = run(settings_of(labels, tmp_path, file, loss={"name": loss}, epochs=3))
    assert result is not None
    assert result.test["1"].map > TRUTH.mean() + 0.2, "the mAP of a constant score is the fraction of positives"


def test_a_boosted_map_head_learns(labels: Path, tmp_path: Path) -> None:
    maps = VECTORS[:, :, None, None] + 2 * vectors(2, 2, seed=3)
    changes = {"boost": {"train": 3.0, "eval": 3.0, "eval_also": (1.0,)}}
    result = run(settings_of(labels, tmp_path, save_npy(tmp_path, maps), epochs=4, **changes))
    assert result is not None
    assert result.test["3"].map > TRUTH.mean() + 0.2
    assert result.test["3"].map != result.test["1"].map


@pytest.mark.parametrize("images", ["observed", "positive", "all"])
def test_a_file_of_all_splits_trains_on_images_of_train_alone(
    images: Any, file: Path, labels: Path, tmp_path: Path
) -> None:
    assert set(opened(labels, tmp_path, file, images=images)) <= set(KEYS["train"])


def test_a_resumed_run_ends_with_the_same_bits(file: Path, labels: Path, tmp_path: Path) -> None:
    changes = FULL | {"batch_size": 64}
    whole, resumed = (settings_of(labels, tmp_path / name, file, **changes) for name in ("whole", "resumed"))
    assert run(whole) is not None
    for stop in (2, 4, 3):
        assert run(resumed, stop_at=stop) is None
    assert run(resumed) is not None
    assert_same_bits(newest(whole), newest(resumed))


def test_a_run_is_not_resumed_with_other_embeddings(labels: Path, tmp_path: Path) -> None:
    settings = settings_of(labels, tmp_path, save_npy(tmp_path, VECTORS), checkpoint={"every_steps": 1})
    assert run(settings, stop_at=3) is None
    save_npy(tmp_path, VECTORS * 2)
    embeddings._open.cache_clear()
    with pytest.raises(SettingsError, match=r"training images .*have changed"):
        run(settings)


def test_two_workers_train_as_one(file: Path, labels: Path, tmp_path: Path) -> None:
    one, two = (settings_of(labels, tmp_path / name, file, batch_size=19) for name in ("one", "two"))
    assert run(one) is not None
    run_on_ranks(finish, 2, two)
    weights, expected = (newest(settings).tensors["weights"]["head.weight"] for settings in (two, one))
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def finished(file: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    settings = settings_of(labels, tmp_path_factory.mktemp("finished"), file, epochs=3)
    return train_and_report(settings, log=lambda line: None).folder


def test_a_finished_run_is_evaluated_and_calibrated(finished: str) -> None:
    quiet: Any = lambda line: None  # noqa: E731
    score = Run.open(finished).scores[1.0].map
    assert evaluate(EvaluateSettings(run=finished), quiet)["alpha 1"].map == pytest.approx(score)
    assert len(calibrate_run(CalibrateSettings(run=finished), quiet).slope) == K


def test_the_weights_of_the_model_are_applied_by_hand(finished: str, labels: Path) -> None:
    """As docs/embeddings.md describes it."""
    from safetensors.numpy import load_file

    weights = load_file(Path(finished, "model", "weights.safetensors"))
    logits = VECTORS @ weights["head.weight"].reshape(K, C).T + weights["head.bias"]
    right = (logits[-COUNTS["test"] :] > 0) == TRUTH[-COUNTS["test"] :]
    assert right.mean() > 0.8


def test_commands_that_show_images_refuse_the_run(finished: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    commands: list[Any] = [
        lambda: open_predictor(finished),
        lambda: open_predictor(finished + "/model"),
        lambda: explain(ExplainSettings(runs={"a": finished, "b": finished}, out=out)),
        lambda: audit(AuditSettings(run=finished, out=out)),
        lambda: register_run(RegisterSettings(run=finished)),
    ]
    for command in commands:
        with pytest.raises(PamlError, match="trained on embeddings"):
            command()


def test_evaluating_other_embeddings_is_refused(finished: str, labels: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(finished, copied)
    other = save_npy(tmp_path, VECTORS[:, :-1])
    text = (copied / "run.json").read_text()
    stored = json.loads(text)["settings"]["data.embeddings"]
    (copied / "run.json").write_text(text.replace(stored, str(other)))
    with pytest.raises(SettingsError, match=rf"of {C} values.*\[{C - 1}, 1, 1\]"):
        evaluate(EvaluateSettings(run=str(copied)), lambda line: None)


def test_the_same_command_resumes(file: Path, labels: Path, tmp_path: Path) -> None:
    settings = settings_of(labels, tmp_path, file)
    train(settings, log=lambda line: None)
    again = dataclasses.replace(settings, run=dataclasses.replace(settings.run, resume=True))
    assert train(again, log=lambda line: None).settings.model.backbone == f"embeddings/{C}"
