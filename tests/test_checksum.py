"""The checksum of an Arrow file detects any changed bit."""

import random
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paml import checksum
from paml.checksum import CHECKSUM_PLACEHOLDER, ChecksumError, crc32_of, file_signature, verify_checksum, write_checksum


def write(path: Path, rows: int, metadata: dict[bytes, bytes] | None = None) -> bytes:
    column = pa.array(np.random.default_rng(rows).integers(0, 2**60, rows))
    batch = pa.RecordBatch.from_arrays([column], ["n"]).replace_schema_metadata(
        {**CHECKSUM_PLACEHOLDER, **(metadata or {})}
    )
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    write_checksum(str(path))
    return path.read_bytes()


@pytest.mark.parametrize("block", [64, 100, 4096, 1 << 20])
def test_every_byte_is_covered_for_all_block_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(checksum, "_BLOCK", block)
    data = write(tmp_path / "f", 300)
    assert verify_checksum(memoryview(data)) == data[data.index(b"paml-seal-") :][: len(b"paml-seal-") + 64]
    rng = random.Random(block)
    end = len(data) - 10  # Arrow itself checks the last ten bytes, which locate the footer
    for offset in {*range(40), *range(end - 30, end), *rng.sample(range(end), 300)}:
        changed = bytearray(data)
        changed[offset] ^= 1 << rng.randrange(8)
        try:
            assert (
                verify_checksum(memoryview(changed)) is None
            )  # the checksum field itself is damaged, which the reader refuses
            assert b"paml-seal-" not in changed[data.rindex(b"paml-seal-") :]
        except ChecksumError:
            continue


def test_file_of_several_blocks(tmp_path: Path) -> None:
    data = write(tmp_path / "large", 3_000_000, {b"about": b"x" * 100_000})
    assert len(data) > 5 * checksum._BLOCK
    assert verify_checksum(memoryview(data)) is not None
    for offset in (checksum._BLOCK - 1, checksum._BLOCK, len(data) // 2, len(data) - 200_000):
        changed = bytearray(data)
        changed[offset] ^= 1
        with pytest.raises(ChecksumError):
            verify_checksum(memoryview(changed))
    for end in (len(data) - 1, len(data) // 2, 20, 3, 0):
        assert verify_checksum(memoryview(data)[:end]) is None


def test_other_readers_see_one_more_field_and_bytes_are_deterministic(tmp_path: Path) -> None:
    data = write(tmp_path / "f", 100, {b"kind": b"test"})
    with pa.ipc.open_file(tmp_path / "f") as file:
        assert file.get_batch(0).num_rows == 100
        metadata = dict(file.schema.metadata or {})
    assert set(metadata) == {b"seal", b"kind"}
    with pa.OSFile(str(tmp_path / "f"), "rb") as file:
        file.seek(8)
        assert dict(pa.ipc.read_schema(file).metadata or {}) == metadata
    assert write(tmp_path / "again", 100, {b"kind": b"test"}) == data


def test_file_without_a_placeholder_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "plain"
    batch = pa.RecordBatch.from_pydict({"n": [1]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    assert verify_checksum(memoryview(path.read_bytes())) is None
    with pytest.raises(ValueError, match="CHECKSUM_PLACEHOLDER"):
        write_checksum(str(path))


def test_signature_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"one")
    signature = file_signature(str(path))
    assert file_signature(str(path)) == signature
    path.unlink()
    path.write_bytes(b"two")
    assert file_signature(str(path)) != signature


@given(st.binary(max_size=5000), st.sampled_from([bytes, bytearray, memoryview]))
def test_crc32_equals_zlib(data: bytes, kind: type) -> None:
    assert crc32_of(kind(data)) == zlib.crc32(data)
