import os
import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paml.shards import CorruptSampleError, Manifest, ShardReader, ShardSettings, verify_shards, write_shards
from paml.storage import StorageError, read_bytes, write_bytes
from tests.shards.images import flip_byte, source

SMALL = ShardSettings(resize="original", samples_per_shard=10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(source(60), tmp_path / "shards", SMALL)
    return tmp_path / "shards"


def test_reads_the_written_bytes(folder: Path) -> None:
    manifest, images = Manifest.open(folder), dict(source(60))
    reader = pickle.loads(pickle.dumps(ShardReader(manifest, max_open=2)))
    with ThreadPoolExecutor(8) as pool:
        indices = [i * 7 % 60 for i in range(300)]
        for index, data in zip(indices, pool.map(reader.read, indices), strict=True):
            assert bytes(data) == images[manifest.key(index)]


def test_pickles_after_use(folder: Path) -> None:
    reader = ShardReader(Manifest.open(folder))
    reader.read(0)
    assert pickle.loads(pickle.dumps(reader)).read(3) == reader.read(3)


def test_flipped_bit_and_truncation_raise_corrupt_sample_error(folder: Path) -> None:
    manifest = Manifest.open(folder)
    index = 5
    end = int(manifest.offset[index] + manifest.size[index])
    path = manifest.shard_path(int(manifest.shard[index]))
    flip_byte(path, end - 1, 1)
    reader = ShardReader(manifest)
    with pytest.raises(CorruptSampleError, match=r"image '0.*shard-000000.tar: CRC-32 mismatch") as error:
        reader.read(index)
    assert (error.value.key, error.value.shard) == (manifest.key(index), path)
    assert pickle.loads(pickle.dumps(error.value)).key == error.value.key
    assert zlib.crc32(reader.read(index - 1)) == manifest.crc32[index - 1]
    Path(path).write_bytes(Path(path).read_bytes()[: end - 1])
    reader = ShardReader(manifest)
    with pytest.raises(CorruptSampleError, match="truncated: it ends at byte"):
        reader.read(index)
    Path(path).write_bytes(b"")
    with pytest.raises(CorruptSampleError, match="it ends at byte 0"):
        ShardReader(manifest).read(index)
    Path(path).unlink()
    with pytest.raises(StorageError, match="does not exist"):
        ShardReader(manifest).read(index)


def test_truncation_of_an_open_shard_raises_corrupt_sample_error(folder: Path) -> None:
    """A memory map would end the process here."""
    manifest = Manifest.open(folder)
    reader, rows = ShardReader(manifest), manifest.rows_of_shard(0)
    reader.read(rows.start)
    size = int(manifest.offset[rows.stop - 1])
    os.truncate(manifest.shard_path(0), size)
    with pytest.raises(CorruptSampleError, match=f"it ends at byte {size},"):
        reader.read(rows.stop - 1)
    assert zlib.crc32(reader.read(rows.start)) == manifest.crc32[rows.start]


def test_number_of_open_files_is_limited(folder: Path) -> None:
    def opened() -> int:
        return sum(os.path.samefile(path, f"/proc/self/fd/{name}") for name in handles() for path in tars)

    def handles() -> list[str]:
        return [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]

    tars = list(folder.glob("*.tar"))
    manifest = Manifest.open(folder)
    reader = ShardReader(manifest, max_open=2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(reader.read, range(60)))
    assert opened() == 2
    reader.release(range(len(manifest.shards)))
    assert opened() == 0
    reader.read(0)
    assert opened() == 1
    del reader
    assert opened() == 0


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("PAML_CACHE", str(tmp_path / "cache"))
    return s3


def test_shards_in_a_bucket_equal_local_ones_and_are_verified(bucket: str, tmp_path: Path) -> None:
    out = f"{bucket}/shards"
    remote = write_shards(source(40), out, SMALL)
    assert remote.digest == write_shards(source(40), tmp_path / "local", SMALL).digest
    assert verify_shards(out).ok
    manifest, images = Manifest.open(out), dict(source(40))
    damaged = manifest.shard_path(0)
    data = bytearray(read_bytes(damaged))
    data[int(manifest.offset[2]) + 9] ^= 1
    write_bytes(damaged, bytes(data))
    reader, lost = ShardReader(manifest, str(tmp_path / "cache")), []
    for index in range(40):
        try:
            assert bytes(reader.read(index)) == images[manifest.key(index)]
        except CorruptSampleError as error:
            lost.append(error.key)
    assert lost == [manifest.key(2)]
    assert verify_shards(out).lost == (manifest.key(2),)
