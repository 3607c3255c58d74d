import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from paml.checksum import CHECKSUM_PLACEHOLDER, verify_checksum, write_checksum
from paml.errors import DataError
from paml.shards import Manifest, ShardSettings, write_shards
from paml.shards.manifest import ShardInfo, shards_digest
from tests.shards.images import source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(source(25), tmp_path, ShardSettings(size=32, samples_per_shard=10))
    return tmp_path


def test_columns_are_views_of_one_mapped_batch(folder: Path) -> None:
    manifest = Manifest.open(folder)
    for name, kind in (("shard", "int32"), ("offset", "int64"), ("size", "int32"), ("crc32", "uint32")):
        column = getattr(manifest, name)
        assert (column.dtype, column.shape, column.flags.owndata) == (kind, (25,), False)
    assert set(manifest.width) == set(manifest.height) == {32}
    with pa.ipc.open_file(folder / "manifest.arrow") as file:
        assert file.num_record_batches == 1
    assert sum(shard.count for shard in manifest.shards) == len(manifest) == 25
    assert manifest.settings["size"] == 32
    assert manifest.report["written"] == 25
    assert list(manifest.shard) == sorted(manifest.shard)


def test_pickles_as_its_folder(folder: Path) -> None:
    manifest = Manifest.open(folder)
    data = pickle.dumps(manifest)
    assert len(data) < 300
    again = pickle.loads(data)
    assert (again.digest, again.keys()) == (manifest.digest, manifest.keys())


def rewrite(path: Path, batch: pa.RecordBatch, metadata: dict[bytes, bytes]) -> None:
    """Write wrong content with a valid checksum."""
    changed = batch.replace_schema_metadata({**(batch.schema.metadata or {}), **metadata, **CHECKSUM_PLACEHOLDER})
    with pa.ipc.new_file(path, changed.schema) as file:
        file.write_batch(changed)
    write_checksum(str(path))


def test_any_changed_bit_is_detected(folder: Path) -> None:
    path = folder / "manifest.arrow"
    data = path.read_bytes()
    for offset in range(0, len(data), 7):
        changed = bytearray(data)
        changed[offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"manifest.arrow (is damaged|has schema version)"):
            Manifest.open(folder)
    path.write_bytes(data)
    assert len(Manifest.open(folder)) == 25


def test_changed_or_missing_checksum_is_an_error(folder: Path) -> None:
    path = folder / "manifest.arrow"
    opened = pickle.dumps(Manifest.open(folder))
    with pa.ipc.open_file(path.read_bytes()) as file:
        batch = file.get_batch(0)
    rewrite(path, batch, {b"report": b"{}"})
    assert Manifest.open(folder).report == {}
    with pytest.raises(DataError, match="has changed"):
        pickle.loads(opened)
    metadata = {key: value for key, value in (batch.schema.metadata or {}).items() if key != b"seal"}
    plain = batch.replace_schema_metadata(metadata)
    with pa.ipc.new_file(path, plain.schema) as file:
        file.write_batch(plain)
    with pytest.raises(DataError, match="metadata fields"):
        Manifest.open(folder)


def test_inconsistent_counts_and_offsets_are_errors(folder: Path) -> None:
    path = folder / "manifest.arrow"
    with pa.ipc.open_file(path.read_bytes()) as file:
        batch = file.get_batch(0)
    shards = list(Manifest.open(folder).shards)

    def metadata_of(shards: list[ShardInfo]) -> dict[bytes, bytes]:
        listed = json.dumps([dataclasses.asdict(shard) for shard in shards]).encode()
        return {b"shards": listed, b"digest": shards_digest(shards).encode()}

    def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> pa.RecordBatch:
        column = batch.schema.get_field_index(name)
        values = change(batch.column(name).to_numpy().copy())
        return batch.set_column(column, batch.schema.field(column), pa.array(values, batch.schema.field(column).type))

    one_more = [dataclasses.replace(shards[0], count=shards[0].count + 1), *shards[1:]]
    half = [dataclasses.replace(shards[0], bytes=shards[0].bytes // 2), *shards[1:]]
    cases = [
        (batch, metadata_of(one_more), r"shard-000000.tar should have \d+ images, but \d+ rows"),
        (batch, {b"shards": metadata_of(one_more)[b"shards"]}, "digest"),
        (batch, metadata_of(half), r"image '\w+' \(bytes \d+ to \d+\) is outside of shard-000000.tar"),
        (batch, metadata_of(shards[:-1]), r"a row refers to shard \d of \d"),
        (replaced("shard", lambda v: v[::-1]), {}, r"row \d+ follows"),
        (replaced("offset", lambda v: np.r_[v[0], v[0], v[2:]]), {}, "overlaps the previous image in shard-000000.tar"),
        (replaced("size", lambda v: v - 10_000), {}, "is outside of"),
    ]
    for changed, metadata, message in cases:
        rewrite(path, changed, metadata)
        with pytest.raises(DataError, match=f"inconsistent: .*{message}"):
            Manifest.open(folder)


def test_unchanged_file_is_not_verified_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.open(folder)
    verified: list[int] = []
    monkeypatch.setattr(
        "paml.checksum.verify_checksum", lambda data: verified.append(len(data)) or verify_checksum(data)
    )
    assert pickle.loads(pickle.dumps(manifest)).keys() == manifest.keys()
    assert not verified
    (folder / "manifest.arrow").touch()
    assert pickle.loads(pickle.dumps(manifest)).keys() == manifest.keys()
    assert len(verified) == 1


def test_missing_truncated_and_other_versions_are_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest.arrow"):
        Manifest.open(tmp_path / "nowhere")
    path = folder / "manifest.arrow"
    data = path.read_bytes()
    with pa.ipc.open_file(path) as file:
        batch = file.get_batch(0)
    rewrite(path, batch, {b"schema_version": b"99"})
    with pytest.raises(DataError, match="schema version 99"):
        Manifest.open(folder)
    for size in (0, 5, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match="is damaged"):
            Manifest.open(folder)
