"""LL-R, LL-Ct and LL-Cp against the outputs of the released code; shared settings and their warnings."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from paml.errors import DataError, SettingsError
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import (
    LOSSES,
    BatchContext,
    Labels,
    LossSettings,
    check_reject_rate,
    partial_label_loss,
    per_label_loss,
    reject_rate,
)
from tests.helpers.shared import shared


@pytest.mark.parametrize("case", range(5))
def test_released_code(case):
    """Equal except for one more label where the released code's float arithmetic rounds k up.

    That code modifies every label whose float32 loss reaches the k-th. No losses tie at the threshold in these cases,
    so the sets are compared label by label.
    """
    golden = np.load(shared("golden", "large_loss_released_code.npz"))
    scheme, rate, logits, positive, loss, modified, grad = (
        golden[f"{case}_{field}"] for field in ("scheme", "rate", "logits", "positive", "loss", "modified", "grad")
    )
    B, K = logits.shape
    x = torch.from_numpy(logits).requires_grad_()
    state = torch.where(torch.from_numpy(positive), POSITIVE, UNOBSERVED).to(torch.int8)
    settings = LossSettings(name=str(scheme).lower(), reject_rate_step=float(rate), reject_of="all")
    output = partial_label_loss(x, state, settings, BatchContext(epoch=2))
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
    # The additional label is the next in order.
    candidates = logits[~positive & ~ours]
    assert (logits[extra] == candidates.max()).all()
    np.testing.assert_allclose(ours_grad[~extra] * B * K, grad[~extra] * B * K, atol=3e-7)
    # The released code leaves the additional label out (LL-R, both cases); paml trains it as a negative.
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
    expected = [-math.log(p[0]), *(-math.log(1 - q) for q in p[1:])]
    for position, kind in enumerate(cost):
        if kind is None:
            expected[position] = 0.0
        elif kind == "positive":
            expected[position] = -math.log(p[position])
    got = per_label_loss(LOSSES[name], logits, Labels(state, rejected))[0].tolist()
    assert got == pytest.approx(expected, rel=1e-12)


def test_full_refuses_unobserved_labels():
    state = torch.tensor([[POSITIVE, UNOBSERVED]], dtype=torch.int8)
    with pytest.raises(DataError, match=r"1 of 2 .*loss\.name: an"):
        partial_label_loss(torch.zeros(1, 2), state, LossSettings(name="full"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "llr"}, "loss.name is 'llr'.* an, iu, full, ll-r, ll-ct, ll-cp, wan,"),
        ({"reject_rate_step": 1.5}, "loss.reject_rate_step is 1.5.*0.005"),
        ({"reject_rate_step": float("nan")}, "loss.reject_rate_step is nan"),
        ({"reject_of": "observed"}, "loss.reject_of is 'observed'"),
        ({"reject_by": "labels"}, "loss.reject_by is 'labels'"),
        ({"reject_pool": 0}, "loss.reject_pool is 0"),
        ({"warmup_epochs": -1}, "loss.warmup_epochs is -1"),
        ({"expected_positives": math.nan}, "loss.expected_positives is nan"),
        ({"max_state_gb": 0.0}, "loss.max_state_gb is 0.0"),
    ],
)
def test_invalid_settings_are_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        LossSettings(**values)


def test_rate_is_the_decimal_that_is_written():
    assert reject_rate(LossSettings(reject_rate_step=0.001), 11) == Fraction(1, 100)
    assert reject_rate(LossSettings(reject_rate_step=1e-4), 2) == Fraction(1, 10_000)
    with pytest.raises(ValueError, match="epoch is 0"):
        reject_rate(LossSettings(), 0)


def test_warning_about_a_rate_that_is_too_high():
    """At 5,000 classes the small sets' step rejects 225 labels an image in epoch 10; about 1e-4 is right."""
    expected = {"epochs": 10, "labels_per_image": 5000, "unobserved_positives_per_image": 5.0}
    text = check_reject_rate(LossSettings(reject_rate_step=0.005), **expected)
    assert text is not None
    assert "225 labels per image in epoch 10" in text
    assert "0.00022 or less" in text
    assert check_reject_rate(LossSettings(reject_rate_step=0.00022), **expected) is None
    assert check_reject_rate(LossSettings(reject_rate_step=0.00023), **expected) is not None
    assert check_reject_rate(LossSettings(name="an", reject_rate_step=0.5), **expected) is None
    # LL-Cp's corrections add up to the same number.
    assert check_reject_rate(LossSettings(name="ll-cp", reject_rate_step=0.00022), **expected) is None
    assert check_reject_rate(LossSettings(name="ll-cp", reject_rate_step=0.00023), **expected) is not None
