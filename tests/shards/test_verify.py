import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.errors import DataError
from paml.shards import Manifest, ShardSettings, index_shards, verify_shards, write_shards
from paml.shards.manifest import SCHEMA, write_manifest
from tests.shards.images import flip_byte, source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify")
    write_shards(source(40), path, ShardSettings(size=32, samples_per_shard=20))
    return path


def test_intact_shards(folder: Path) -> None:
    report = verify_shards(folder)
    assert report.ok
    assert str(report) == f"{folder}: 40 images in 2 shards, verified by SHA-256: all intact"
    with pytest.raises(DataError, match=r"no manifest\.arrow"):
        verify_shards(folder / "nowhere")


@settings(max_examples=60, deadline=None)
@given(fraction=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_any_flipped_byte_is_detected_and_only_its_image_is_lost(folder: Path, fraction: float, mask: int) -> None:
    manifest = Manifest.open(folder)
    path = Path(manifest.shard_path(0))
    offset = int(fraction * path.stat().st_size)
    rows = range(*manifest.rows_of_shard(0).indices(40))
    hit = [manifest.key(i) for i in rows if manifest.offset[i] <= offset < manifest.offset[i] + manifest.size[i]]
    flip_byte(path, offset, mask)
    try:
        report = verify_shards(folder)
    finally:
        flip_byte(path, offset, mask)
    assert [fault.path for fault in report.faults] == [str(path)]
    assert list(report.lost) == hit
    assert "SHA-256 differs" in str(report)


def test_report_lists_lost_images(folder: Path) -> None:
    manifest = Manifest.open(folder)
    path = Path(manifest.shard_path(1))
    rows = manifest.rows_of_shard(1)
    first, last = rows.start, rows.stop - 1
    whole = path.read_bytes()
    try:
        flip_byte(path, int(manifest.offset[first]) - 500)
        (fault,) = verify_shards(folder).faults
        assert not fault.lost
        assert f"damaged tar header of {manifest.key(first)!r} at byte 0" in str(fault)
        path.write_bytes(whole)
        flip_byte(path, int(manifest.offset[first]) + 7)
        (fault,) = verify_shards(folder).faults
        start = int(manifest.offset[first])
        assert str(fault) == (
            f"{path}: SHA-256 differs: CRC-32 mismatch in the image {manifest.key(first)!r} (bytes {start} to "
            f"{start + int(manifest.size[first])}); "
            f"lost 1 of {rows.stop - rows.start} images: {manifest.key(first)}"
        )
        assert verify_shards(folder, deep=False).ok
        cut = int(manifest.offset[last])
        path.write_bytes(whole[:cut])
        for deep in (True, False):
            (fault,) = verify_shards(folder, deep=deep).faults
            assert fault.lost == (manifest.key(last),)
            assert f"truncated: {cut:,} of {len(whole):,} bytes; lost 1 of" in str(fault)
        path.write_bytes(whole + b"more")
        assert "bytes instead of" in str(verify_shards(folder))
        path.unlink()
        (fault,) = verify_shards(folder).faults
        assert fault.problem == "the file is missing"
        assert len(fault.lost) == rows.stop - rows.start
        assert f", {len(fault.lost) - 10} more" in str(fault)
    finally:
        path.write_bytes(whole)
    assert verify_shards(folder).ok


def test_swapped_duplicated_and_unlisted_shards_are_reported(folder: Path) -> None:
    manifest = Manifest.open(folder)
    first, second = (Path(manifest.shard_path(shard)) for shard in range(2))
    contents = first.read_bytes(), second.read_bytes()
    try:
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])
        report = verify_shards(folder)
        assert [fault.path for fault in report.faults] == [str(first), str(second)]
        assert "it has the content of shard-000001.tar" in str(report.faults[0])
        assert set(report.lost) == set(manifest.keys().to_pylist())
        second.write_bytes(contents[1])
        (fault,) = verify_shards(folder).faults
        assert set(fault.lost) == set(manifest.keys()[manifest.rows_of_shard(0)].to_pylist())
    finally:
        first.write_bytes(contents[0])
        second.write_bytes(contents[1])
    (folder / "shard-000002.tar").write_bytes(contents[0])
    try:
        (fault,) = verify_shards(folder).faults
        assert str(fault).startswith(f"{folder}/shard-000002.tar: not in manifest.arrow")
    finally:
        (folder / "shard-000002.tar").unlink()
    assert verify_shards(folder).ok


def test_duplicate_keys_are_reported(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.open(folder)
    for info in manifest.shards:
        (tmp_path / info.name).symlink_to(folder / info.name)
    keys = manifest.keys().to_pylist()
    columns = {name: getattr(manifest, name) for name in ("shard", "offset", "size", "crc32", "width", "height")}
    batch = pa.RecordBatch.from_pydict({"key": [keys[1], *keys[1:]], **columns}, schema=SCHEMA)
    write_manifest(str(tmp_path), batch, manifest.shards, settings=manifest.settings, report={})
    duplicate, wrong = verify_shards(tmp_path).faults
    assert f"1 duplicate keys: {keys[1]}" in str(duplicate)
    assert f"1 keys differ from those of shard-000000.tar: {keys[1]} is {keys[0]}.jpg" in str(wrong)


def test_keys_that_differ_from_the_tar_are_reported(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.open(folder)
    for info in manifest.shards:
        (tmp_path / info.name).symlink_to(folder / info.name)
    keys = manifest.keys().to_pylist()
    columns = {name: getattr(manifest, name) for name in ("shard", "offset", "size", "crc32", "width", "height")}
    batch = pa.RecordBatch.from_pydict({"key": [keys[1], keys[0], *keys[2:]], **columns}, schema=SCHEMA)
    write_manifest(str(tmp_path), batch, manifest.shards, settings=manifest.settings, report={})
    (fault,) = verify_shards(tmp_path).faults
    assert fault.path == f"{tmp_path}/manifest.arrow"
    assert f"2 keys differ from those of shard-000000.tar: {keys[1]} is {keys[0]}.jpg; {keys[0]} is" in str(fault)


def test_keys_with_special_characters_match_the_tar(tmp_path: Path) -> None:
    images = [data for _, data in source(7)]
    keys = ["plain", "BZhang_001", "a/b.c%d", "Käse", "x" * 95, "y" * 200, "deep/" * 30 + "z"]
    write_shards(list(zip(keys, images, strict=True)), tmp_path / "shards", ShardSettings(size=32))
    assert sorted(Manifest.open(tmp_path / "shards").keys().to_pylist()) == sorted(keys)
    assert verify_shards(tmp_path / "shards").ok
    with tarfile.open(tmp_path / "others.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("a/0.jpg", "deep/" * 30 + "1.jpg", "mask.seg.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(images[0])
            tar.addfile(info, io.BytesIO(images[0]))
    index_shards(tmp_path / "others.tar", tmp_path / "index")
    assert verify_shards(tmp_path / "index").ok
