"""Annotated (image, class) pairs with their scores: from batches, over workers, in files.

Axes: B images, K classes, n pairs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from paml import storage
from paml.errors import DataError
from paml.labels.states import POSITIVE, UNOBSERVED
from paml.parsing import parse_errors_as

SCHEMA_VERSION = 1


class Pairs(NamedTuple):
    """Annotated (image, class) pairs."""

    cls: Tensor
    """int32 [n]"""
    score: Tensor
    """float32 [n]"""
    positive: Tensor
    """bool [n]"""
    image: Tensor
    """int64 [n], position of the image in the manifest"""


def pairs_of(logits_BK: Tensor, image: Tensor, cls: Tensor, state: Tensor, index_B: Tensor | None = None) -> Pairs:
    """The pairs of a batch from its label triples (image within the batch, class, state), on the logits' device.

    index_B: int64, each image's position in the manifest; without it images are numbered within the batch. The triples
    must be observed labels, as in label tables. Nothing waits for the device.
    """
    image = image.long()
    score = logits_BK.detach()[image, cls.long()].float()
    return Pairs(cls.to(torch.int32), score, state == POSITIVE, image if index_B is None else index_B[image])


def pairs_of_states(logits_BK: Tensor, state_BK: Tensor) -> Pairs:
    """The pairs of a batch from its label states [B, K]. Waits for the device to count them."""
    image, cls = (state_BK != UNOBSERVED).nonzero(as_tuple=True)
    return pairs_of(logits_BK, image, cls, state_BK[image, cls])


def join_pairs(parts: Sequence[Pairs], device: torch.device | str = "cpu") -> Pairs:
    """Concatenate pairs; without any the result is empty, on `device`."""
    if not parts:
        empty = torch.empty(0, device=device)
        return Pairs(empty.to(torch.int32), empty.to(torch.float32), empty.to(torch.bool), empty.to(torch.int64))
    return Pairs(*(torch.cat(values) for values in zip(*parts, strict=True)))


def gather_pairs(pairs: Pairs, group: dist.ProcessGroup | None) -> Pairs:
    """The pairs of all workers of `group` (None for one worker), on each of them, in the order of the ranks.

    A worker may have no pairs. With several workers the result is on the CPU.
    """
    if group is None or group.size() == 1:
        return pairs
    parts: list = [None] * group.size()
    dist.all_gather_object(parts, [values.cpu().numpy() for values in pairs], group=group)
    return Pairs(*(torch.from_numpy(np.concatenate(values)) for values in zip(*parts, strict=True)))


def write_pairs(path: str, pairs: Pairs, num_classes: int, metadata: Mapping[str, str]) -> None:
    """Write pairs to a Parquet file (local or s3://) with the columns image, class_index, score, positive.

    metadata: stored in the file along with the number of classes, e.g. the digest of the split.
    """
    columns = {"image": pairs.image, "class_index": pairs.cls, "score": pairs.score, "positive": pairs.positive}
    metadata = {"schema_version": str(SCHEMA_VERSION), "num_classes": str(num_classes), **metadata}
    write_table(path, {name: values.cpu().numpy() for name, values in columns.items()}, metadata)


def write_table(path: str, columns: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write columns (Arrow or numpy arrays) to a Parquet file, local or s3://, with metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(columns)).replace_schema_metadata(dict(metadata)), sink)
    storage.write_bytes(path, sink.getvalue().to_pybytes())


def read_pairs(path: str) -> tuple[Pairs, dict[str, str]]:
    """Pairs and metadata of a file from `write_pairs`. Raises DataError for another file or schema version."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data, hint = storage.read_bytes(path), "score the run again with this paml"
    with parse_errors_as(path, hint, also=(OSError,)):
        table = pq.read_table(pa.BufferReader(data))
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if metadata.get("schema_version") != str(SCHEMA_VERSION):
        raise DataError(
            f"{path} has schema version {metadata.get('schema_version')}, this paml reads {SCHEMA_VERSION}: score the "
            "run again with this paml"
        )
    names = ("class_index", "score", "positive", "image")
    types = (np.int32, np.float32, np.bool_, np.int64)
    with parse_errors_as(path, hint):
        columns = [table[name] for name in names]
        if any(column.null_count for column in columns):
            raise ValueError("a column has nulls")
        values = [np.array(c.to_numpy(zero_copy_only=False)).astype(t) for c, t in zip(columns, types, strict=True)]
    return Pairs(*map(torch.from_numpy, values)), metadata
