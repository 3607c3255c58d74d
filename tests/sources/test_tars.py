import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.errors import DataError
from paml.shards import ShardSettings, write_shards
from paml.sources.parts import read_parts
from paml.sources.tars import TarDamage, list_tars, tar_keys, tar_parts
from tests.shards.images import source

MEMBERS = [(f"train_0/{i:04d}.jpg", bytes([i]) * (300 + 400 * i)) for i in range(6)]


def make_tar(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        folder = tarfile.TarInfo("train_0")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tars")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_plain_and_compressed_tars(tmp_path: Path, mode: str) -> None:
    path = tmp_path / f"a.tar{mode[1:].replace(':', '.')}"
    path.write_bytes(make_tar([*MEMBERS, ("notes.txt", b"words")], mode))
    assert list(read_parts(tar_parts(path))) == [(name[8:12], data) for name, data in MEMBERS]
    assert len(tar_keys(tmp_path)) == 6
    assert list_tars([tmp_path, path]) == [str(path), str(path)]


@settings(max_examples=80, deadline=None)
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_truncated_tar_yields_images_before_the_cut(folder: Path, fraction: float) -> None:
    whole = make_tar(MEMBERS)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    size = int(fraction * end)
    path = folder / "cut.tar"
    path.write_bytes(whole[:size])
    *images, (name, damage) = list(read_parts(tar_parts(path)))
    assert name == str(path)
    assert isinstance(damage, TarDamage)
    assert str(path) in str(damage)
    assert images == [(name[8:12], data) for name, data in MEMBERS][: len(images)]
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        complete = [m for m in tar if m.isreg() and m.offset_data + m.size <= size]
    assert len(images) == len(complete)


@settings(max_examples=60, deadline=None)
@given(member=st.integers(0, 6), byte=st.integers(0, 511), zeroed=st.booleans())
def test_damaged_header_is_reported_with_its_position(folder: Path, member: int, byte: int, zeroed: bool) -> None:
    data = bytearray(make_tar(MEMBERS))
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        at = tar.getmembers()[member].offset
    if zeroed:
        data[at : at + 512] = bytes(512)
    else:
        data[at + byte] ^= 0x11
    path = folder / "header.tar"
    path.write_bytes(data)
    *images, (name, damage) = list(read_parts(tar_parts(path)))
    assert (name, type(damage)) == (str(path), TarDamage)
    assert len(images) == max(0, member - 1)
    if member:
        assert f"damaged header at byte {at}" in str(damage)


def test_writer_rejects_a_truncated_tar_and_keeps_the_rest(tmp_path: Path) -> None:
    images = source(12)
    for number in range(3):
        members = [(f"{key}.jpg", data) for key, data in images[4 * number : 4 * number + 4]]
        data = make_tar(members)
        (tmp_path / f"{number}.tar").write_bytes(data if number != 1 else data[: len(data) // 2])
    report = write_shards(read_parts(tar_parts(tmp_path)), tmp_path / "out", ShardSettings(size=32), expected_count=12)
    assert 8 <= report.written < 12
    assert report.rejected == 1
    rejects = (tmp_path / "out" / "rejects.csv").read_text()
    assert f"{tmp_path / '1.tar'} is truncated" in rejects


def test_not_a_tar_file(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"words" * 500)
    ((name, damage),) = list(read_parts(tar_parts(tmp_path)))
    assert name == str(tmp_path / "a.tar")
    assert "is not a tar file" in str(damage)
    with pytest.raises(DataError, match="nowhere is not a tar file"):
        list(read_parts(tar_parts(tmp_path / "nowhere")))
