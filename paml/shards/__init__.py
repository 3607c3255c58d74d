"""Images as WebDataset shards with a manifest: write, index, verify, read by offset."""

from paml.shards.index import index_shards
from paml.shards.manifest import Manifest
from paml.shards.reader import CorruptSampleError, ShardReader
from paml.shards.settings import ShardSettings
from paml.shards.verify import verify_shards
from paml.shards.webdataset import open_webdataset
from paml.shards.write import ShardReport, write_parts, write_shards

__all__ = [
    "CorruptSampleError",
    "Manifest",
    "ShardReader",
    "ShardReport",
    "ShardSettings",
    "index_shards",
    "open_webdataset",
    "verify_shards",
    "write_parts",
    "write_shards",
]
