"""What an epoch read from the bucket stands in the journal."""

from pathlib import Path

import pytest

from paml import storage
from paml.shards import Manifest
from paml.training.loop import Watcher, train
from paml.training.world import World
from tests.helpers.prepared import tiny_settings


class Kept:
    """A journal in memory."""

    def __init__(self) -> None:
        self.epochs: dict[int, dict[str, float]] = {}

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.epochs.setdefault(step, {}).update(values)


def test_the_first_epoch_fetches_each_shard_once_and_the_second_nothing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("moto.server")
    from tests.helpers.fault_proxy import faulty_s3

    with faulty_s3(share=0.0) as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PAML_CACHE", str(tmp_path / "tables"))
        root = f"{s3.make_bucket('photos')}/data"
        for name in storage.list_files(str(prepared)):
            storage.upload(str(prepared / name), f"{root}/{name}")
        journal = Kept()
        settings = tiny_settings(
            Path("."), tmp_path / "runs", data={"root": root, "cache_dir": str(tmp_path / "shards"), "test_split": None}
        )
        train(settings, World(), Watcher(journal=journal, say=lambda line: None))
        shards = Manifest.open(f"{root}/shards/train").shards
    first, second = journal.epochs[1], journal.epochs[2]
    total = sum(shard.bytes for shard in shards) / 1e9
    assert first["data/gb_from_bucket"] == first["data/gb_from_bucket_largest_node"] == pytest.approx(total)
    assert (first["data/cache_misses"], first["data/cache_hits"]) == (len(shards), 0)
    assert (second["data/cache_misses"], second["data/cache_hits"]) == (0, len(shards))
    assert second["data/gb_from_bucket"] == first["data/images_past_cache"] == 0
