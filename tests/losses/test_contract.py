"""What every loss of the registry must keep. A new loss is tested here by standing in it."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist

from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import LOSSES, LossSettings, partial_label_loss, per_label_loss, reject_rate, select_rejected
from paml.losses.base import AS_POSITIVE, sign_of_labels
from paml.losses.fused import DenseSignedLoss
from tests.helpers.ranks import run_on_ranks

every_loss = pytest.mark.parametrize("name", list(LOSSES))


def batch(name, B=12, K=37, seed=0, scale=3.0, observed=0.3):
    """Logits and states that suit the loss."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, K, generator=generator) * scale - 1
    state = torch.where(torch.rand(B, K, generator=generator) < 0.4, POSITIVE, NEGATIVE).to(torch.int8)
    if not LOSSES[name].needs_all_observed:
        state[torch.rand(B, K, generator=generator) > observed] = UNOBSERVED
    return logits, state


def run(name, logits, state, *, epoch=3, step=0.04, reject_pool=None, reject_of="unobserved", divisor=None):
    B, K = logits.shape
    logits = logits.clone().requires_grad_()
    output = partial_label_loss(
        logits,
        state,
        settings=LossSettings(name=name, reject_rate_step=step, reject_pool=reject_pool, reject_of=reject_of),
        epoch=epoch,
        divisor=divisor or max(B * K, 1),
        slots_B=torch.arange(B),
        batch_size=B,
    )
    output.loss.backward()
    assert logits.grad is not None
    return output, logits.grad


def in_float64(name, logits, state, rejected, divisor):
    """Loss and gradient by autograd through the readable form, in float64."""
    logits = logits.double().requires_grad_()
    loss = per_label_loss(LOSSES[name], logits, state, rejected).sum() / divisor
    loss.backward()
    return loss.detach(), logits.grad


@every_loss
@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bf16-rounded"])
@pytest.mark.parametrize("scale", [3.0, 30.0])
def test_loss_and_gradient_equal_float64_autograd(name, rounded, scale):
    logits, state = batch(name, scale=scale)
    logits = logits.bfloat16().float() if rounded else logits
    output, grad = run(name, logits, state)
    wanted, wanted_grad = in_float64(name, logits, state, output.rejected_BK, logits.numel())
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=2e-6, atol=1e-30)


@every_loss
def test_dense_form_of_gpus_equals_the_sparse_one(name):
    logits, state = batch(name, scale=10)
    output, grad = run(name, logits, state)
    x = logits.clone().requires_grad_()
    loss = DenseSignedLoss.apply(x, sign_of_labels(LOSSES[name], state, output.rejected_BK), x.numel())
    loss.backward()
    torch.testing.assert_close(loss.detach(), output.loss.detach(), rtol=1e-6, atol=0)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad, rtol=1e-6, atol=1e-30)


@every_loss
def test_long_batch_in_blocks_and_threads(name):
    logits, state = batch(name, B=300, K=700, observed=0.01)
    output, grad = run(name, logits, state, reject_pool=128)
    wanted, wanted_grad = in_float64(name, logits, state, output.rejected_BK, logits.numel())
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=2e-6, atol=1e-30)


@every_loss
def test_finite_and_right_at_large_logits(name):
    _, state = batch(name)
    for value in (80.0, -80.0):
        logits = torch.full(state.shape, value)
        output, grad = run(name, logits, state)
        wanted, wanted_grad = in_float64(name, logits, state, output.rejected_BK, logits.numel())
        assert torch.isfinite(output.loss)
        assert torch.isfinite(grad).all()
        torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-6, atol=1e-30)
        torch.testing.assert_close(grad.double(), wanted_grad, rtol=2e-6, atol=1e-30)


@every_loss
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_shows_in_the_loss(name, value):
    """Also where it is rejected or unobserved: the caller stops on the loss alone."""
    logits, state = batch(name)
    for place in ((0, 0), (5, 20), (11, 36)):
        for label in (POSITIVE, NEGATIVE) if LOSSES[name].needs_all_observed else (NEGATIVE, UNOBSERVED):
            broken, labels = logits.clone(), state.clone()
            broken[place], labels[place] = value, label
            corrected = label == UNOBSERVED and LOSSES[name].rejected == AS_POSITIVE
            if value == float("inf") and (label == POSITIVE or corrected):
                continue  # As a positive it costs nothing.
            output, _ = run(name, broken, labels, step=0.5)
            assert not torch.isfinite(output.loss)


@every_loss
def test_warm_up_epoch_rejects_nothing(name):
    logits, state = batch(name)
    output, _ = run(name, logits, state, epoch=1, step=0.5)
    assert output.rejected_BK is None
    wanted, _ = in_float64(name, logits, state, None, logits.numel())
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-6, atol=0)


@every_loss
def test_observed_labels_are_never_touched(name):
    logits, state = batch(name)
    output, _ = run(name, logits, state, step=1.0, reject_of="all")
    if LOSSES[name].rejects:
        assert output.rejected_BK is not None
        assert torch.equal(output.rejected_BK, state == UNOBSERVED)
    else:
        assert output.rejected_BK is None


@every_loss
def test_sum_over_a_split_equals_the_whole(name):
    """Where nothing is rejected a part's loss is its labels' own: the parts of a batch add up to it."""
    logits, state = batch(name)
    whole, whole_grad = run(name, logits, state, epoch=1, divisor=444)
    parts = [run(name, logits[rows], state[rows], epoch=1, divisor=444) for rows in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(parts[0][0].loss + parts[1][0].loss, whole.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), whole_grad, rtol=1e-6, atol=0)


@every_loss
def test_unobserved_labels_cost_as_the_loss_says(name):
    """Masked equals subset: with the unobserved labels removed, or made negatives, the readable form gives the same."""
    loss = LOSSES[name]
    logits, state = batch(name)
    output, _ = run(name, logits, state, epoch=1, divisor=1)
    cost = per_label_loss(LOSSES["full"], logits.double(), state.masked_fill(state == UNOBSERVED, NEGATIVE))
    counted = torch.ones_like(state, dtype=torch.bool) if loss.unobserved else state != UNOBSERVED
    torch.testing.assert_close(output.loss.double(), cost[counted].sum(), rtol=1e-6, atol=0)


@every_loss
def test_empty_batches(name):
    for B, K in ((0, 7), (3, 0)):
        logits, state = torch.zeros(B, K), torch.zeros(B, K, dtype=torch.int8)
        output, grad = run(name, logits, state)
        assert output.loss == 0
        assert grad.shape == (B, K)


@every_loss
def test_second_backward_equals_the_first(name):
    logits, state = batch(name)
    x = logits.clone().requires_grad_()
    output = partial_label_loss(
        x,
        state,
        settings=LossSettings(name=name),
        epoch=2,
        divisor=3,
        slots_B=torch.arange(len(x)),
        batch_size=len(x),
    )
    first, second = (torch.autograd.grad(output.loss * 2, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(output.loss, x, create_graph=True)


@every_loss
@pytest.mark.parametrize("reject_pool", [None, 5])
def test_nothing_waits_for_a_device(name, reject_pool):
    """On `meta` tensors, which have no values, anything that asks for one (item, nonzero, a mask as index) raises."""
    logits, state = (values.to("meta") for values in batch(name))
    logits.requires_grad_()
    output = partial_label_loss(
        logits,
        state,
        settings=LossSettings(name=name, reject_pool=reject_pool),
        epoch=2,
        divisor=3,
        slots_B=torch.arange(12, device="meta"),
        batch_size=12,
    )
    output.loss.backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape
    assert (output.rejected_BK is not None) == LOSSES[name].rejects


# Several workers: how the 12 images of a batch may lie on them, by slots.
SHARES = {
    2: [[range(0, 12), range(0)], [range(0), range(0, 12)], [range(0, 5), range(5, 12)]],
    3: [
        [range(0, 4), range(4, 8), range(8, 12)],
        [range(0, 7), range(0), range(7, 12)],
        [range(9, 12), range(0, 1), range(1, 9)],
    ],
}
KINDS = ("plain", "bf16", "few values", "one value", "signed zeros", "a worker without unobserved labels")
CHOICES = [
    (name, kind, reject_pool, reject_of)
    for name in LOSSES
    for kind in KINDS
    for reject_pool, reject_of in ((None, "unobserved"), (5, "all"), (4, "unobserved"))
]


def crafted(name, kind):
    logits, state = batch(name, seed=7)
    if kind == "bf16":
        logits = logits.bfloat16().float()
    elif kind == "few values":
        logits = logits.round()
    elif kind == "one value":
        logits = torch.full_like(logits, -2.5)
    elif kind == "signed zeros":
        logits = torch.where(logits > 0, 0.0, -0.0)
    elif kind.startswith("a worker"):
        state[5:] = NEGATIVE
    return logits, state


def loss_of_worker(name, kind, reject_pool, reject_of, slots, world):
    logits, state = crafted(name, kind)
    slots_B = torch.tensor(list(slots), dtype=torch.int64)
    x = logits[slots_B].requires_grad_()
    output = partial_label_loss(
        x,
        state[slots_B],
        settings=LossSettings(name=name, reject_rate_step=0.06, reject_pool=reject_pool, reject_of=reject_of),
        epoch=3,
        divisor=logits.numel(),
        slots_B=slots_B,
        batch_size=len(logits),
        world=world,
    )
    output.loss.backward()
    rejected = None if output.rejected_BK is None else output.rejected_BK.numpy()
    assert x.grad is not None
    return output.loss.item(), rejected, x.grad.numpy()


def worker(rank, shares):
    return [[loss_of_worker(*choice, share[rank], dist.group.WORLD) for choice in CHOICES] for share in shares]


@pytest.mark.parametrize("ranks", [2, 3])
def test_number_of_workers_changes_nothing(ranks):
    results = run_on_ranks(worker, ranks, SHARES[ranks])
    rejections = 0
    for choice_index, choice in enumerate(CHOICES):
        loss, rejected, grad = loss_of_worker(*choice, range(12), None)
        for share_index, share in enumerate(SHARES[ranks]):
            mine = [results[rank][share_index][choice_index] for rank in range(ranks)]
            order = np.argsort([slot for part in share for slot in part])
            np.testing.assert_allclose(sum(part[0] for part in mine), loss, rtol=1e-6)
            np.testing.assert_allclose(np.concatenate([part[2] for part in mine])[order], grad, rtol=1e-6, atol=1e-12)
            if rejected is None:
                assert all(part[1] is None for part in mine)
            else:
                assert np.array_equal(np.concatenate([part[1] for part in mine])[order], rejected), (choice, share)
                rejections += int(rejected.sum())
    assert rejections > 1000


def uneven_worker(rank):
    """k = 0 and k = all over workers, one of them without images."""
    logits, state = crafted("ll-r", "few values")
    slots = torch.arange(12) if rank == 1 else torch.arange(0)
    candidate = state[slots] == UNOBSERVED
    return [
        select_rejected(
            logits[slots], candidate, slots_B=slots, batch_size=12, rate=rate, group=dist.group.WORLD
        ).numpy()
        for rate in (Fraction(0), Fraction(1, 10**12), Fraction(1))
    ]


def test_none_one_and_all_over_workers():
    nothing, rejected = run_on_ranks(uneven_worker, 2)
    assert [part.shape for part in nothing] == [(0, 37)] * 3
    _, state = crafted("ll-r", "few values")
    assert [int(part.sum()) for part in rejected] == [0, 1, int((state == UNOBSERVED).sum())]


def failing_worker(rank):
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def test_helper_gives_the_error_of_a_worker():
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed(.|\n)*the reason"):
        run_on_ranks(failing_worker, 2, timeout_s=60)


def test_rates_follow_the_papers():
    def rates(name, step):
        return [reject_rate(LossSettings(name=name, reject_rate_step=step), epoch) for epoch in (1, 2, 3, 12)]

    assert rates("ll-r", 0.1) == rates("ll-ct", 0.1) == [0, Fraction(1, 10), Fraction(2, 10), 1]
    assert rates("ll-cp", 0.1) == [0, *[Fraction(1, 10)] * 3]
    assert rates("an", 0.1) == rates("iu", 0.1) == rates("full", 0.1) == [0] * 4
