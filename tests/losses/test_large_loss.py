"""The released code's own outputs, settings and their warnings."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from paml.errors import SettingsError
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import LossSettings, check_reject_rate, partial_label_loss, per_label_loss, reject_rate
from paml.losses.registry import LOSSES
from tests.helpers.shared import shared


@pytest.mark.parametrize("case", range(5))
def test_released_code(case):
    """Everything equal, but for the last label that the released code takes where its float arithmetic rounds k up.

    That code modifies every label whose float32 loss reaches the k-th; no losses tie at the threshold in these cases,
    so that the sets are compared label by label.
    """
    golden = np.load(shared("golden", "large_loss_released_code.npz"))
    scheme, rate, logits, positive, loss, modified, grad = (
        golden[f"{case}_{field}"] for field in ("scheme", "rate", "logits", "positive", "loss", "modified", "grad")
    )
    B, K = logits.shape
    x = torch.from_numpy(logits).requires_grad_()
    state = torch.where(torch.from_numpy(positive), POSITIVE, UNOBSERVED).to(torch.int8)
    settings = LossSettings(name=str(scheme).lower(), reject_rate_step=float(rate), reject_of="all")
    output = partial_label_loss(
        x, state, settings=settings, epoch=2, divisor=B * K, slots_B=torch.arange(B), batch_size=B
    )
    output.loss.backward()
    assert output.rejected_BK is not None
    assert x.grad is not None
    ours = output.rejected_BK.numpy()
    ours_grad = x.grad.numpy()

    k = math.ceil(Fraction(str(float(rate))) * B * K)
    assert ours.sum() == k
    assert not (ours & ~modified).any()
    extra = modified & ~ours
    assert extra.sum() == (1 if case in (2, 4) else 0)
    # Where it took one more, that is the next in order.
    candidates = logits[~positive & ~ours]
    assert (logits[extra] == candidates.max()).all()
    np.testing.assert_allclose(ours_grad[~extra] * B * K, grad[~extra] * B * K, atol=3e-7)
    # Its loss leaves the extra label out (LL-R, both cases); ours trains it as a negative.
    extra_cost = np.logaddexp(0, logits[extra].astype(np.float64)).sum() / (B * K)
    assert output.loss.item() - extra_cost == pytest.approx(float(loss), rel=1e-6)
    assert not grad[extra].any()


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("an", [0.0, 0.1, 0.2, 0.3]),
        ("iu", [0.0, 0.1, None, None]),
        ("ll-r", [0.0, 0.1, 0.2, None]),
        ("ll-ct", [0.0, 0.1, 0.2, "positive"]),
        ("ll-cp", [0.0, 0.1, 0.2, "positive"]),
    ],
)
def test_readable_form_by_hand(name, cost):
    """A positive, a negative, an unobserved label, and an unobserved one that is rejected."""
    logits = torch.tensor([[0.5, -1.0, -2.0, 3.0]], dtype=torch.float64)
    state = torch.tensor([[POSITIVE, NEGATIVE, UNOBSERVED, UNOBSERVED]], dtype=torch.int8)
    rejected = torch.tensor([[False, False, False, True]]) if LOSSES[name].rejects else None
    p = [1 / (1 + math.exp(-x)) for x in logits[0].tolist()]
    wanted = [-math.log(p[0]), *(-math.log(1 - q) for q in p[1:])]
    for place, kind in enumerate(cost):
        if kind is None:
            wanted[place] = 0.0
        elif kind == "positive":
            wanted[place] = -math.log(p[place])
    got = per_label_loss(LOSSES[name], logits, state, rejected)[0].tolist()
    assert got == pytest.approx(wanted, rel=1e-12)


def test_full_refuses_unobserved_labels():
    state = torch.tensor([[POSITIVE, UNOBSERVED]], dtype=torch.int8)
    with pytest.raises(ValueError, match=r"1 of 2 in this batch are not.*loss\.name: an"):
        partial_label_loss(
            torch.zeros(1, 2),
            state,
            settings=LossSettings(name="full"),
            epoch=1,
            divisor=2,
            slots_B=torch.arange(1),
            batch_size=1,
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "llr"}, "loss.name is 'llr'; allowed are an, iu, full, ll-r, ll-ct, ll-cp, wan,"),
        ({"reject_rate_step": 1.5}, "loss.reject_rate_step is 1.5.*0.005"),
        ({"reject_rate_step": float("nan")}, "loss.reject_rate_step is nan"),
        ({"reject_of": "observed"}, "loss.reject_of is 'observed'; allowed are unobserved, all"),
        ({"reject_pool": 0}, "loss.reject_pool is 0"),
    ],
)
def test_settings_say_what_is_allowed(values, message):
    with pytest.raises(SettingsError, match=message):
        LossSettings(**values)


def test_rate_is_the_decimal_that_was_written():
    assert reject_rate(LossSettings(reject_rate_step=0.001), 11) == Fraction(1, 100)
    assert reject_rate(LossSettings(reject_rate_step=1e-4), 2) == Fraction(1, 10_000)
    with pytest.raises(ValueError, match="epoch is 0"):
        reject_rate(LossSettings(), 0)


def test_warning_where_too_much_is_rejected():
    """At 5,000 classes the small sets' step rejects 225 labels an image by epoch 10; a step of about 1e-4 fits."""
    expected = {"epochs": 10, "labels_per_image": 5000, "unobserved_positives_per_image": 5.0}
    text = check_reject_rate(LossSettings(reject_rate_step=0.005), **expected)
    assert text is not None
    assert "rejects 225 labels an image by epoch 10" in text
    assert "A step of 0.00022 or less fits" in text
    assert check_reject_rate(LossSettings(reject_rate_step=0.00022), **expected) is None
    assert check_reject_rate(LossSettings(reject_rate_step=0.00023), **expected) is not None
    assert check_reject_rate(LossSettings(name="an", reject_rate_step=0.5), **expected) is None
    # LL-Cp's corrections add up to the same.
    assert check_reject_rate(LossSettings(name="ll-cp", reject_rate_step=0.00022), **expected) is None
    assert check_reject_rate(LossSettings(name="ll-cp", reject_rate_step=0.00023), **expected) is not None
