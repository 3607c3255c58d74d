import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from paml.errors import DataError
from paml.shards import Manifest, ShardSettings, write_shards
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


def test_absent_cut_and_other_versions_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no manifest.arrow: write shards"):
        Manifest.open(tmp_path / "nowhere")
    path = folder / "manifest.arrow"
    data = path.read_bytes()
    with pa.ipc.open_file(path) as file:
        batch = file.get_batch(0)
    other = batch.replace_schema_metadata({**(batch.schema.metadata or {}), b"schema_version": b"99"})
    with pa.ipc.new_file(path, other.schema) as file:
        file.write_batch(other)
    with pytest.raises(DataError, match="schema version 99, this paml reads 1"):
        Manifest.open(folder)
    for size in (0, 5, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match="is damaged or cut"):
            Manifest.open(folder)
