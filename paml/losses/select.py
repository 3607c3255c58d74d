"""Which labels are rejected: exactly the k highest logits of each pool, for any number of workers.

For unobserved labels trained as negatives the loss softplus(x) rises with the logit x, so logits are ranked: for
x << 0 the float32 losses tie where the logits do not. Order: higher logit first; equal logits (0.0 and -0.0 are equal)
by slot, then by class. NaN ranks last; `partial_label_loss` is NaN then, and the caller stops.

- `select_cpu`: a threshold estimated from a sample leaves few labels, which one worker partitions with numpy. Several
  workers do a radix select over them: a rejected label is among the k highest of its worker's part of the pool, so it
  is above that worker's threshold.
- `radix`: on a GPU, a radix select over 32-bit keys of all labels that rise with the logit.

Both radix selects sum histograms of 11, 11 and 10 bits over the workers, then the number of ties in each slot: four
all-reduces whatever the data, so that a worker without images takes part like any other.

Axes: B images of this worker, K classes, P pools.
"""

from fractions import Fraction

import torch
from torch import Tensor

from paml.losses.blocks import nonzero_positions
from paml.losses.pools import Pools, RejectOf, check_inputs
from paml.losses.radix import select_on_device
from paml.losses.select_cpu import select_on_cpu


def select_rejected(
    logits_BK: Tensor, candidate_BK: Tensor, pools: Pools, *, rate: Fraction, reject_of: RejectOf = "unobserved"
) -> Tensor:
    """The labels to reject, bool [B, K]: in each pool the k candidates with the highest logits.

    k = ceil(rate * count), exact, but at most the number of candidates. count is the number of the pool's candidates
    (`reject_of` unobserved), or of its images times K (all); empty slots do not count.

    logits_BK: float32. candidate_BK: bool, the unobserved labels.
    Raises TypeError for logits that are not float32, ValueError for shapes, slots or a rate that do not fit.
    """
    check_inputs(logits_BK, candidate_BK, pools, rate)
    if rate == 0 or pools.batch_size == 0:
        return torch.zeros_like(candidate_BK)
    if logits_BK.device.type != "cpu":
        return select_on_device(logits_BK.detach(), candidate_BK, pools, rate, reject_of)
    observed = nonzero_positions(~candidate_BK.numpy().reshape(-1))
    return select_on_cpu(logits_BK.detach(), observed, pools, rate, reject_of)[1]
