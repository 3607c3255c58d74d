import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from paml.errors import DataError
from paml.seal import UNSEALED, check_seal, seal_file
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
    """As a writer with wrong ideas, who seals them."""
    changed = batch.replace_schema_metadata({**(batch.schema.metadata or {}), **metadata, **UNSEALED})
    with pa.ipc.new_file(path, changed.schema) as file:
        file.write_batch(changed)
    seal_file(str(path))


def test_any_changed_bit_of_the_file_is_found(folder: Path) -> None:
    path = folder / "manifest.arrow"
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"manifest.arrow (is damaged or cut|has schema version)"):
            Manifest.open(folder)
    path.write_bytes(data)
    assert len(Manifest.open(folder)) == 25


def test_a_manifest_of_before_the_seal_is_read(folder: Path) -> None:
    path = folder / "manifest.arrow"
    sealed = pickle.dumps(Manifest.open(folder))
    with pa.ipc.open_file(path.read_bytes()) as file:
        batch = file.get_batch(0)
    metadata = {key: value for key, value in (batch.schema.metadata or {}).items() if key != b"seal"}
    old = batch.replace_schema_metadata(metadata)
    with pa.ipc.new_file(path, old.schema) as file:
        file.write_batch(old)
    assert Manifest.open(folder).keys() == batch.column("key")
    with pytest.raises(DataError, match="has changed since it was opened: start the run again"):
        pickle.loads(sealed)


def test_counts_and_places_that_contradict_each_other_are_refused(folder: Path) -> None:
    path = folder / "manifest.arrow"
    with pa.ipc.open_file(path.read_bytes()) as file:
        batch = file.get_batch(0)
    shards = list(Manifest.open(folder).shards)

    def said(shards: list[ShardInfo]) -> dict[bytes, bytes]:
        listed = json.dumps([dataclasses.asdict(shard) for shard in shards]).encode()
        return {b"shards": listed, b"digest": shards_digest(shards).encode()}

    def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> pa.RecordBatch:
        place = batch.schema.get_field_index(name)
        values = change(batch.column(name).to_numpy().copy())
        return batch.set_column(place, batch.schema.field(place), pa.array(values, batch.schema.field(place).type))

    one_more = [dataclasses.replace(shards[0], count=shards[0].count + 1), *shards[1:]]
    half = [dataclasses.replace(shards[0], bytes=shards[0].bytes // 2), *shards[1:]]
    cases = [
        (batch, said(one_more), r"shard-000000.tar should hold \d+ images, and \d+ rows name it"),
        (batch, {b"shards": said(one_more)[b"shards"]}, "the list of shards is not that of its digest"),
        (batch, said(half), r"image '\w+' \(bytes \d+ to \d+\) lies outside of shard-000000.tar"),
        (batch, said(shards[:-1]), r"a row lies in shard \d, and there are \d"),
        (replaced("shard", lambda v: v[::-1]), {}, r"row \d+ stands after those of a later shard"),
        (replaced("offset", lambda v: np.r_[v[0], v[0], v[2:]]), {}, "overlaps the one before it in shard-000000.tar"),
        (replaced("size", lambda v: v - 10_000), {}, "lies outside of"),
    ]
    for changed, metadata, message in cases:
        rewrite(path, changed, metadata)
        with pytest.raises(DataError, match=f"contradicts itself: .*{message}.*: copy it again"):
            Manifest.open(folder)


def test_a_file_that_has_not_changed_is_not_checked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.open(folder)
    checked: list[int] = []
    monkeypatch.setattr("paml.shards.manifest.check_seal", lambda data: checked.append(len(data)) or check_seal(data))
    assert pickle.loads(pickle.dumps(manifest)).keys() == manifest.keys()
    assert not checked
    (folder / "manifest.arrow").touch()
    assert pickle.loads(pickle.dumps(manifest)).keys() == manifest.keys()
    assert len(checked) == 1


def test_absent_cut_and_other_versions_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no manifest.arrow: write shards"):
        Manifest.open(tmp_path / "nowhere")
    path = folder / "manifest.arrow"
    data = path.read_bytes()
    with pa.ipc.open_file(path) as file:
        batch = file.get_batch(0)
    rewrite(path, batch, {b"schema_version": b"99"})
    with pytest.raises(DataError, match="schema version 99, this paml reads 1"):
        Manifest.open(folder)
    for size in (0, 5, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match="is damaged or cut"):
            Manifest.open(folder)
