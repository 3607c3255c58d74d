"""What every loss of the registry must keep. A new loss is tested by standing there and in `reference.FORMULAS`."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from paml.errors import SettingsError
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import LOSSES, LossSettings, partial_label_loss, per_label_loss, reject_rate, select_rejected
from paml.losses.base import AS_POSITIVE, Epoch, sign_of_labels
from paml.losses.epr import EPRSettings
from paml.losses.fused import DenseSignedLoss
from paml.losses.p_asl import PASLSettings
from tests.helpers.ranks import run_on_ranks
from tests.losses.reference import FORMULAS, by_formula, recalled_of

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


def run(
    name,
    logits,
    state,
    *,
    epoch=3,
    step=0.04,
    reject_pool=None,
    reject_of: Any = "unobserved",
    divisor=None,
    select_logits=None,
    **settings,
):
    B, K = logits.shape
    logits = logits.clone().requires_grad_()
    output = partial_label_loss(
        logits,
        state,
        settings=LossSettings(
            name=name, reject_rate_step=step, reject_pool=reject_pool, reject_of=reject_of, **settings
        ),
        epoch=epoch,
        epochs=EPOCHS,
        divisor=divisor or max(B * K, 1),
        slots_B=torch.arange(B),
        batch_size=B,
        recalled=recalled_of(name, logits, state),
        select_logits_BK=select_logits,
    )
    output.loss.backward()
    assert logits.grad is not None
    return output, logits.grad


def assert_as_in_the_papers(name, output, grad, logits, state, epoch=3):
    """Loss and gradient equal the literal formula's by autograd in float64.

    Cross-entropy has a gradient of its own, exact to the last digit (the formula's, in float64, knows no gradient below
    1e-16). The others' is autograd's in float32, which loses digits where two terms cancel.
    """
    wanted, wanted_grad = by_formula(name, logits, state, output.rejected_BK, epoch)
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-6 if exact(name) else 3e-6, atol=1e-30)
    assert_close_gradients(name, grad.double(), wanted_grad)


def assert_close_gradients(name, grad, wanted):
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    rtol, of_largest = (2e-6, 0.0) if exact(name) else (2e-5, 1e-6)
    torch.testing.assert_close(grad, wanted, rtol=rtol, atol=1e-16 + of_largest * largest)


def exact(name):
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
    assert_as_in_the_papers(name, output, grad, logits, state, epoch)


@fused_losses
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
    output, grad = run(name, logits, state, reject_pool=128 if name in CROSS_ENTROPY else None)
    assert_as_in_the_papers(name, output, grad, logits, state)


@every_loss
@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bf16-rounded"])
def test_finite_and_right_at_large_logits(name, rounded):
    _, state = batch(name)
    for value in (80.0, -80.0):
        logits = torch.full(state.shape, value)
        logits = logits.bfloat16().float() if rounded else logits
        output, grad = run(name, logits, state)
        assert torch.isfinite(output.loss)
        assert torch.isfinite(grad).all()
        assert_as_in_the_papers(name, output, grad, logits, state)


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
            if name in CROSS_ENTROPY and value == float("inf") and (label == POSITIVE or corrected):
                continue  # As a positive it costs nothing.
            output, _ = run(name, broken, labels, step=0.5)
            assert not torch.isfinite(output.loss)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "p-asl-selective"])  # which has no warm-up
def test_warm_up_epoch_rejects_nothing(name):
    logits, state = batch(name)
    output, grad = run(name, logits, state, epoch=1, step=0.5)
    assert output.rejected_BK is None
    assert_as_in_the_papers(name, output, grad, logits, state, epoch=1)


@every_loss
def test_observed_labels_are_never_touched(name):
    logits, state = batch(name, scale=10)
    output, _ = run(name, logits, state, step=1.0, reject_of="all", p_asl=PASLSettings(top_k=1000))
    if not LOSSES[name].rejects:
        assert output.rejected_BK is None
        return
    assert output.rejected_BK is not None
    above = {"splc": math.log(0.6 / 0.4), "curriculum": 2.0}.get(name, -math.inf)
    likely = logits > above
    assert output.rejected_BK.any()
    assert torch.equal(output.rejected_BK, (state == UNOBSERVED) & likely)


@every_loss
def test_other_logits_may_choose_what_is_rejected(name):
    """They choose as they would by themselves, and have no other part in the loss."""
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
        assert_as_in_the_papers(name, output, grad, logits, state)
    same, same_grad = run(name, logits, state, select_logits=logits)
    assert torch.equal(same.loss, own.loss)
    assert torch.equal(same_grad, run(name, logits, state)[1])


def test_logits_that_choose_must_fit():
    logits, state = batch("ll-r")
    with pytest.raises(TypeError, match=r"bfloat16.*logits\.float"):
        run("ll-r", logits, state, select_logits=logits.bfloat16())
    with pytest.raises(ValueError, match="shapes do not fit"):
        run("ll-r", logits, state, select_logits=logits[:3])


@pytest.mark.parametrize("within", ["pool", "class", "image"])
@pytest.mark.parametrize("of_others", [False, True])
def test_ll_r_corrects_what_it_rejects_confidently_from_an_epoch_on(within, of_others):
    logits, state = batch("ll-r", scale=4)
    others = batch("ll-r", seed=1, scale=4)[0] if of_others else None
    setup: dict[str, Any] = {"step": 0.2, "reject_within": within, "select_logits": others}
    before, before_grad = run("ll-r", logits, state, epoch=3, **setup)
    early, early_grad = run("ll-r", logits, state, epoch=3, correct_after=4, **setup)
    assert torch.equal(early.loss, before.loss)
    assert torch.equal(early_grad, before_grad)
    output, grad = run("ll-r", logits, state, epoch=3, correct_after=3, correct_threshold=0.7, **setup)
    assert output.rejected_BK is not None
    assert before.rejected_BK is not None
    assert torch.equal(output.rejected_BK, before.rejected_BK)  # corrected ones are counted as rejected
    ranked = logits if others is None else others
    sure = output.rejected_BK & (torch.sigmoid(ranked.double()) > 0.7)
    assert 10 < sure.sum() < output.rejected_BK.sum() - 10
    wanted, wanted_grad = by_formula(
        "ll-r", logits, torch.where(sure, POSITIVE, state), output.rejected_BK & ~sure, 3
    )  # fmt: skip
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-6, atol=0)
    assert_close_gradients("ll-r", grad.double(), wanted_grad)


def test_settings_of_correction_and_choice_are_checked():
    with pytest.raises(SettingsError, match=r"correct_after is 3 and loss\.name ll-ct; it is an epoch from 1 on"):
        LossSettings(name="ll-ct", correct_after=3)
    with pytest.raises(SettingsError, match="correct_after is 0"):
        LossSettings(correct_after=0)
    with pytest.raises(SettingsError, match=r"correct_threshold is 1\.0; it is a probability"):
        LossSettings(correct_threshold=1.0)
    unknown: Any = "labels"
    with pytest.raises(SettingsError, match="reject_by is 'labels'; allowed are model, averaged"):
        LossSettings(reject_by=unknown)
    with pytest.raises(SettingsError, match="reject_within is 'labels'; allowed are pool, class, image"):
        LossSettings(reject_within=unknown)


@every_loss
def test_sum_over_a_split_equals_the_whole(name):
    """Where nothing is chosen over the batch a part's loss is its labels' own: the parts of a batch add up to it."""
    if LOSSES[name].over_batch is not None:
        pytest.skip("its term is that of the whole batch")
    logits, state = batch(name)
    rows = slice(0, 5), slice(5, 12)
    nothing_left_out = {"epoch": 1, "divisor": 444, "p_asl": PASLSettings(top_k=0)}
    whole, whole_grad = run(name, logits, state, **nothing_left_out)
    parts = [run(name, logits[part], state[part], **nothing_left_out) for part in rows]
    torch.testing.assert_close(parts[0][0].loss + parts[1][0].loss, whole.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), whole_grad, rtol=1e-6, atol=0)


@every_loss
def test_masked_equals_subset(name):
    """A label's cost is its own: cut out, it is the same. What a loss leaves out, it leaves out of the gradient too."""
    loss = LOSSES[name]
    logits, state = batch(name)
    # A term of the whole batch is zero where the expected positives are what they are expected to be.
    positives = float(torch.sigmoid(logits).sum(1).mean())
    settings = LossSettings(
        name=name, reject_rate_step=0.002, epr=EPRSettings(expected_positives=positives), p_asl=PASLSettings(top_k=0)
    )
    own, epoch = loss.settings_in(settings), Epoch(1, EPOCHS)
    output, grad = run(name, logits, state, epoch=1, divisor=1, epr=settings.epr, p_asl=settings.p_asl)
    recalled = recalled_of(name, logits, state)
    per = logits.shape[1] if loss.divisor == "images" else 1

    cost = per_label_loss(loss, logits.double(), state, None, own, epoch, recalled)
    if name != "role":  # whose two terms of the batch are not zero together
        torch.testing.assert_close(output.loss.double(), cost.sum() * per, rtol=1e-5, atol=0)
    for kind in (POSITIVE, NEGATIVE, UNOBSERVED):
        mask = state == kind
        if not mask.any():
            continue
        # WAN's weight comes of the number of classes, so a cut keeps the classes and takes an image at a time.
        for image in range(len(state)):
            alone = logits[image].double().masked_fill(~mask[image], 1.5)[None]
            labels = state[image].masked_fill(~mask[image], POSITIVE)[None]
            its = None if recalled is None else recalled[image][None]
            subset = per_label_loss(loss, alone, labels, None, own, epoch, its)[0, mask[image]]
            torch.testing.assert_close(subset, cost[image, mask[image]], rtol=1e-12, atol=0)
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
def test_batches_that_lack_a_kind_of_label(name, kinds):
    """No positives, none unobserved, nothing observed at all."""
    if LOSSES[name].needs_all_observed and UNOBSERVED in kinds:
        pytest.skip("it refuses unobserved labels")
    logits, _ = batch(name)
    kinds = torch.tensor(kinds, dtype=torch.int8)
    state = kinds[torch.randint(len(kinds), logits.shape, generator=torch.Generator().manual_seed(1))]
    output, grad = run(name, logits, state)
    assert_as_in_the_papers(name, output, grad, logits, state)


@every_loss
def test_second_backward_equals_the_first(name):
    logits, state = batch(name)
    x = logits.clone().requires_grad_()
    output = partial_label_loss(
        x,
        state,
        settings=LossSettings(name=name, reject_rate_step=0.002),
        epoch=2,
        epochs=EPOCHS,
        divisor=3,
        slots_B=torch.arange(len(x)),
        batch_size=len(x),
        recalled=recalled_of(name, logits, state),
    )
    first, second = (torch.autograd.grad(output.loss * 2, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    if name in CROSS_ENTROPY:
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(output.loss, x, create_graph=True)


@every_loss
@pytest.mark.parametrize(("reject_pool", "within"), [(None, "pool"), (5, "pool"), (5, "class"), (None, "image")])
def test_nothing_waits_for_a_device(name, reject_pool, within):
    """On `meta` tensors, which have no values, anything that asks for one (item, nonzero, a mask as index) raises."""
    logits, state = (values.to("meta") for values in batch(name))
    logits.requires_grad_()
    output = partial_label_loss(
        logits,
        state,
        settings=LossSettings(name=name, reject_rate_step=0.002, reject_pool=reject_pool, reject_within=within),
        epoch=2,
        epochs=EPOCHS,
        divisor=3,
        slots_B=torch.arange(12, device="meta"),
        batch_size=12,
        recalled=recalled_of(name, logits, state),
    )
    output.loss.backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape
    assert (output.rejected_BK is not None) == LOSSES[name].rejects


def test_correction_waits_for_no_device():
    logits, state = (values.to("meta") for values in batch("ll-r"))
    output = partial_label_loss(
        logits,
        state,
        settings=LossSettings(reject_rate_step=0.002, correct_after=2, reject_by="averaged"),
        epoch=2,
        divisor=3,
        slots_B=torch.arange(12, device="meta"),
        batch_size=12,
        select_logits_BK=logits,
    )
    assert output.rejected_BK is not None


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
    (name, kind, {"reject_pool": reject_pool, "reject_of": reject_of, "reject_within": within})
    for name in LOSSES
    for kind in KINDS
    for reject_pool, reject_of, within in (
        (None, "unobserved", "pool"),
        (5, "all", "pool"),
        (4, "unobserved", "pool"),
        (5, "unobserved", "class"),
        (4, "all", "image"),
    )
    if reject_pool is None or LOSSES[name].rejects
] + [("ll-r", kind, {"reject_within": "class", "correct_after": 2, "correct_threshold": 0.3}) for kind in KINDS]


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


def loss_of_worker(name, kind, rejection, slots, world):
    logits, state = crafted(name, kind)
    slots_B = torch.tensor(list(slots), dtype=torch.int64)
    x = logits[slots_B].requires_grad_()
    output = partial_label_loss(
        x,
        state[slots_B],
        settings=LossSettings(name=name, reject_rate_step=0.06, **rejection),
        epoch=3,
        epochs=EPOCHS,
        divisor=logits.numel(),
        slots_B=slots_B,
        batch_size=len(logits),
        world=world,
        recalled=recalled_of(name, x, state[slots_B]),
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
            together = np.concatenate([part[2] for part in mine])[order]
            atol = 1e-12 if exact(choice[0]) else 1e-7 * np.abs(grad).max()
            np.testing.assert_allclose(together, grad, rtol=1e-6, atol=atol, err_msg=str(choice))
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
