"""The seal of an Arrow file: any changed bit breaks it, wherever the file's blocks end."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from paml import seal
from paml.seal import UNSEALED, BrokenSeal, check_seal, file_mark, seal_file


def write(path: Path, rows: int, metadata: dict[bytes, bytes] | None = None) -> bytes:
    column = pa.array(np.random.default_rng(rows).integers(0, 2**60, rows))
    batch = pa.RecordBatch.from_arrays([column], ["n"]).replace_schema_metadata({**UNSEALED, **(metadata or {})})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    seal_file(str(path))
    return path.read_bytes()


@pytest.mark.parametrize("block", [64, 100, 4096, 1 << 20])
def test_each_byte_is_sealed_however_the_file_is_cut_into_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(seal, "_BLOCK", block)
    data = write(tmp_path / "f", 300)
    assert check_seal(memoryview(data)) == data[data.index(b"paml-seal-") :][: len(b"paml-seal-") + 64]
    draw = random.Random(block)
    end = len(data) - 10  # what follows says where the footer begins, and Arrow itself checks it
    for place in {*range(40), *range(end - 30, end), *draw.sample(range(end), 300)}:
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8)
        try:
            assert check_seal(memoryview(changed)) is None  # its seal is no longer seen, which its reader refuses
            assert b"paml-seal-" not in changed[data.rindex(b"paml-seal-") :]
        except BrokenSeal:
            continue


def test_a_file_in_several_blocks_taken_by_threads(tmp_path: Path) -> None:
    data = write(tmp_path / "large", 3_000_000, {b"about": b"x" * 100_000})
    assert len(data) > 5 * seal._BLOCK
    assert check_seal(memoryview(data)) is not None
    for place in (seal._BLOCK - 1, seal._BLOCK, len(data) // 2, len(data) - 200_000):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(BrokenSeal, match="its bytes are not those that were written"):
            check_seal(memoryview(changed))
    for end in (len(data) - 1, len(data) // 2, 20, 3, 0):
        assert check_seal(memoryview(data)[:end]) is None


def test_other_readers_see_one_more_field_and_the_bytes_are_the_same_each_time(tmp_path: Path) -> None:
    data = write(tmp_path / "f", 100, {b"kind": b"test"})
    with pa.ipc.open_file(tmp_path / "f") as file:
        assert file.get_batch(0).num_rows == 100
        metadata = dict(file.schema.metadata or {})
    assert set(metadata) == {b"seal", b"kind"}
    with pa.OSFile(str(tmp_path / "f"), "rb") as file:
        file.seek(8)
        assert dict(pa.ipc.read_schema(file).metadata or {}) == metadata
    assert write(tmp_path / "again", 100, {b"kind": b"test"}) == data


def test_a_file_without_a_place_for_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain"
    batch = pa.RecordBatch.from_pydict({"n": [1]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    assert check_seal(memoryview(path.read_bytes())) is None
    with pytest.raises(ValueError, match="has no place for a seal"):
        seal_file(str(path))


def test_a_mark_tells_a_file_from_the_one_that_it_was(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"one")
    mark = file_mark(str(path))
    assert file_mark(str(path)) == mark
    path.unlink()
    path.write_bytes(b"two")
    assert file_mark(str(path)) != mark
