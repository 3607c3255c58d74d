"""The classes that P-ASL selective leaves out, by a file of priors."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from torch import sigmoid

from paml.errors import DataError, SettingsError
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import LossSettings, LossState, StateScope, build_loss_state, partial_label_loss
from paml.losses.p_asl import PASLSettings
from paml.losses.prior import write_prior

CLASSES = tuple(f"/m/{number}" for number in range(5))
K, INDEX = len(CLASSES), np.arange(4)


def state_of(path: Path) -> LossState:
    state = build_loss_state(selective(path), StateScope(index=INDEX, classes=CLASSES, epochs=4))
    assert state is not None
    return state


def selective(path: Path, threshold: float = 0.05) -> LossSettings:
    return LossSettings(
        name="p-asl-selective", p_asl=PASLSettings(top_k=0, prior_file=str(path), prior_threshold=threshold)
    )


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_unobserved_labels_of_common_classes_are_left_out_by_mid(ending: str, tmp_path: Path) -> None:
    """The file's order differs from the table's."""
    path = tmp_path / f"prior.{ending}"
    write_prior(str(path), CLASSES[::-1], np.array([0.01, 0.9, 0.04, 0.05, 0.06]))
    loss_state = state_of(path).read(INDEX[:2], torch.empty(0))
    logits = torch.linspace(-2, 2, 2 * K).view(2, K).requires_grad_()
    state = torch.tensor([[UNOBSERVED] * K, [POSITIVE, NEGATIVE, UNOBSERVED, POSITIVE, NEGATIVE]], dtype=torch.int8)
    out = partial_label_loss(logits, state, selective(path), loss_state=loss_state)
    out.loss.backward()
    assert logits.grad is not None
    common = torch.tensor([True, False, False, True, False])
    assert torch.equal(logits.grad == 0, (state == UNOBSERVED) & common)
    assert out.rejected_BK is None or not out.rejected_BK.any()
    # The other labels cost the same as without a prior file.
    every = partial_label_loss(logits.detach(), state, selective(path))
    left_out = logits.detach()[0][common]
    unweighted = (sigmoid(left_out) ** 2 * torch.nn.functional.softplus(left_out)).sum() / 2
    torch.testing.assert_close(every.loss - out.loss.detach(), unweighted)


@pytest.mark.parametrize(
    ("mids", "priors", "message"),
    [
        (CLASSES[:3], [0.1] * 3, r"/m/3, /m/4 .* without a prior"),
        ((*CLASSES, "/m/x"), [0.1] * 6, r"/m/x are not classes"),
        ((*CLASSES, "/m/2"), [0.1] * 6, r"/m/2 appear more than once"),
        (CLASSES, [0.1, 0.2, 7.0, 0.1, 0.1], r"/m/2 is 7\.0; .*\[0, 1\]"),
        (CLASSES, [0.1, 0.2, None, 0.1, 0.1], r"/m/2 is nan"),
    ],
)
def test_a_prior_file_of_other_classes_is_refused(mids, priors, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prior.parquet"
    pyarrow.parquet.write_table(pa.table({"prior": pa.array(priors, pa.float64()), "mid": list(mids)}), path)
    with pytest.raises(DataError, match=message):
        state_of(path)


def test_files_without_priors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prior.csv"
    with pytest.raises(DataError, match=r"no file .*prior\.csv"):
        state_of(path)
    for text in ("name,prior\na,0.1\n", "mid,prior\n/m/0,often\n", ""):
        path.write_text(text)
        with pytest.raises(DataError, match=r"columns mid and prior"):
            state_of(path)


def test_a_run_is_resumed_only_with_the_same_classes(tmp_path: Path) -> None:
    path = tmp_path / "prior.csv"
    states = []
    for first in (0.1, 0.2, 0.01):
        write_prior(str(path), CLASSES, np.array([first, 0.0, 0.0, 0.0, 0.0]))
        states.append(state_of(path))
    states[0].load(states[1].tensors())
    with pytest.raises(SettingsError, match=r"prior\.csv leaves out 0 classes"):
        states[2].load(states[0].tensors())


def test_the_threshold_is_a_fraction() -> None:
    with pytest.raises(SettingsError, match=r"loss\.p_asl\.prior_threshold is 5\.0"):
        PASLSettings(prior_threshold=5.0)
