"""Scores of many images: the same as one by one, whole or absent, resumed, with the bad ones named."""

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
from paml.predict import bulk
from paml.predict.bulk import BulkSettings, predict_images
from paml.predict.predictor import open_predictor
from paml.shards.tasks import LocalTasks
from paml.shards.write import PartsFailed
from tests.helpers.prepared import CLASSES, COUNTS, key_of, picture

ALL = BulkSettings(top=None, value="logit", batch_size=4)


def rows_of(out: Path | str) -> dict[str, dict]:
    """All rows by key."""
    found: dict[str, dict] = {}
    for name in storage.list_files(storage.join(str(out), "scores")):
        data = storage.read_bytes(storage.join(str(out), "scores", name))
        for row in pq.read_table(pa.BufferReader(data)).to_pylist():
            assert row["key"] not in found
            found[row["key"]] = row
    return found


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def predict(model: str, source: Path | str, out: Path | str, settings: BulkSettings = ALL, **more):
    return predict_images(model, str(source), str(out), settings, **{"say": lambda line: None} | more)


def write_photos(folder: Path, count: int = 11) -> Path:
    """Photos in two folders, three of them bad in their own ways."""
    for number in range(count):
        path = folder / ("a" if number % 2 else "b") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture("test", number, 40 + number))
    (folder / "a" / "empty.jpg").touch()
    (folder / "a" / "text.png").write_text("no picture")
    (folder / "a" / "nowhere.jpg").symlink_to(folder / "gone.jpg")
    return folder


def test_shards_give_what_the_predictor_gives_and_top_classes_are_the_best_of_all(
    trained: str, prepared: Path, tmp_path: Path
) -> None:
    source = prepared / "shards" / "test"
    done = predict(trained, source, tmp_path / "all")
    assert done == (COUNTS["test"], 0, 0)
    rows = rows_of(tmp_path / "all")
    assert set(rows) == {key_of("test", number) for number in range(COUNTS["test"])}
    predictor = open_predictor(trained)
    for number in range(COUNTS["test"]):
        expected = predictor.predict(predictor.decode(picture("test", number))[None]).logits_BK[0]
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
        found = predictor.predict(predictor.decode(reader.read(index))[None], maps=True)
        row = rows_of(tmp_path / "top")[reader.manifest.key(index)] if index < 3 else None
        own = rows[reader.manifest.key(index)]["scores"]
        np.testing.assert_allclose(own, found.logits_BK[0].astype(np.float16), rtol=2e-3, atol=1e-5)
        if row is not None:
            best = np.argsort(-found.scores_BK[0], kind="stable")[:3]
            assert row["mids"] == [CLASSES[cls] for cls in best]
            np.testing.assert_allclose(row["scores"], found.scores_BK[0][best], rtol=1e-3)
            assert found.maps_BKHW is not None
            maps = np.array(row["maps"]).reshape(3, *size)
            np.testing.assert_allclose(maps, found.maps_BKHW[0][best], rtol=2e-3, atol=1e-4)


def test_a_folder_of_photos_with_bad_ones(trained: str, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    said: list[str] = []
    done = predict(trained, photos, tmp_path / "out", BulkSettings(top=2, per_part=4, batch_size=3), say=said.append)
    assert done == (11, 3, 0)
    rejects = {row["key"]: row["reason"] for row in read_csv(tmp_path / "out" / "rejects.csv")}
    assert set(rejects) == {"a/empty", "a/text", "a/nowhere"}
    assert "empty file" in rejects["a/empty"]
    assert "not in the folder" in rejects["a/nowhere"]
    rows = rows_of(tmp_path / "out")
    assert set(rows) == {f"{'a' if number % 2 else 'b'}/{number}" for number in range(11)}
    predictor = open_predictor(trained)
    for number in (0, 3):
        pixels = predictor.decode(picture("test", number, 40 + number))
        (first, _) = predictor.top(predictor.predict(pixels[None]).scores_BK[0], 2)
        row = rows[f"{'a' if number % 2 else 'b'}/{number}"]
        assert row["mids"][0] == first.mid
        assert row["scores"][0] == pytest.approx(first.score, rel=1e-3)


def test_a_bucket_in_and_a_bucket_out(trained: str, s3: str, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 5)
    for number in range(5):
        name = f"{'a' if number % 2 else 'b'}/{number}.jpg"
        storage.write_bytes(f"{s3}/photos/{name}", (photos / name).read_bytes())
    assert predict(trained, f"{s3}/photos", f"{s3}/out") == (5, 0, 0)
    assert predict(trained, photos, tmp_path / "out") == (5, 3, 0)
    assert rows_of(f"{s3}/out") == rows_of(tmp_path / "out")


class Breaks(LocalTasks):
    """Fails, as a killed job does, after so many parts."""

    def __init__(self, after: int) -> None:
        super().__init__(1, retries=0)
        self.after = after

    def run(self, work, job, tasks, done):
        super().run(work, job, tasks[: self.after], done)
        raise KeyboardInterrupt


def test_a_stopped_job_goes_on_and_writes_no_part_twice(trained: str, prepared: Path, tmp_path: Path) -> None:
    source, out = prepared / "shards" / "train", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        predict(trained, source, out, tasks=Breaks(2))
    first = {path.name: path.stat().st_mtime_ns for path in (out / "scores").iterdir()}
    assert len(first) == 2
    cut = sorted((out / "scores").iterdir())[1]
    cut.write_bytes(cut.read_bytes()[:-20])  # as a disk that lost its end would leave it
    said: list[str] = []
    done = predict(trained, source, out, say=said.append)
    assert done.images == COUNTS["train"]
    assert done.found == 1
    assert "1 of 5 parts are done" in said[0]
    untouched = next(name for name in sorted(first) if name != cut.name)
    assert (out / "scores" / untouched).stat().st_mtime_ns == first[untouched]
    predict(trained, source, tmp_path / "unbroken")
    assert rows_of(out) == rows_of(tmp_path / "unbroken")
    assert predict(trained, source, out).found == 5


def test_another_prediction_in_the_same_place_is_refused(trained: str, prepared: Path, tmp_path: Path) -> None:
    source = prepared / "shards" / "test"
    predict(trained, source, tmp_path)
    with pytest.raises(SettingsError, match="top: None there, 2 now"):
        predict(trained, source, tmp_path, BulkSettings(top=2, value="logit"))
    with pytest.raises(SettingsError, match="model_digest"):
        predict(f"{trained}:alpha=1", source, tmp_path)
    photos = write_photos(tmp_path / "photos", 4)
    predict(trained, photos, tmp_path / "out")
    (photos / "new.jpg").write_bytes(picture("test", 1))
    with pytest.raises(SettingsError, match="images were added or changed"):
        predict(trained, photos, tmp_path / "out")


def test_a_part_that_fails_is_named_and_leaves_nothing(trained: str, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "shards" / "test", tmp_path / "shards")
    (gone,) = [path for path in (tmp_path / "shards").glob("*.tar") if "000001" in path.name]
    gone.unlink()
    with pytest.raises(PartsFailed, match=r"1 of 2 parts failed[^\0]*000001") as failure:
        predict(trained, tmp_path / "shards", tmp_path / "out", tasks=LocalTasks(1, retries=0))
    assert len(failure.value.failures) == 1
    assert len(list((tmp_path / "out" / "scores").iterdir())) == 1


def test_a_damaged_image_of_a_shard_is_a_reject(trained: str, prepared: Path, tmp_path: Path) -> None:
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


def test_memory_holds_a_few_batches_whatever_the_part(
    trained: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures decoded and not yet scored: at most two batches; rows not yet written: fewer than _ROWS and a batch."""
    monkeypatch.setattr(bulk, "_ROWS", 8)
    ahead, most = [0], [0]
    submit, predict_batch = bulk._submit, bulk.Predictor.predict

    def counted_submit(batch, predictor, context):
        ahead[0] += len(batch)
        most[0] = max(most[0], ahead[0])
        return submit(batch, predictor, context)

    def counted_predict(self, pixels, *, maps=False):
        ahead[0] -= len(pixels)
        return predict_batch(self, pixels, maps=maps)

    monkeypatch.setattr(bulk, "_submit", counted_submit)
    monkeypatch.setattr(bulk.Predictor, "predict", counted_predict)
    source, groups = prepared / "shards" / "train", []
    monkeypatch.setattr(LocalTasks, "lanes", 1)
    predict(trained, source, tmp_path / "out", BulkSettings(top=2, batch_size=3), tasks=LocalTasks(1))
    for path in (tmp_path / "out" / "scores").iterdir():
        metadata = pq.read_metadata(path)
        groups += [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    assert most[0] == 6
    assert max(groups) <= 8 + 3


def test_settings_that_cannot_be_are_refused(trained: str, prepared: Path, tmp_path: Path) -> None:
    for changes, match in (
        ({"top": 0}, "bulk.top is 0"),
        ({"top": None, "maps": True}, "bulk.maps is true and bulk.top null"),
        ({"value": "odds"}, "allowed are probability, logit"),
        ({"precision": "int8"}, "allowed are auto"),
        ({"keys": "md5"}, "allowed are path, name"),
    ):
        with pytest.raises(SettingsError, match=match):
            BulkSettings(**changes)
    with pytest.raises(SettingsError, match="the model has 12 classes"):
        predict(trained, prepared / "shards" / "test", tmp_path, BulkSettings(top=13))
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        predict(trained, tmp_path / "photos", tmp_path / "out")
    (tmp_path / "photos" / "bad.jpg").touch()
    with pytest.raises(DataError, match="none of the 1 images"):
        predict(trained, tmp_path / "photos", tmp_path / "out")
