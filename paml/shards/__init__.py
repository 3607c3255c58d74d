"""Images as WebDataset shards with a manifest: write, index, verify, read by offset."""

from paml.shards.index import index_shards
from paml.shards.manifest import Manifest, ShardInfo
from paml.shards.reader import CorruptSample, ShardReader
from paml.shards.settings import ShardSettings
from paml.shards.verify import ShardFault, VerifyReport, verify_shards
from paml.shards.write import PartsFailed, ShardReport, write_parts, write_shards

__all__ = [
    "CorruptSample",
    "Manifest",
    "PartsFailed",
    "ShardFault",
    "ShardInfo",
    "ShardReader",
    "ShardReport",
    "ShardSettings",
    "VerifyReport",
    "index_shards",
    "verify_shards",
    "write_parts",
    "write_shards",
]
