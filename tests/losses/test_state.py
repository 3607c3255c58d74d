"""The states of losses: the label estimates of ROLE, the pseudo-labels of EM + APL."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import log, sigmoid, where

from paml.errors import SettingsError
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import LOSSES, LossSettings, LossState, StateScope, build_loss_state, partial_label_loss
from tests.helpers.ranks import run_on_ranks

N, K, S = 11, 5, 4
INDEX = np.array([3, 4, 7, 8, 9, 12, 20, 21, 22, 30, 31])
CLASSES = tuple(f"/m/{number}" for number in range(K))
RATE, EXPECTED = 0.01, 1.3


def scope(world=None, epochs=4) -> StateScope:
    return StateScope(index=INDEX, classes=CLASSES, epochs=epochs, seed=5, world=world)


def settings_of(name: str) -> LossSettings:
    return LossSettings(name=name, expected_positives=EXPECTED, warmup_epochs=0)


def state_of(name: str, **changes) -> LossState:
    state = build_loss_state(settings_of(name), scope(**changes))
    assert state is not None
    return state


def labels() -> torch.Tensor:
    draws = torch.rand(N, K, generator=torch.Generator().manual_seed(1))
    return where(draws < 0.2, POSITIVE, where(draws < 0.3, NEGATIVE, UNOBSERVED)).to(torch.int8)


def batches(epochs: int) -> list[tuple[np.ndarray, torch.Tensor]]:
    """(rows, logits of all images) of each step: every image once per epoch, the last batch short by one."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(epochs):
        order = torch.randperm(N, generator=generator).numpy()
        found += [(order[first : first + S], torch.randn(N, K, generator=generator)) for first in range(0, N, S)]
    return found


def update(loss_state: LossState, rows: np.ndarray, logits: torch.Tensor, slots: list[int] | None = None) -> None:
    """A step in which this worker holds `slots` of the batch; None for all."""
    slots_B = torch.arange(len(rows)) if slots is None else torch.tensor([s for s in slots if s < len(rows)]).long()
    own = rows[slots_B.numpy()]
    loss_state.update(INDEX[own], slots_B, S, logits[own], labels()[own], RATE)


def train(loss_state: LossState, epochs: int, slots: list[int] | None = None, first: int = 0) -> None:
    for step, (rows, logits) in enumerate(batches(epochs)):
        if step >= first:
            update(loss_state, rows, logits, slots)
            if step % 3 == 2:
                loss_state.end_epoch(step // 3 + 1)


def test_most_losses_have_no_state() -> None:
    with_state = {name for name in LOSSES if build_loss_state(LossSettings(name=name), scope()) is not None}
    assert with_state == {"role", "em-apl"}


def test_a_loss_without_its_state_is_refused() -> None:
    with pytest.raises(ValueError, match="'role' needs"):
        partial_label_loss(torch.zeros(1, K), torch.zeros(1, K, dtype=torch.int8), settings_of("role"))


# ROLE


def test_estimates_start_as_the_authors_do() -> None:
    estimate = state_of("role").read(INDEX, labels())
    assert estimate is not None
    p = sigmoid(estimate)
    torch.testing.assert_close(p[labels() == POSITIVE], torch.tensor(0.995).expand(int((labels() == POSITIVE).sum())))
    torch.testing.assert_close(p[labels() == NEGATIVE], torch.tensor(0.005).expand(int((labels() == NEGATIVE).sum())))
    unknown = p[labels() == UNOBSERVED]
    assert 0.4 <= unknown.min() < 0.45 < 0.55 < unknown.max() <= 0.6


def test_estimates_are_those_of_adam_over_all_images() -> None:
    """Although only the batch's rows are touched: seven epochs of torch's Adam on all rows, the loss by autograd."""
    loss_state = state_of("role")
    start = loss_state.read(INDEX, labels())
    assert start is not None
    dense = start.double().clone().requires_grad_()
    adam = torch.optim.Adam([dense], lr=10 * RATE, eps=1e-14)
    for rows, logits in batches(7):
        now = loss_state.read(INDEX[rows], labels()[rows])
        torch.testing.assert_close(now, dense.detach()[rows].float(), rtol=1e-4, atol=2e-5)
        update(loss_state, rows, logits)

        e, p, state = sigmoid(dense[rows]), sigmoid(logits[rows].double()), labels()[rows]
        observed = where(state == POSITIVE, -log(e), where(state == NEGATIVE, -log(1 - e), 0))
        from_classifier = -p * log(e) - (1 - p) * log(1 - e)
        surplus = (e.sum(1).mean() - EXPECTED) / K
        loss = ((observed + from_classifier).sum() / (S * K) + len(rows) / S * surplus**2) / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert (dense.detach() - start).abs().max() > 0.5


# EM + APL


def test_lowest_scores_of_each_class_become_pseudo_labels() -> None:
    """Against a loop over classes, in a run of four epochs that labels after the first three."""
    loss_state, state = state_of("em-apl"), labels()
    wanted = np.full((N, K), np.nan)
    steps = batches(4)
    for epoch in (1, 2, 3, 4):
        scores = np.full((N, K), np.nan)
        for rows, logits in steps[3 * epoch - 3 : 3 * epoch]:
            update(loss_state, rows, logits)
            scores[rows] = logits[rows].half().float()
        before = loss_state.read(INDEX, state)
        loss_state.end_epoch(epoch)
        for cls in range(K) if epoch < 4 else ():
            unobserved = [row for row in range(N) if state[row, cls] == UNOBSERVED]
            free = [row for row in unobserved if np.isnan(wanted[row, cls])]
            for row in sorted(free, key=lambda row: scores[row, cls])[: int(0.9 * len(unobserved) / 3 + 1e-9)]:
                wanted[row, cls] = 1 / (1 + np.exp(-scores[row, cls]))
        found = loss_state.read(INDEX, state)
        assert before is not None
        assert found is not None
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3)
        assert (found.isnan().sum() < before.isnan().sum()) == (epoch < 4)
    assert np.isfinite(wanted).sum() > 15


def test_no_label_has_a_pseudo_label_during_the_warmup() -> None:
    loss_state = build_loss_state(LossSettings(name="em-apl", warmup_epochs=2), scope())
    assert loss_state is not None
    train(loss_state, 2)
    pseudo_labels = loss_state.read(INDEX, labels())
    assert pseudo_labels is not None
    assert pseudo_labels.isnan().all()


def test_equal_scores_and_images_that_were_not_seen() -> None:
    """Ties are broken by the manifest; images not seen in the epoch are neither counted nor chosen."""
    loss_state = state_of("em-apl", epochs=2)  # one epoch labels: 0.9 of what was seen
    state = torch.full((4, K), UNOBSERVED, dtype=torch.int8)
    loss_state.update(INDEX[[9, 2, 5, 0]], torch.arange(4), S, torch.full((4, K), -90000.0), state, RATE)
    loss_state.end_epoch(1)
    pseudo_labels = loss_state.read(INDEX, labels())
    assert pseudo_labels is not None
    assert np.flatnonzero(~pseudo_labels[:, 0].isnan()).tolist() == [0, 2, 5]
    assert (pseudo_labels[[0, 2, 5]] == 0).all()


# Both


@pytest.mark.parametrize("name", ["role", "em-apl"])
def test_a_checkpoint_has_the_whole_state(name: str) -> None:
    whole, begun, resumed = (state_of(name) for _ in range(3))
    train(whole, 3)
    for rows, logits in batches(3)[:3]:
        update(begun, rows, logits)
    begun.end_epoch(1)
    update(begun, *batches(3)[3])
    resumed.load({key: value.clone() for key, value in begun.tensors().items()})
    train(resumed, 3, first=4)
    assert_equal(resumed.tensors(), whole.tensors())


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=0, equal_nan=True)


SHARES = {2: [[0, 1], [2, 3]], 3: [[0], [], [1, 2, 3]]}


def worker(rank: int, shares: list[list[int]]) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for name in ("role", "em-apl"):
        loss_state = state_of(name, world=dist.group.WORLD)
        train(loss_state, 3, shares[rank])
        found[name] = {key: value.numpy() for key, value in loss_state.tensors().items()}
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_states_of_all_workers_equal_that_of_one(ranks: int) -> None:
    results = run_on_ranks(worker, ranks, SHARES[ranks])
    for name in ("role", "em-apl"):
        alone = state_of(name)
        train(alone, 3)
        for result in results:
            assert_equal({key: torch.from_numpy(value) for key, value in result[name].items()}, alone.tensors())


@pytest.mark.parametrize(("name", "needed"), [("role", 540), ("em-apl", 180)])
def test_open_images_is_refused_before_anything_is_allocated(name: str, needed: int) -> None:
    index = np.broadcast_to(np.int64(0), 9_000_000)
    classes = tuple(f"/m/{number}" for number in range(5000))
    message = rf"{name} .* 9,000,000 images x 5,000 classes, {needed} GB .*loss\.max_state_gb allows 4"
    with pytest.raises(SettingsError, match=message):
        build_loss_state(LossSettings(name=name), StateScope(index=index, classes=classes, epochs=4))
