import csv
import tarfile
from pathlib import Path

import pytest
from webdataset.writer import TarWriter

from paml.errors import DataError
from paml.shards import (
    CorruptSampleError,
    Manifest,
    ShardReader,
    ShardSettings,
    index_shards,
    verify_shards,
    write_shards,
)
from tests.shards.images import encoded, flip_byte, gradient, source


def write_tar(path: Path, samples: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def rejected(folder: Path) -> list[tuple[str, str]]:
    with open(folder / "rejects.csv", newline="") as file:
        return [(row["key"], row["reason"]) for row in csv.DictReader(file)]


def test_index_of_our_shards_equals_their_manifest(tmp_path: Path) -> None:
    write_shards(source(40), tmp_path / "shards", ShardSettings(size=32, samples_per_shard=10))
    ours = Manifest.open(tmp_path / "shards")
    index = index_shards(tmp_path / "shards", tmp_path / "index")
    assert index.keys() == ours.keys()
    for name in ("shard", "offset", "size", "crc32", "width", "height"):
        assert (getattr(index, name) == getattr(ours, name)).all()
    assert [(s.count, s.bytes, s.sha256) for s in index.shards] == [(s.count, s.bytes, s.sha256) for s in ours.shards]
    assert index.digest == ours.digest
    assert verify_shards(tmp_path / "index").ok
    assert bytes(ShardReader(index).read(7)) == bytes(ShardReader(ours).read(7))


def test_shards_of_other_writers(tmp_path: Path) -> None:
    images = [encoded(gradient(i, 30 + i, 20), "PNG" if i % 2 else "JPEG") for i in range(8)]
    samples: list[dict[str, object]] = [
        {"__key__": "a/0", "jpg": images[0], "cls": b"3", "json": b"{}"},
        {"__key__": "a/1", "PNG": images[1], "txt": b"words"},
        {"__key__": "no-image", "txt": b"words"},
        {"__key__": "two", "jpeg": images[2], "png": images[3]},
        {"__key__": "broken", "jpg": b"nonsense"},
        {"__key__": "mask", "seg.png": images[5], "jpg": images[4]},
    ]
    first = write_tar(tmp_path / "data" / "first.tar", samples)
    second = write_tar(
        tmp_path / "data" / "second.tar", [{"__key__": "a/0", "jpg": images[6]}, {"__key__": "b", "jpg": images[6]}]
    )
    index = index_shards([first, second], tmp_path / "data")
    assert index.keys().to_pylist() == ["a/0", "a/1", "two", "mask", "b"]
    assert [s.name for s in index.shards] == ["first.tar", "second.tar"]
    reader = ShardReader(index)
    assert [bytes(reader.read(i)) for i in range(5)] == [images[i] for i in (0, 1, 2, 4, 6)]
    assert index.width.tolist() == [30, 31, 32, 34, 36]
    reasons = dict(rejected(tmp_path / "data"))
    assert set(reasons) == {"a/0", "no-image", "two", "broken"}
    assert "duplicate" in reasons["a/0"]
    assert "no image in the sample" in reasons["no-image"]
    assert "second image" in reasons["two"]
    assert "not an image" in reasons["broken"]
    assert index.report == {"written": 5, "rejected": 4, "shards": 2}


def test_damaged_tars_are_indexed_up_to_the_damage(tmp_path: Path) -> None:
    samples: list[dict[str, object]] = [{"__key__": key, "jpg": data} for key, data in source(10)]
    cut = write_tar(tmp_path / "cut.tar", samples[:5])
    with tarfile.open(cut) as tar:
        third = tar.getmembers()[2]
    cut.write_bytes(cut.read_bytes()[: third.offset_data + 10])
    header = write_tar(tmp_path / "header.tar", samples[5:])
    with tarfile.open(header) as tar:
        fourth = tar.getmembers()[3]
    flip_byte(header, fourth.offset)
    index = index_shards(tmp_path, tmp_path / "index")
    assert index.keys().to_pylist() == [f"{i:016x}" for i in (0, 1, 5, 6, 7)]
    reasons = dict(rejected(tmp_path / "index"))
    assert f"'{2:016x}.jpg'" in reasons[str(cut)]
    assert f"byte {fourth.offset}, after '{7:016x}.jpg'" in reasons[str(header)]
    # the manifest describes the damaged files, so a later change is still detected
    assert verify_shards(tmp_path / "index").ok
    flip_byte(cut, int(index.offset[1]))
    with pytest.raises(CorruptSampleError):
        ShardReader(index).read(1)


def test_files_that_cannot_be_indexed_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        index_shards(tmp_path / "nowhere", tmp_path / "index")
    write_tar(tmp_path / "text" / "a.tar", [{"__key__": "a", "txt": b"words"}])
    with pytest.raises(DataError, match=r"no image .*jpg, jpeg, png, webp"):
        index_shards(tmp_path / "text", tmp_path / "index")
    write_tar(tmp_path / "packed" / "a.tar.gz", [{"__key__": "a", "jpg": encoded(gradient(0))}])
    with pytest.raises(DataError, match=r"a\.tar\.gz is compressed"):
        index_shards(tmp_path / "packed", tmp_path / "index")
