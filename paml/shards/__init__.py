"""Images as WebDataset shards with a manifest: write, index, verify, read by offset."""

from paml.shards.manifest import Manifest, ShardInfo
from paml.shards.reader import CorruptSample, ShardReader
from paml.shards.write import ShardReport, ShardSettings, write_shards

__all__ = [
    "CorruptSample",
    "Manifest",
    "ShardInfo",
    "ShardReader",
    "ShardReport",
    "ShardSettings",
    "write_shards",
]
