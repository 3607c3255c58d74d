"""The annotated pairs that a score ranges over, and how the workers bring theirs together.

Axes: B images, K classes, n pairs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from paml import storage
from paml.errors import DataError
from paml.labels.states import POSITIVE, UNOBSERVED
from paml.reading import reading

SCHEMA_VERSION = 1


class Pairs(NamedTuple):
    """Annotated (image, class) pairs. A score needs the first three; resampling images needs the fourth."""

    cls: Tensor
    """int32 [n]"""
    score: Tensor
    """float32 [n]"""
    positive: Tensor
    """bool [n]"""
    image: Tensor
    """int64 [n], a number of its own for each image: its place in the manifest"""


def pairs_of(logits_BK: Tensor, image: Tensor, cls: Tensor, state: Tensor, place_B: Tensor | None = None) -> Pairs:
    """The pairs of a batch from its label triples (image within the batch, class, state), on the logits' device.

    place_B: int64, each image's place in the manifest; without it images are numbered within the batch. The triples
    must hold observed labels only, as label tables do. Nothing waits for the device.
    """
    image = image.long()
    score = logits_BK.detach()[image, cls.long()].float()
    return Pairs(cls.to(torch.int32), score, state == POSITIVE, image if place_B is None else place_B[image])


def pairs_of_states(logits_BK: Tensor, state_BK: Tensor) -> Pairs:
    """The pairs of a batch from its label states [B, K]; it waits for the device, as their number decides a shape."""
    image, cls = (state_BK != UNOBSERVED).nonzero(as_tuple=True)
    return pairs_of(logits_BK, image, cls, state_BK[image, cls])


def join_pairs(parts: Sequence[Pairs], device: torch.device | str = "cpu") -> Pairs:
    """One set of pairs from many; no parts give an empty set on `device`."""
    if not parts:
        empty = torch.empty(0, device=device)
        return Pairs(empty.to(torch.int32), empty.to(torch.float32), empty.to(torch.bool), empty.to(torch.int64))
    return Pairs(*(torch.cat(values) for values in zip(*parts, strict=True)))


def gather_pairs(pairs: Pairs, group: dist.ProcessGroup | None) -> Pairs:
    """The pairs of all workers of `group`, on every one of them, in the order of the ranks; None for one worker.

    Each worker brings the pairs of its own images, any number and also none. The tensors lie where the group's backend
    wants them: on the GPU for NCCL, on the CPU for Gloo.
    """
    if group is None or group.size() == 1:
        return pairs
    device = pairs.score.device
    size = torch.tensor([len(pairs.cls)], dtype=torch.int64, device=device)
    sizes = [torch.empty_like(size) for _ in range(group.size())]
    dist.all_gather(sizes, size, group=group)
    lengths = [int(s) for s in torch.cat(sizes).tolist()]
    longest = max(lengths)
    packed = torch.zeros(longest, 2, dtype=torch.int64, device=device)
    packed[: len(pairs.cls), 0] = pairs.image * 2 + pairs.positive
    packed[: len(pairs.cls), 1] = pairs.cls.long() << 32 | (pairs.score.view(torch.int32).long() & 0xFFFFFFFF)
    all_packed = [torch.empty_like(packed) for _ in lengths]
    if longest:
        dist.all_gather(all_packed, packed, group=group)
    joined = torch.cat([part[:length] for part, length in zip(all_packed, lengths, strict=True)])
    image, label = joined.unbind(1)
    return Pairs(
        cls=(label >> 32).to(torch.int32),
        score=label.to(torch.int32).view(torch.float32),  # the low half
        positive=image % 2 == 1,
        image=image // 2,
    )


def write_pairs(path: str, pairs: Pairs, num_classes: int, about: Mapping[str, str]) -> None:
    """Write the pairs to a Parquet file (local or s3://) with the columns image, class_index, score, positive.

    `about` (text, such as the digest of the split) stands in the file's metadata beside the number of classes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"image": pairs.image, "class_index": pairs.cls, "score": pairs.score, "positive": pairs.positive}
    table = pa.table({name: values.cpu().numpy() for name, values in columns.items()})
    facts = {"schema_version": str(SCHEMA_VERSION), "num_classes": str(num_classes), **about}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(facts), sink)
    storage.write_bytes(path, sink.getvalue().to_pybytes())


def read_pairs(path: str) -> tuple[Pairs, dict[str, str]]:
    """What `write_pairs` wrote: the pairs, and the metadata. Raises DataError for another file or schema version."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data, mend = storage.read_bytes(path), "score the run again with this paml"
    with reading(path, mend, also=(OSError,)):
        table = pq.read_table(pa.BufferReader(data))
        facts = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if facts.get("schema_version") != str(SCHEMA_VERSION):
        raise DataError(
            f"{path} has schema version {facts.get('schema_version')}, this paml reads {SCHEMA_VERSION}: score the run "
            "again with this paml"
        )
    names = ("class_index", "score", "positive", "image")
    types = (np.int32, np.float32, np.bool_, np.int64)
    with reading(path, mend):
        columns = [table[name] for name in names]
        if any(column.null_count for column in columns):
            raise ValueError("it holds nulls")
        values = [np.array(c.to_numpy(zero_copy_only=False)).astype(t) for c, t in zip(columns, types, strict=True)]
    return Pairs(*map(torch.from_numpy, values)), facts
