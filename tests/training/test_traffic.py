"""Bytes read from a bucket are in the journal."""

from pathlib import Path

import pytest

from paml import storage
from paml.shards import Manifest
from paml.training.loop import train
from paml.training.world import World
from tests.helpers.prepared import tiny_settings
from tests.helpers.runs import MemoryJournal, quiet


def test_each_shard_is_read_once_in_the_first_epoch_and_cached_in_the_second(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("moto.server")
    from tests.helpers.fault_proxy import faulty_s3

    with faulty_s3(fraction=0.0) as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PAML_CACHE", str(tmp_path / "tables"))
        root = f"{s3.make_bucket('photos')}/data"
        for name in storage.list_files(str(prepared)):
            storage.copy(str(prepared / name), f"{root}/{name}")
        journal = MemoryJournal()
        settings = tiny_settings(
            Path("."), tmp_path / "runs", data={"root": root, "cache_dir": str(tmp_path / "shards"), "test_split": None}
        )
        train(settings, World(), quiet(record_metrics=journal.metrics))
        shards = Manifest.open(f"{root}/shards/train").shards
    first, second = (metrics for _, metrics in journal.epochs[:2])
    total = sum(shard.bytes for shard in shards) / 1e9
    assert first["data/remote_read_gb"] == pytest.approx(total)
    assert (first["data/cache_misses"], first["data/cache_hits"]) == (len(shards), 0)
    assert (second["data/cache_misses"], second["data/cache_hits"]) == (0, len(shards))
    assert second["data/remote_read_gb"] == first["data/cache_bypassed_images"] == 0
