"""Details of single losses that the contract does not cover: schedules, divisors, terms of the batch, settings."""

import math

import pytest
import torch
import torch.distributed as dist

from paml.errors import SettingsError
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import LOSSES, BatchContext, LossSettings, check_reject_rate, partial_label_loss
from paml.losses.an_ls import ANLSSettings
from paml.losses.asl import ASLSettings
from paml.losses.curriculum import CurriculumSettings
from paml.losses.em import EMSettings
from paml.losses.em_apl import EMAPLSettings
from paml.losses.gr import GRSettings
from paml.losses.hill import HillSettings
from paml.losses.p_asl import PASLSettings
from paml.losses.role import RoleSettings
from paml.losses.splc import SPLCSettings
from paml.losses.wan import WANSettings
from tests.helpers.ranks import run_on_ranks
from tests.losses.reference import loss_state_of

MEAN_OVER_IMAGES = ["asl", "p-asl-ignore", "p-asl-negative", "p-asl-selective", "hill", "splc"]


def loss_of(logits, state, *, epoch=3, epochs: int | None = 8, batch_size=None, slots=None, world=None, **settings):
    """(loss, rejected labels, gradient). A full global batch has `batch_size` images; these may be fewer."""
    x = torch.tensor(logits).requires_grad_()
    output = partial_label_loss(
        x,
        torch.tensor(state, dtype=torch.int8),
        LossSettings(**{"reject_rate_step": 0.002} | settings),
        BatchContext(
            epoch=epoch,
            num_epochs=epochs,
            slots_B=None if slots is None else torch.tensor(slots, dtype=torch.int64),
            batch_size=batch_size,
            world=world,
        ),
        loss_state=loss_state_of(settings["name"], x, torch.tensor(state)),
    )
    output.loss.backward()
    assert x.grad is not None
    return output.loss.item(), output.rejected_BK, x.grad


ROW, LABELS = [0.5, -1.0, -2.0, 3.0], [POSITIVE, NEGATIVE, UNOBSERVED, UNOBSERVED]


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("curriculum", (0.47407698 + 0.31326169 + 0.04858735) / 4),
        ("wan", (0.47407698 + (0.31326169 + 0.12692801 + 3.04858735) / 3) / 4),
        ("epr", (0.47407698 + 0.31326169) / 4 + ((0.62245933 + 0.26894142 + 0.11920292 + 0.95257413 - 2.9) / 4) ** 2),
        ("em", (0.47407698 + 0.31326169 - 0.1 * (0.36533385 + 0.19086496)) / 4),
        (
            "hill",
            0.62245933**2 * 0.97407698
            + 1.23105858 * 0.26894142**2
            + 1.38079708 * 0.11920292**2
            + 0.54742587 * 0.95257413**2,
        ),
        ("splc", 0.62245933**2 * 0.97407698 + 0.26894142**2 * 0.31326169 + 0.11920292**2 * 0.12692801 + 1.0928e-4),
    ],
)
def test_values_computed_by_hand(name, by_hand):
    """One image, four classes: a positive, a negative, an unlikely unobserved label and a likely one."""
    assert loss_of([ROW], [LABELS], name=name)[0] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("name", list(LOSSES))
def test_an_image_counts_the_same_in_a_short_last_batch(name):
    """Three images in a batch of twelve cost a quarter of twelve such images."""
    labels = [NEGATIVE if label == UNOBSERVED and LOSSES[name].needs_all_observed else label for label in LABELS]
    settings = {"name": name, "epoch": 1, "p_asl": PASLSettings(top_k=0)}
    short, _, short_grad = loss_of([ROW] * 3, [labels] * 3, batch_size=12, **settings)
    full, _, full_grad = loss_of([ROW] * 12, [labels] * 12, **settings)
    assert short == pytest.approx(full / 4, rel=1e-6)
    torch.testing.assert_close(short_grad, full_grad[:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", list(LOSSES))
def test_divisor(name):
    """Sums in the papers are means over images here; the others are means over labels, independent of the classes."""
    labels = [NEGATIVE if label == UNOBSERVED and LOSSES[name].needs_all_observed else label for label in LABELS]
    settings = {
        "name": name,
        "epoch": 1,
        "p_asl": PASLSettings(top_k=0),
        "wan": WANSettings(negative_weight=0.5),
        "expected_positives": 1.96317780,  # as many as there are: the term of the batch is 0
    }
    once, _, _ = loss_of([ROW] * 2, [labels] * 2, **settings)
    settings["expected_positives"] = 2 * 1.96317780
    twice, _, _ = loss_of([ROW * 2] * 2, [labels * 2] * 2, **settings)
    grows = 2 if name in MEAN_OVER_IMAGES else 1
    assert (LOSSES[name].divisor == "images") == (name in MEAN_OVER_IMAGES)
    assert twice == pytest.approx(grows * once, rel=1e-5)


def epr_worker(rank, shares):
    return [epr_of(share[rank], dist.group.WORLD) for share in shares]


def epr_of(slots, world):
    logits = torch.linspace(-4, 4, 60).view(10, 6)
    state = torch.full((10, 6), UNOBSERVED)
    state[:, 2] = POSITIVE
    loss, _, grad = loss_of(
        logits[slots].tolist() if slots else torch.zeros(0, 6).numpy(),
        state[slots].tolist() if slots else torch.zeros(0, 6).numpy(),
        name="epr",
        expected_positives=1.5,
        batch_size=16,
        slots=slots,
        world=world,
    )
    return loss, grad.numpy()


@pytest.mark.parametrize("ranks", [2, 3])
def test_expected_positives_are_those_of_the_global_batch(ranks):
    """A last batch of 10 images in 16 slots: uneven shares, and workers without images."""
    empty = [[] for _ in range(ranks - 1)]
    shares = [[list(range(10)), *empty], [*empty, list(range(10))], [[0], *empty[:-1], list(range(1, 10))]]
    expected, expected_grad = epr_of(list(range(10)), None)
    results = run_on_ranks(epr_worker, ranks, shares)
    for case, share in enumerate(shares):
        assert sum(result[case][0] for result in results) == pytest.approx(expected, rel=1e-6)
        for rank, slots in enumerate(share):
            assert results[rank][case][1] == pytest.approx(expected_grad[slots], rel=1e-5, abs=1e-9)


def test_splc_corrects_after_its_warmup_and_reports_it():
    logits = [[0.3, 0.5, 3.0, 3.0, 3.0]]
    state = [[UNOBSERVED, UNOBSERVED, UNOBSERVED, NEGATIVE, POSITIVE]]
    assert loss_of(logits, state, name="splc", epoch=1)[1] is None
    rejected, grad = loss_of(logits, state, name="splc", epoch=2)[1:]
    assert rejected is not None
    assert rejected.tolist() == [[False, True, True, False, False]]  # sigmoid(0.3) is 0.57, sigmoid(0.5) 0.62
    assert (grad[0] < 0).tolist() == [False, True, True, False, True]
    later = loss_of(logits, state, name="splc", epoch=2, warmup_epochs=4)
    assert later[1] is None
    stricter = loss_of(logits, state, name="splc", splc=SPLCSettings(threshold=0.9))[1]
    assert stricter is not None
    assert stricter.tolist() == [[False, False, True, False, False]]


def test_curriculum_trains_confident_labels_by_their_sign():
    logits = [[2.5, 1.5, -1.5, -2.5, -2.5, 2.5]]
    state = [[UNOBSERVED, UNOBSERVED, UNOBSERVED, UNOBSERVED, POSITIVE, NEGATIVE]]
    _, rejected, grad = loss_of(logits, state, name="curriculum", epoch=1)
    assert rejected is None
    assert grad.sign().tolist() == [[0, 0, 0, 0, -1, 1]]
    _, rejected, grad = loss_of(logits, state, name="curriculum", epoch=2)
    assert rejected is not None
    assert rejected.tolist() == [[True, False, False, False, False, False]]
    assert grad.sign().tolist() == [[-1, 0, 0, 1, -1, 1]]
    lower = loss_of(logits, state, name="curriculum", curriculum=CurriculumSettings(threshold=1.0))[2]
    assert lower.sign().tolist() == [[-1, -1, 1, 1, -1, 1]]


def test_selective_leaves_out_the_most_likely_labels_of_the_whole_batch():
    """Two images and top_k = 1: both rejected labels are in the image with the high logits."""
    logits = [[5.0, 4.0, 3.0, -2.0], [1.0, 0.0, -1.0, -3.0]]
    state = [[NEGATIVE, UNOBSERVED, UNOBSERVED, POSITIVE], [UNOBSERVED, UNOBSERVED, UNOBSERVED, POSITIVE]]
    _, rejected, grad = loss_of(logits, state, name="p-asl-selective", epoch=1, p_asl=PASLSettings(top_k=1))
    assert rejected is not None
    assert rejected.tolist() == [[False, True, True, False], [False, False, False, False]]
    assert (grad == 0).tolist() == rejected.tolist()
    _, rejected, _ = loss_of(logits, state, name="p-asl-selective", epoch=1, p_asl=PASLSettings(top_k=1), reject_pool=1)
    assert rejected is not None
    assert rejected.tolist() == [[False, True, False, False], [True, False, False, False]]


def test_entropy_of_unobserved_labels_makes_the_loss_negative():
    loss, _, grad = loss_of([[0.0, 2.0, -2.0]], [[UNOBSERVED] * 3], name="em")
    assert loss < 0
    assert grad[0, 0] == 0
    assert grad[0, 1] > 0 > grad[0, 2]  # towards p = 1/2


def test_schedule_of_gr():
    """It moves over the run's epochs and stays at its end."""

    def loss_in(epoch: int, epochs: int | None = 8) -> float:
        return loss_of([[0.5, 2.0]], [[UNOBSERVED] * 2], name="gr", epoch=epoch, epochs=epochs)[0]

    assert len({loss_in(epoch) for epoch in range(1, 9)}) == 8
    assert loss_in(12) == loss_in(10)
    with pytest.raises(ValueError, match="num_epochs"):
        loss_in(1, epochs=None)


@pytest.mark.parametrize("reject_of", ["all", "unobserved"])
def test_k_of_a_short_last_batch_counts_the_images_present(reject_of):
    """Two images of 4 classes in a batch of 16: a rate of 1/4 of all labels is 2; top_k = 1 rejects 2 labels."""
    logits = [[5.0, 4.0, 3.0, -2.0], [1.0, 0.0, -1.0, -3.0]]
    state = [[UNOBSERVED] * 4] * 2
    settings = {"name": "ll-r", "reject_rate_step": 0.25, "reject_of": reject_of}
    rejected = loss_of(logits, state, epoch=2, batch_size=16, slots=[3, 9], **settings)[1]
    assert rejected is not None
    assert rejected.tolist() == [[True, True, False, False], [False] * 4]
    rejected = loss_of(logits, state, batch_size=16, name="p-asl-selective", p_asl=PASLSettings(top_k=1))[1]
    assert rejected is not None
    assert rejected.sum() == 2


def test_losses_without_a_reject_rate_have_no_warning():
    for name in ("splc", "p-asl-selective", "curriculum"):
        settings = LossSettings(name=name, reject_rate_step=0.5)
        assert check_reject_rate(settings, epochs=9, labels_per_image=9, unobserved_positives_per_image=0.1) is None


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (WANSettings, {"negative_weight": -1.0}, r"loss\.wan\.negative_weight is -1\.0"),
        (ANLSSettings, {"smoothing": 0.5}, r"loss\.an_ls\.smoothing is 0\.5"),
        (ASLSettings, {"gamma_negative": -4.0}, r"loss\.asl\.gamma_negative is -4\.0"),
        (ASLSettings, {"clip": 1.0}, r"loss\.asl\.clip is 1\.0"),
        (PASLSettings, {"gamma_unobserved": math.inf}, r"loss\.p_asl\.gamma_unobserved is inf"),
        (PASLSettings, {"top_k": -1}, r"loss\.p_asl\.top_k is -1"),
        (EMSettings, {"alpha": -0.1}, r"loss\.em\.alpha is -0\.1"),
        (HillSettings, {"lambda_": 0.5}, r"loss\.hill\.lambda_ is 0\.5"),
        (SPLCSettings, {"threshold": 60.0}, r"loss\.splc\.threshold is 60\.0"),
        (GRSettings, {"q2": 0.0}, r"loss\.gr\.q2 is 0\.0"),
        (RoleSettings, {"lr_multiplier": -1.0}, r"loss\.role\.lr_multiplier is -1\.0"),
        (EMAPLSettings, {"beta": math.inf}, r"loss\.em_apl\.beta is inf"),
        (EMAPLSettings, {"pseudo_label_fraction": 90.0}, r"loss\.em_apl\.pseudo_label_fraction is 90\.0"),
        (CurriculumSettings, {"threshold": -2.0}, r"loss\.curriculum\.threshold is -2\.0"),
    ],
)
def test_invalid_settings_are_refused(kind, values, message):
    with pytest.raises(SettingsError, match=message):
        kind(**values)
