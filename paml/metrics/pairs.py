"""The annotated pairs that a score ranges over, and how the workers bring theirs together.

Axes: B images, K classes, n pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paml.labels.states import POSITIVE, UNOBSERVED


class Pairs(NamedTuple):
    """Annotated (image, class) pairs; which image does not matter."""

    cls: Tensor
    """int32 [n]"""
    score: Tensor
    """float32 [n]"""
    positive: Tensor
    """bool [n]"""


def pairs_of(logits_BK: Tensor, image: Tensor, cls: Tensor, state: Tensor) -> Pairs:
    """The pairs of a batch from its label triples (image within the batch, class, state), on the logits' device.

    The triples must hold observed labels only, as label tables do. Nothing waits for the device.
    """
    score = logits_BK.detach()[image.long(), cls.long()].float()
    return Pairs(cls.to(torch.int32), score, state == POSITIVE)


def pairs_of_states(logits_BK: Tensor, state_BK: Tensor) -> Pairs:
    """The pairs of a batch from its label states [B, K]; it waits for the device, as their number decides a shape."""
    image, cls = (state_BK != UNOBSERVED).nonzero(as_tuple=True)
    return pairs_of(logits_BK, image, cls, state_BK[image, cls])


def join_pairs(parts: Sequence[Pairs], device: torch.device | str = "cpu") -> Pairs:
    """One set of pairs from many; no parts give an empty set on `device`."""
    if not parts:
        empty = torch.empty(0, device=device)
        return Pairs(empty.to(torch.int32), empty.to(torch.float32), empty.to(torch.bool))
    return Pairs(
        torch.cat([p.cls for p in parts]), torch.cat([p.score for p in parts]), torch.cat([p.positive for p in parts])
    )


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
    packed = torch.zeros(longest, 2, dtype=torch.int32, device=device)
    packed[: len(pairs.cls), 0] = pairs.cls * 2 + pairs.positive
    packed[: len(pairs.cls), 1] = pairs.score.view(torch.int32)
    all_packed = [torch.empty_like(packed) for _ in lengths]
    if longest:
        dist.all_gather(all_packed, packed, group=group)
    joined = torch.cat([part[:length] for part, length in zip(all_packed, lengths, strict=True)])
    label, bits = joined.unbind(1)
    return Pairs(label // 2, bits.contiguous().view(torch.float32), label % 2 == 1)
