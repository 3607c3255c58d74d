"""Predictions of many images equal those of single images, are complete or absent per part, and resume."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paml import storage
from paml.errors import DataError, SettingsError
from paml.inference import bulk
from paml.inference.bulk import BulkSettings, predict_images
from paml.inference.predictor import open_predictor
from paml.tasks import LocalTaskRunner, PartsFailed
from tests.helpers.prepared import CLASSES, COUNTS, jpeg_image, key_of

ALL = BulkSettings(top=None, value="logit", batch_size=4)


def rows_of(out: Path | str) -> dict[str, dict]:
    """All rows, by key."""
    rows: dict[str, dict] = {}
    for name in storage.list_files(storage.join(str(out), "scores")):
        data = storage.read_bytes(storage.join(str(out), "scores", name))
        for row in pq.read_table(pa.BufferReader(data)).to_pylist():
            assert row["key"] not in rows
            rows[row["key"]] = row
    return rows


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def predict(model: str, source: Path | str, out: Path | str, settings: BulkSettings = ALL, **more):
    return predict_images(model, str(source), str(out), settings, **{"log": lambda line: None} | more)


def write_images(folder: Path, count: int = 11) -> Path:
    """Images in two folders, and three that cannot be read for different reasons."""
    for number in range(count):
        path = folder / ("a" if number % 2 else "b") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_image("test", number, 40 + number))
    (folder / "a" / "empty.jpg").touch()
    (folder / "a" / "text.png").write_text("not an image")
    (folder / "a" / "nowhere.jpg").symlink_to(folder / "gone.jpg")
    return folder


def test_shards_give_the_predictors_scores_and_top_holds_the_highest(
    trained: str, prepared: Path, tmp_path: Path
) -> None:
    source = prepared / "shards" / "test"
    result = predict(trained, source, tmp_path / "all")
    assert result == (COUNTS["test"], 0, 0)
    rows = rows_of(tmp_path / "all")
    assert set(rows) == {key_of("test", number) for number in range(COUNTS["test"])}
    predictor = open_predictor(trained)
    for number in range(COUNTS["test"]):
        expected = predictor.forward(predictor.decode(jpeg_image("test", number))[None]).logits_BK[0]
        np.testing.assert_allclose(rows[key_of("test", number)]["scores"], expected, atol=0.05)

    from paml.shards.manifest import Manifest
    from paml.shards.reader import ShardReader

    reader = ShardReader(Manifest.open(source))
    predict(trained, source, tmp_path / "top", BulkSettings(top=3, maps=True, batch_size=5))
    classes = read_csv(tmp_path / "top" / "classes.csv")
    assert [row["mid"] for row in classes] == list(CLASSES)
    file = sorted((tmp_path / "top" / "scores").iterdir())[0]
    metadata = pq.read_metadata(file)
    assert metadata.schema.to_arrow_schema().field("scores").type == pa.list_(pa.float16())
    size = json.loads(metadata.metadata[b"map_size"])
    for index in range(COUNTS["test"]):
        output = predictor.forward(predictor.decode(reader.read(index))[None], with_maps=True)
        row = rows_of(tmp_path / "top")[reader.manifest.key(index)] if index < 3 else None
        scores = rows[reader.manifest.key(index)]["scores"]
        np.testing.assert_allclose(scores, output.logits_BK[0].astype(np.float16), rtol=2e-3, atol=1e-5)
        if row is not None:
            best = np.argsort(-output.scores_BK[0], kind="stable")[:3]
            assert row["mids"] == [CLASSES[cls] for cls in best]
            np.testing.assert_allclose(row["scores"], output.scores_BK[0][best], rtol=1e-3)
            assert output.maps_BKHW is not None
            maps = np.array(row["maps"]).reshape(3, *size)
            np.testing.assert_allclose(maps, output.maps_BKHW[0][best], rtol=2e-3, atol=1e-4)


def test_a_folder_of_images_with_unreadable_ones(trained: str, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    lines: list[str] = []
    result = predict(
        trained, images, tmp_path / "out", BulkSettings(top=2, files_per_part=4, batch_size=3), log=lines.append
    )
    assert result == (11, 3, 0)
    rejects = {row["key"]: row["reason"] for row in read_csv(tmp_path / "out" / "rejects.csv")}
    assert set(rejects) == {"a/empty", "a/text", "a/nowhere"}
    assert "empty file" in rejects["a/empty"]
    assert "not in the folder" in rejects["a/nowhere"]
    rows = rows_of(tmp_path / "out")
    assert set(rows) == {f"{'a' if number % 2 else 'b'}/{number}" for number in range(11)}
    predictor = open_predictor(trained)
    for number in (0, 3):
        pixels = predictor.decode(jpeg_image("test", number, 40 + number))
        (first, _) = predictor.top_classes(predictor.forward(pixels[None]).scores_BK[0], 2)
        row = rows[f"{'a' if number % 2 else 'b'}/{number}"]
        assert row["mids"][0] == first.class_id
        assert row["scores"][0] == pytest.approx(first.score, rel=1e-3)


def test_images_and_scores_can_be_in_a_bucket(trained: str, s3: str, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 5)
    for number in range(5):
        name = f"{'a' if number % 2 else 'b'}/{number}.jpg"
        storage.write_bytes(f"{s3}/images/{name}", (images / name).read_bytes())
    assert predict(trained, f"{s3}/images", f"{s3}/out") == (5, 0, 0)
    assert predict(trained, images, tmp_path / "out") == (5, 3, 0)
    assert rows_of(f"{s3}/out") == rows_of(tmp_path / "out")


class InterruptedTasks(LocalTaskRunner):
    """Is interrupted after a number of parts."""

    def __init__(self, after: int) -> None:
        super().__init__(1, retries=0)
        self.after = after

    def run(self, work, job, tasks, done):
        super().run(work, job, tasks[: self.after], done)
        raise KeyboardInterrupt


def test_a_stopped_prediction_resumes_and_writes_no_part_twice(trained: str, prepared: Path, tmp_path: Path) -> None:
    source, out = prepared / "shards" / "train", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        predict(trained, source, out, tasks=InterruptedTasks(2))
    first = {path.name: path.stat().st_mtime_ns for path in (out / "scores").iterdir()}
    assert len(first) == 2
    cut = sorted((out / "scores").iterdir())[1]
    cut.write_bytes(cut.read_bytes()[:-20])  # truncated
    lines: list[str] = []
    result = predict(trained, source, out, log=lines.append)
    assert result.images == COUNTS["train"]
    assert result.resumed_parts == 1
    assert "1 of 5 parts" in lines[0]
    untouched = next(name for name in sorted(first) if name != cut.name)
    assert (out / "scores" / untouched).stat().st_mtime_ns == first[untouched]
    predict(trained, source, tmp_path / "uninterrupted")
    assert rows_of(out) == rows_of(tmp_path / "uninterrupted")
    assert predict(trained, source, out).resumed_parts == 5


def test_a_folder_with_another_prediction_is_refused(trained: str, prepared: Path, tmp_path: Path) -> None:
    source = prepared / "shards" / "test"
    predict(trained, source, tmp_path)
    with pytest.raises(SettingsError, match="top is 2, stored None"):
        predict(trained, source, tmp_path, BulkSettings(top=2, value="logit"))
    with pytest.raises(SettingsError, match="model_digest"):
        predict(f"{trained}:alpha=1", source, tmp_path)
    images = write_images(tmp_path / "images", 4)
    predict(trained, images, tmp_path / "out")
    (images / "new.jpg").write_bytes(jpeg_image("test", 1))
    with pytest.raises(SettingsError, match="parts of other images"):
        predict(trained, images, tmp_path / "out")


def test_a_failed_part_is_named_and_writes_no_file(trained: str, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "shards" / "test", tmp_path / "shards")
    (deleted,) = [path for path in (tmp_path / "shards").glob("*.tar") if "000001" in path.name]
    deleted.unlink()
    with pytest.raises(PartsFailed, match=r"1 of 2 parts failed[^\0]*000001") as failure:
        predict(trained, tmp_path / "shards", tmp_path / "out", tasks=LocalTaskRunner(1, retries=0))
    assert len(failure.value.failures) == 1
    assert len(list((tmp_path / "out" / "scores").iterdir())) == 1


def test_a_corrupt_image_of_a_shard_is_rejected(trained: str, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "shards" / "test", tmp_path / "shards")
    from paml.shards.manifest import Manifest

    manifest = Manifest.open(tmp_path / "shards")
    with Path(manifest.shard_path(0)).open("r+b") as file:
        file.seek(int(manifest.offset[2]) + 30)
        file.write(b"damage")
    assert predict(trained, tmp_path / "shards", tmp_path / "out") == (COUNTS["test"] - 1, 1, 0)
    (reject,) = read_csv(tmp_path / "out" / "rejects.csv")
    assert reject["key"] == manifest.key(2)
    assert manifest.key(2) not in rows_of(tmp_path / "out")


def test_at_most_two_batches_are_in_memory(
    trained: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also, fewer rows than _ROWS_PER_WRITE and a batch wait to be written."""
    monkeypatch.setattr(bulk, "_ROWS_PER_WRITE", 8)
    pending, largest = [0], [0]
    decode_batches, forward = bulk._decode_batches, bulk.Predictor.forward

    def counted_decode(*arguments):
        for batch in decode_batches(*arguments):
            pending[0] += len(batch[0])
            largest[0] = max(largest[0], pending[0])
            yield batch

    def counted_forward(self, pixels, *, with_maps=False):
        pending[0] -= len(pixels)
        return forward(self, pixels, with_maps=with_maps)

    monkeypatch.setattr(bulk, "_decode_batches", counted_decode)
    monkeypatch.setattr(bulk.Predictor, "forward", counted_forward)
    source, groups = prepared / "shards" / "train", []
    monkeypatch.setattr(LocalTaskRunner, "concurrency", 1)
    predict(trained, source, tmp_path / "out", BulkSettings(top=2, batch_size=3), tasks=LocalTaskRunner(1))
    for path in (tmp_path / "out" / "scores").iterdir():
        metadata = pq.read_metadata(path)
        groups += [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    assert largest[0] == 6
    assert max(groups) <= 8 + 3


def test_invalid_settings_are_refused(trained: str, prepared: Path, tmp_path: Path) -> None:
    for changes, match in (
        ({"top": 0}, "bulk.top is 0"),
        ({"top": None, "maps": True}, "bulk.maps is true"),
        ({"value": "odds"}, "odds"),
        ({"precision": "int8"}, "int8"),
        ({"keys": "md5"}, "md5"),
    ):
        with pytest.raises(SettingsError, match=match):
            BulkSettings(**changes)
    with pytest.raises(SettingsError, match="has 12 classes"):
        predict(trained, prepared / "shards" / "test", tmp_path, BulkSettings(top=13))
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="images"):
        predict(trained, tmp_path / "images", tmp_path / "out")
    (tmp_path / "images" / "bad.jpg").touch()
    with pytest.raises(DataError, match="none of the 1 images"):
        predict(trained, tmp_path / "images", tmp_path / "out")
