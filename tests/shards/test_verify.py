import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.errors import DataError
from paml.shards import Manifest, ShardSettings, index_shards, verify_shards, write_shards
from paml.shards.manifest import make_batch, write_manifest
from tests.shards.images import flip_byte, source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify")
    write_shards(source(40), path, ShardSettings(size=32, samples_per_shard=20))
    return path


def test_whole_shards(folder: Path) -> None:
    report = verify_shards(folder)
    assert report.ok
    assert str(report) == f"{folder}: 40 images in 2 shards, checked by SHA-256: all whole"
    with pytest.raises(DataError, match="holds no manifest"):
        verify_shards(folder / "nowhere")


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_any_flipped_byte_is_found_and_only_its_image_is_lost(folder: Path, share: float, mask: int) -> None:
    manifest = Manifest.open(folder)
    path = Path(manifest.shard_path(0))
    at = int(share * path.stat().st_size)
    rows = range(*manifest.rows_of_shard(0).indices(40))
    hit = [manifest.key(i) for i in rows if manifest.offset[i] <= at < manifest.offset[i] + manifest.size[i]]
    flip_byte(path, at, mask)
    try:
        report = verify_shards(folder)
    finally:
        flip_byte(path, at, mask)
    assert [fault.path for fault in report.faults] == [str(path)]
    assert list(report.lost) == hit
    assert "SHA-256 differs" in str(report)


def test_messages_name_what_is_lost(folder: Path) -> None:
    manifest = Manifest.open(folder)
    path = Path(manifest.shard_path(1))
    rows = manifest.rows_of_shard(1)
    first, last = rows.start, rows.stop - 1
    whole = path.read_bytes()
    try:
        flip_byte(path, int(manifest.offset[first]) - 500)
        (fault,) = verify_shards(folder).faults
        assert not fault.lost
        assert f"the tar header of {manifest.key(first)!r} at byte 0 is damaged" in str(fault)
        path.write_bytes(whole)
        flip_byte(path, int(manifest.offset[first]) + 7)
        (fault,) = verify_shards(folder).faults
        start = int(manifest.offset[first])
        assert str(fault) == (
            f"{path}: SHA-256 differs: image {manifest.key(first)!r} (bytes {start} to "
            f"{start + int(manifest.size[first])}) fails its CRC-32; "
            f"lost 1 of {rows.stop - rows.start} images: {manifest.key(first)}"
        )
        assert verify_shards(folder, deep=False).ok
        cut = int(manifest.offset[last])
        path.write_bytes(whole[:cut])
        for deep in (True, False):
            (fault,) = verify_shards(folder, deep=deep).faults
            assert fault.lost == (manifest.key(last),)
            assert f"cut: {cut:,} of {len(whole):,} bytes are there; lost 1 of" in str(fault)
        path.write_bytes(whole + b"more")
        assert "bytes where" in str(verify_shards(folder))
        path.unlink()
        (fault,) = verify_shards(folder).faults
        assert fault.problem == "the file is gone"
        assert len(fault.lost) == rows.stop - rows.start
        assert f"and {len(fault.lost) - 10} more" in str(fault)
    finally:
        path.write_bytes(whole)
    assert verify_shards(folder).ok


def test_exchanged_doubled_and_strange_shards_are_named(folder: Path) -> None:
    manifest = Manifest.open(folder)
    first, second = (Path(manifest.shard_path(shard)) for shard in range(2))
    contents = first.read_bytes(), second.read_bytes()
    try:
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])
        report = verify_shards(folder)
        assert [fault.path for fault in report.faults] == [str(first), str(second)]
        assert "it holds what belongs into shard-000001.tar" in str(report.faults[0])
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
        assert str(fault) == f"{folder}/shard-000002.tar: not in manifest.arrow: move it away"
    finally:
        (folder / "shard-000002.tar").unlink()
    assert verify_shards(folder).ok


def test_keys_that_stand_twice_are_named(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.open(folder)
    for info in manifest.shards:
        (tmp_path / info.name).symlink_to(folder / info.name)
    keys = manifest.keys().to_pylist()
    columns = {name: getattr(manifest, name) for name in ("shard", "offset", "size", "crc32", "width", "height")}
    batch = make_batch(keys=[keys[1], *keys[1:]], **columns)
    write_manifest(str(tmp_path), batch, manifest.shards, settings=manifest.settings, report={})
    twice, misnamed = verify_shards(tmp_path).faults
    assert str(twice) == f"{tmp_path}/manifest.arrow: 1 keys stand twice: {keys[1]}: write the shards again"
    assert f"1 keys are not those of shard-000000.tar: {keys[1]} is {keys[0]}.jpg" in str(misnamed)


def test_keys_that_are_not_the_names_in_the_tar_are_named(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.open(folder)
    for info in manifest.shards:
        (tmp_path / info.name).symlink_to(folder / info.name)
    keys = manifest.keys().to_pylist()
    columns = {name: getattr(manifest, name) for name in ("shard", "offset", "size", "crc32", "width", "height")}
    batch = make_batch(keys=[keys[1], keys[0], *keys[2:]], **columns)
    write_manifest(str(tmp_path), batch, manifest.shards, settings=manifest.settings, report={})
    (fault,) = verify_shards(tmp_path).faults
    assert str(fault) == (
        f"{tmp_path}/manifest.arrow: 2 keys are not those of shard-000000.tar: {keys[1]} is {keys[0]}.jpg; "
        f"{keys[0]} is {keys[1]}.jpg: write the shards again"
    )


def test_keys_of_all_kinds_are_those_of_the_tar(tmp_path: Path) -> None:
    images = [data for _, data in source(6)]
    keys = ["plain", "a/b.c%d", "Käse", "x" * 95, "y" * 200, "deep/" * 30 + "z"]
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
