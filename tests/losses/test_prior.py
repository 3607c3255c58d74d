"""The half of P-ASL selective that goes by classes: which are common is read from a file of priors, by MID."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from torch import sigmoid

from paml.errors import DataError, SettingsError
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import LossSettings, Scope, build_memory, partial_label_loss
from paml.losses.p_asl import PASLSettings
from paml.losses.prior import write_prior

CLASSES = tuple(f"/m/{number}" for number in range(5))
K, INDEX = len(CLASSES), np.arange(4)


def scope() -> Scope:
    return Scope(index=INDEX, classes=CLASSES, batch_size=2, epochs=4)


def selective(path: Path, threshold: float = 0.05) -> LossSettings:
    return LossSettings(
        name="p-asl-selective", p_asl=PASLSettings(top_k=0, prior_file=str(path), prior_threshold=threshold)
    )


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_unobserved_labels_of_common_classes_are_left_out_by_mid(ending: str, tmp_path: Path) -> None:
    """The file's order is another than the table's."""
    path = tmp_path / f"prior.{ending}"
    write_prior(str(path), CLASSES[::-1], np.array([0.01, 0.9, 0.04, 0.05, 0.06]))
    memory = build_memory(selective(path), scope())
    assert memory is not None
    logits = torch.linspace(-2, 2, 2 * K).view(2, K).requires_grad_()
    state = torch.tensor([[UNOBSERVED] * K, [POSITIVE, NEGATIVE, UNOBSERVED, POSITIVE, NEGATIVE]], dtype=torch.int8)
    rest = {"epoch": 1, "divisor": 2 * K, "slots_B": torch.arange(2), "batch_size": 2}
    out = partial_label_loss(logits, state, settings=selective(path), recalled=memory.recall(INDEX[:2], state), **rest)
    out.loss.backward()
    assert logits.grad is not None
    common = torch.tensor([True, False, False, True, False])
    assert torch.equal(logits.grad == 0, (state == UNOBSERVED) & common)
    assert out.rejected_BK is None or not out.rejected_BK.any()
    # The same labels as observed negatives of no weight: what the others cost is unchanged.
    every = partial_label_loss(logits.detach(), state, settings=selective(path), **rest)
    left_out = logits.detach()[0][common]
    unweighted = (sigmoid(left_out) ** 2 * torch.nn.functional.softplus(left_out)).sum() / 2
    torch.testing.assert_close(every.loss - out.loss.detach(), unweighted)


@pytest.mark.parametrize(
    ("mids", "priors", "message"),
    [
        (CLASSES[:3], [0.1] * 3, r"/m/3, /m/4 are classes of the label table and have no prior there"),
        ((*CLASSES, "/m/x"), [0.1] * 6, r"/m/x are not among the classes of the label table"),
        ((*CLASSES, "/m/2"), [0.1] * 6, r"/m/2 stand there more than once"),
        (CLASSES, [0.1, 0.2, 7.0, 0.1, 0.1], r"the prior of /m/2 is 7\.0; it must lie in \[0, 1\]"),
        (CLASSES, [0.1, 0.2, None, 0.1, 0.1], r"the prior of /m/2 is nan"),
    ],
)
def test_a_prior_file_of_other_classes_is_refused(mids, priors, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prior.parquet"
    pyarrow.parquet.write_table(pa.table({"prior": pa.array(priors, pa.float64()), "mid": list(mids)}), path)
    with pytest.raises(DataError, match=message):
        build_memory(selective(path), scope())


def test_a_prior_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prior.csv"
    with pytest.raises(DataError, match=r"prior\.csv is not there.*`python -m paml\.training\.prior"):
        build_memory(selective(path), scope())
    for text in ("name,prior\na,0.1\n", "mid,prior\n/m/0,often\n", ""):
        path.write_text(text)
        with pytest.raises(DataError, match=r"it is to be CSV or \.parquet with the columns mid and prior"):
            build_memory(selective(path), scope())


def test_a_run_goes_on_with_the_same_common_classes_alone(tmp_path: Path) -> None:
    path = tmp_path / "prior.csv"
    memories = []
    for first in (0.1, 0.2, 0.01):
        write_prior(str(path), CLASSES, np.array([first, 0.0, 0.0, 0.0, 0.0]))
        memory = build_memory(selective(path), scope())
        assert memory is not None
        memories.append(memory)
    memories[0].load(memories[1].tensors())
    with pytest.raises(SettingsError, match="0 classes are left out, other ones than the 1 of the run's checkpoint"):
        memories[2].load(memories[0].tensors())


def test_the_threshold_is_a_share() -> None:
    with pytest.raises(SettingsError, match=r"loss\.p_asl\.prior_threshold is 5\.0; it is a share of images"):
        PASLSettings(prior_threshold=5.0)
