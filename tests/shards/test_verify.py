from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.errors import DataError
from paml.shards import Manifest, ShardSettings, verify_shards, write_shards
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
