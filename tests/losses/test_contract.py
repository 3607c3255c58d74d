"""What every loss of the registry must satisfy. A new loss is tested once it has a formula in `reference.FORMULAS`."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import (
    LOSSES,
    BatchContext,
    Labels,
    LossSettings,
    Pools,
    partial_label_loss,
    per_label_loss,
    reject_rate,
    select_rejected,
)
from paml.losses.base import AS_POSITIVE, sign_of_labels
from paml.losses.fused import DenseSignedLoss
from paml.losses.p_asl import PASLSettings
from tests.helpers.ranks import run_on_ranks
from tests.losses.reference import FORMULAS, by_formula, loss_state_of

every_loss = pytest.mark.parametrize("name", list(LOSSES))
CROSS_ENTROPY = [name for name, loss in LOSSES.items() if loss.per_label is None]
fused_losses = pytest.mark.parametrize("name", CROSS_ENTROPY)
EPOCHS = 8


def batch(name, B=12, K=37, seed=0, scale=3.0, observed=0.3):
    """Logits and states that suit the loss."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, K, generator=generator) * scale - 1
    state = torch.where(torch.rand(B, K, generator=generator) < 0.4, POSITIVE, NEGATIVE).to(torch.int8)
    if not LOSSES[name].needs_all_observed:
        state[torch.rand(B, K, generator=generator) > observed] = UNOBSERVED
    return logits, state


def run(name, logits, state, *, epoch=3, divisor=None, select_logits=None, **settings):
    """Output and gradient."""
    logits = logits.clone().requires_grad_()
    output = partial_label_loss(
        logits,
        state,
        LossSettings(**({"name": name, "reject_rate_step": 0.04} | settings)),
        BatchContext(epoch=epoch, num_epochs=EPOCHS, divisor=divisor or max(logits.numel(), 1)),
        loss_state=loss_state_of(name, logits, state),
        select_logits_BK=select_logits,
    )
    output.loss.backward()
    assert logits.grad is not None
    return output, logits.grad


def assert_equals_formula(name, output, grad, logits, state, epoch=3):
    """Loss and gradient equal those of the paper's formula by autograd in float64.

    The fused cross-entropy has its own gradient, exact to the last digit (the formula's has none below 1e-16). The
    others use autograd in float32, which loses digits where two terms cancel.
    """
    expected, expected_grad = by_formula(name, logits, state, output.rejected_BK, epoch)
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6 if is_exact(name) else 3e-6, atol=1e-30)
    largest = float(expected_grad.abs().max()) if expected_grad.numel() else 0.0
    rtol, of_largest = (2e-6, 0.0) if is_exact(name) else (2e-5, 1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=1e-16 + of_largest * largest)


def is_exact(name):
    return name in CROSS_ENTROPY


def test_every_loss_has_a_formula():
    assert list(FORMULAS) == list(LOSSES)


@every_loss
@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bf16-rounded"])
@pytest.mark.parametrize(("scale", "epoch"), [(3.0, 3), (3.0, 2), (3.0, 1), (3.0, 8), (30.0, 3)])
def test_loss_and_gradient_equal_float64_autograd(name, rounded, scale, epoch):
    logits, state = batch(name, scale=scale)
    logits = logits.bfloat16().float() if rounded else logits
    output, grad = run(name, logits, state, epoch=epoch)
    assert_equals_formula(name, output, grad, logits, state, epoch)


@fused_losses
def test_dense_form_for_gpus_equals_the_sparse_one(name):
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
    output, grad = run(name, logits, state, reject_pool=128 if name in CROSS_ENTROPY else None)
    assert_equals_formula(name, output, grad, logits, state)


@every_loss
@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bf16-rounded"])
def test_finite_and_correct_at_large_logits(name, rounded):
    _, state = batch(name)
    for value in (80.0, -80.0):
        logits = torch.full(state.shape, value)
        logits = logits.bfloat16().float() if rounded else logits
        output, grad = run(name, logits, state)
        assert torch.isfinite(output.loss)
        assert torch.isfinite(grad).all()
        assert_equals_formula(name, output, grad, logits, state)


@every_loss
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_makes_the_loss_not_finite(name, value):
    """Also for a rejected or unobserved label, since the caller checks only the loss."""
    logits, state = batch(name)
    for position in ((0, 0), (5, 20), (11, 36)):
        for label in (POSITIVE, NEGATIVE) if LOSSES[name].needs_all_observed else (NEGATIVE, UNOBSERVED):
            broken, labels = logits.clone(), state.clone()
            broken[position], labels[position] = value, label
            corrected = label == UNOBSERVED and LOSSES[name].rejected == AS_POSITIVE
            if name in CROSS_ENTROPY and value == float("inf") and (label == POSITIVE or corrected):
                continue  # It costs nothing as a positive.
            output, _ = run(name, broken, labels, reject_rate_step=0.5)
            assert not torch.isfinite(output.loss)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "p-asl-selective"])  # which has no warm-up
def test_warmup_epoch_rejects_nothing(name):
    logits, state = batch(name)
    output, grad = run(name, logits, state, epoch=1, reject_rate_step=0.5)
    assert output.rejected_BK is None
    assert_equals_formula(name, output, grad, logits, state, epoch=1)


@every_loss
def test_observed_labels_are_never_rejected(name):
    logits, state = batch(name, scale=10)
    output, _ = run(name, logits, state, reject_rate_step=1.0, reject_of="all", p_asl=PASLSettings(top_k=1000))
    if not LOSSES[name].rejects:
        assert output.rejected_BK is None
        return
    assert output.rejected_BK is not None
    threshold = {"splc": math.log(0.6 / 0.4), "curriculum": 2.0}.get(name, -math.inf)
    assert output.rejected_BK.any()
    assert torch.equal(output.rejected_BK, (state == UNOBSERVED) & (logits > threshold))


@every_loss
def test_other_logits_may_choose_what_is_rejected(name):
    """They choose the same labels as they would for their own loss, and have no other effect."""
    logits, state = batch(name)
    others, _ = batch(name, seed=1)
    own, _ = run(name, logits, state)
    chosen, _ = run(name, others, state)
    output, grad = run(name, logits, state, select_logits=others.requires_grad_())
    assert others.grad is None
    if not LOSSES[name].rejects:
        assert output.rejected_BK is None
        assert torch.equal(output.loss, own.loss)
        return
    assert own.rejected_BK is not None
    assert chosen.rejected_BK is not None
    assert output.rejected_BK is not None
    assert torch.equal(output.rejected_BK, chosen.rejected_BK)
    assert not torch.equal(output.rejected_BK, own.rejected_BK)
    if name in CROSS_ENTROPY:
        assert_equals_formula(name, output, grad, logits, state)
    same, same_grad = run(name, logits, state, select_logits=logits)
    assert torch.equal(same.loss, own.loss)
    assert torch.equal(same_grad, run(name, logits, state)[1])


def test_logits_that_choose_must_fit():
    logits, state = batch("ll-r")
    with pytest.raises(TypeError, match=r"bfloat16.*logits\.float"):
        run("ll-r", logits, state, select_logits=logits.bfloat16())
    with pytest.raises(ValueError, match="shapes"):
        run("ll-r", logits, state, select_logits=logits[:3])


@every_loss
def test_losses_of_parts_add_up_to_the_whole(name):
    """If nothing is chosen over the batch, the loss is a sum over labels."""
    if LOSSES[name].over_batch is not None:
        pytest.skip("has a term of the whole batch")
    logits, state = batch(name)
    rows = slice(0, 5), slice(5, 12)
    without_rejection = {"epoch": 1, "divisor": 444, "p_asl": PASLSettings(top_k=0)}
    whole, whole_grad = run(name, logits, state, **without_rejection)
    parts = [run(name, logits[part], state[part], **without_rejection) for part in rows]
    torch.testing.assert_close(parts[0][0].loss + parts[1][0].loss, whole.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), whole_grad, rtol=1e-6, atol=0)


@every_loss
def test_masked_equals_subset(name):
    """A label's cost does not depend on other labels. Labels that are left out have no gradient."""
    loss = LOSSES[name]
    logits, state = batch(name)
    # EPR's term of the whole batch is zero if the expected positives are as expected.
    positives = float(torch.sigmoid(logits).sum(1).mean())
    settings: Any = LossSettings(
        name=name, reject_rate_step=0.002, expected_positives=positives, p_asl=PASLSettings(top_k=0)
    )
    shared = {"expected_positives": positives, "p_asl": settings.p_asl}
    context = BatchContext(epoch=1, num_epochs=EPOCHS)
    output, grad = run(name, logits, state, epoch=1, divisor=1, **shared)
    loss_state = loss_state_of(name, logits, state)

    cost = per_label_loss(loss, logits.double(), Labels(state, None, loss_state), settings, context)
    if name != "role":  # its two terms of the batch are not zero together
        factor = logits.shape[1] if loss.divisor == "images" else 1
        torch.testing.assert_close(output.loss.double(), cost.sum() * factor, rtol=1e-5, atol=0)
    for kind in (POSITIVE, NEGATIVE, UNOBSERVED):
        mask = state == kind
        if not mask.any():
            continue
        # WAN's weight depends on the number of classes, so a subset has all classes of one image.
        for image in range(len(state)):
            alone = logits[image].double().masked_fill(~mask[image], 1.5)[None]
            labels = state[image].masked_fill(~mask[image], POSITIVE)[None]
            its_state = None if loss_state is None else loss_state[image][None]
            subset = per_label_loss(loss, alone, Labels(labels, None, its_state), settings, context)
            torch.testing.assert_close(subset[0, mask[image]], cost[image, mask[image]], rtol=1e-12, atol=0)
    if loss.unobserved == 0:
        assert not cost[state == UNOBSERVED].any()
        assert name == "epr" or not grad[state == UNOBSERVED].any()


@every_loss
def test_empty_batches(name):
    for B, K in ((0, 7), (3, 0)):
        logits, state = torch.zeros(B, K), torch.zeros(B, K, dtype=torch.int8)
        output, grad = run(name, logits, state)
        assert output.loss == 0
        assert grad.shape == (B, K)


@every_loss
@pytest.mark.parametrize("kinds", [(NEGATIVE, UNOBSERVED), (POSITIVE, NEGATIVE), (UNOBSERVED,), (POSITIVE,)])
def test_batches_without_a_kind_of_label(name, kinds):
    """No positives, none unobserved, none observed."""
    if LOSSES[name].needs_all_observed and UNOBSERVED in kinds:
        pytest.skip("it refuses unobserved labels")
    logits, _ = batch(name)
    kinds = torch.tensor(kinds, dtype=torch.int8)
    state = kinds[torch.randint(len(kinds), logits.shape, generator=torch.Generator().manual_seed(1))]
    output, grad = run(name, logits, state)
    assert_equals_formula(name, output, grad, logits, state)


@every_loss
def test_second_backward_equals_the_first(name):
    logits, state = batch(name)
    x = logits.clone().requires_grad_()
    output = partial_label_loss(
        x,
        state,
        LossSettings(name=name, reject_rate_step=0.002),
        BatchContext(epoch=2, num_epochs=EPOCHS),
        loss_state=loss_state_of(name, logits, state),
    )
    first, second = (torch.autograd.grad(output.loss * 2, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    if name in CROSS_ENTROPY:
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(output.loss, x, create_graph=True)


@every_loss
@pytest.mark.parametrize("reject_pool", [None, 5])
def test_nothing_waits_for_a_device(name, reject_pool):
    """Tensors on `meta` have no values: whatever reads one (item, nonzero, a mask as index) raises."""
    logits, state = (values.to("meta") for values in batch(name))
    logits.requires_grad_()
    output = partial_label_loss(
        logits,
        state,
        LossSettings(name=name, reject_rate_step=0.002, reject_pool=reject_pool),
        BatchContext(epoch=2, num_epochs=EPOCHS),
        loss_state=loss_state_of(name, logits, state),
        select_logits_BK=logits,
    )
    output.loss.backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape
    assert (output.rejected_BK is not None) == LOSSES[name].rejects


# Several workers: how the 12 images of a batch are divided among them, by slot.
SHARES = {
    2: [[range(0, 12), range(0)], [range(0), range(0, 12)], [range(0, 5), range(5, 12)]],
    3: [
        [range(0, 4), range(4, 8), range(8, 12)],
        [range(0, 7), range(0), range(7, 12)],
        [range(9, 12), range(0, 1), range(1, 9)],
    ],
}
KINDS = ("plain", "bf16", "few values", "one value", "signed zeros", "a worker without unobserved labels")
CASES = [
    (name, kind, {"reject_pool": reject_pool, "reject_of": reject_of}, batch_size)
    for name in LOSSES
    for kind in KINDS
    for reject_pool, reject_of, batch_size in (
        (None, "unobserved", 12),
        (5, "all", 12),
        (4, "unobserved", 12),
        (5, "all", 19),  # a short last batch
    )
    if reject_pool is None or LOSSES[name].rejects
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


def loss_of_worker(name, kind, rejection, batch_size, slots, world):
    logits, state = crafted(name, kind)
    slots_B = torch.tensor(list(slots), dtype=torch.int64)
    x = logits[slots_B].requires_grad_()
    output = partial_label_loss(
        x,
        state[slots_B],
        LossSettings(name=name, reject_rate_step=0.06, **rejection),
        BatchContext(epoch=3, num_epochs=EPOCHS, slots_B=slots_B, batch_size=batch_size, world=world),
        loss_state=loss_state_of(name, x, state[slots_B]),
    )
    output.loss.backward()
    rejected = None if output.rejected_BK is None else output.rejected_BK.numpy()
    assert x.grad is not None
    return output.loss.item(), rejected, x.grad.numpy()


def worker(rank, shares):
    return [[loss_of_worker(*case, share[rank], dist.group.WORLD) for case in CASES] for share in shares]


@pytest.mark.parametrize("ranks", [2, 3])
def test_number_of_workers_changes_nothing(ranks):
    results = run_on_ranks(worker, ranks, SHARES[ranks])
    rejections = 0
    for case_index, case in enumerate(CASES):
        loss, rejected, grad = loss_of_worker(*case, range(12), None)
        for share_index, share in enumerate(SHARES[ranks]):
            parts = [results[rank][share_index][case_index] for rank in range(ranks)]
            order = np.argsort([slot for part in share for slot in part])
            np.testing.assert_allclose(sum(part[0] for part in parts), loss, rtol=1e-6)
            joined = np.concatenate([part[2] for part in parts])[order]
            atol = 1e-12 if is_exact(case[0]) else 1e-7 * np.abs(grad).max()
            np.testing.assert_allclose(joined, grad, rtol=1e-6, atol=atol, err_msg=str(case))
            if rejected is None:
                assert all(part[1] is None for part in parts)
            else:
                assert np.array_equal(np.concatenate([part[1] for part in parts])[order], rejected), (case, share)
                rejections += int(rejected.sum())
    assert rejections > 1000


def uneven_worker(rank):
    """k = 0, k = 1 and k = all over workers, one of them without images."""
    logits, state = crafted("ll-r", "few values")
    slots = torch.arange(12) if rank == 1 else torch.arange(0)
    pools = Pools(slots, 12, group=dist.group.WORLD)
    return [
        select_rejected(logits[slots], state[slots] == UNOBSERVED, pools, rate=rate).numpy()
        for rate in (Fraction(0), Fraction(1, 10**12), Fraction(1))
    ]


def test_none_one_and_all_over_workers():
    empty, rejected = run_on_ranks(uneven_worker, 2)
    assert [part.shape for part in empty] == [(0, 37)] * 3
    _, state = crafted("ll-r", "few values")
    assert [int(part.sum()) for part in rejected] == [0, 1, int((state == UNOBSERVED).sum())]


def failing_worker(rank):
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def test_helper_reports_the_error_of_a_worker():
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed(.|\n)*the reason"):
        run_on_ranks(failing_worker, 2, timeout_s=60)


def test_rates_follow_the_papers():
    def rates(name, step):
        return [reject_rate(LossSettings(name=name, reject_rate_step=step), epoch) for epoch in (1, 2, 3, 12)]

    assert rates("ll-r", 0.1) == rates("ll-ct", 0.1) == [0, Fraction(1, 10), Fraction(2, 10), 1]
    assert rates("ll-cp", 0.1) == [0, *[Fraction(1, 10)] * 3]
    assert rates("an", 0.1) == rates("iu", 0.1) == rates("full", 0.1) == [0] * 4


@pytest.mark.parametrize("name", ["ll-r", "ll-ct"])
def test_unordered_slots_above_one_block(name):
    # The fused loss looks up the rejected labels of each block of 65,536, so their positions must ascend.
    logits, state = batch(name, B=24, K=5000, observed=0.002)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    settings, leaf = LossSettings(name=name, reject_rate_step=0.01), logits.clone().requires_grad_()
    output = partial_label_loss(leaf, state, settings, BatchContext(epoch=3, slots_B=order))
    output.loss.backward()
    in_order = partial_label_loss(logits[order.argsort()], state[order.argsort()], settings, BatchContext(epoch=3))
    assert torch.equal(output.rejected_BK[order.argsort()], in_order.rejected_BK)
    assert_equals_formula(name, output, leaf.grad, logits, state)
