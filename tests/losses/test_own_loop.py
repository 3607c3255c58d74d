"""The losses in your own training loop: plain torch, dense states."""

import numpy as np
import pytest
import torch
from torch import nn

from paml.errors import SettingsError
from paml.labels.states import POSITIVE, UNOBSERVED
from paml.losses import LOSSES, LargeLoss, make_loss
from paml.metrics import average_precision
from paml.models import boost_lu

K, SIZE = 5, 8
MODES = ("reject", "correct-temporary", "correct-permanent")


def problem(images: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(images, true states, states with 40 % of the labels observed): class k is a bright pixel of channel k."""
    generator = torch.Generator().manual_seed(seed)
    truth = (torch.rand(images, K, generator=generator) < 0.3).to(torch.int8)
    x = torch.randn(images, K, SIZE, SIZE, generator=generator)
    position = torch.randint(SIZE * SIZE, (images, K), generator=generator)
    x.view(images, K, -1).scatter_add_(2, position[..., None], 20.0 * truth[..., None])
    hidden = torch.rand(images, K, generator=generator) < 0.6
    return x, truth, torch.where(hidden, UNOBSERVED, truth).to(torch.int8)


def own_loop(images, states, mode, epochs=10):
    model = nn.Sequential(nn.Conv2d(K, 32, kernel_size=1), nn.ReLU(), nn.Conv2d(32, K, kernel_size=1))
    criterion = LargeLoss(rate=0.0, mode=mode)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for epoch in range(epochs):
        criterion.rate = 0.01 * epoch  # warm up, then reject 1 % more in every epoch
        for batch in torch.randperm(len(images)).split(32):  # the last batch is short
            maps = model(images[batch])  # class activation maps [B, K, H, W]
            logits = boost_lu(maps, alpha=5.0).mean((2, 3))
            loss = criterion(logits, states[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if mode == "correct-permanent":
                states[batch] = torch.where(criterion.rejected, POSITIVE, states[batch])
    return model, losses


@pytest.mark.parametrize("mode", MODES)
def test_own_loop_learns(mode):
    torch.manual_seed(0)
    images, _, states = problem()
    test_images, truth, _ = problem(seed=1)
    initially_positive = int((states == POSITIVE).sum())
    model, losses = own_loop(images, states, mode)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    with torch.no_grad():
        logits = boost_lu(model(test_images), alpha=5.0).mean((2, 3))
    assert (
        np.nanmean(average_precision(logits, truth)) > np.nanmean(average_precision(torch.randn(300, K), truth)) + 0.2
    )
    assert (int((states == POSITIVE).sum()) > initially_positive) == (mode == "correct-permanent")


@pytest.mark.parametrize("B", [1, 3, 32])
def test_exactly_k_of_the_unobserved_labels_are_rejected(B):
    generator = torch.Generator().manual_seed(B)
    logits = torch.randn(B, K, generator=generator, requires_grad=True)
    states = torch.randint(-1, 2, (B, K), generator=generator).to(torch.int8)
    criterion = LargeLoss(rate=0.05)
    loss = criterion(logits, states)
    loss.backward()
    unobserved = states == UNOBSERVED
    assert criterion.rejected is not None
    assert criterion.rejected.sum() == -(-int(unobserved.sum()) // 20)
    assert logits.grad is not None
    assert torch.equal(logits.grad == 0, criterion.rejected)
    kept = torch.where(criterion.rejected, -torch.inf, logits.detach() * torch.where(states == POSITIVE, -1, 1))
    torch.testing.assert_close(loss.detach(), nn.functional.softplus(kept).mean())


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss_learns_in_an_own_loop(name):
    torch.manual_seed(0)
    images, truth, states = problem()
    states = truth if LOSSES[name].needs_all_observed else states
    options = {"reject_rate_step": 0.01} if LOSSES[name].rate else {}
    criterion = make_loss(name, num_epochs=6, num_images=len(images), learning_rate=0.1, **options)
    model = nn.Conv2d(K, K, kernel_size=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(6):
        for batch in torch.randperm(len(images)).split(32):
            logits = boost_lu(model(images[batch]), alpha=5.0).mean((2, 3))
            loss = criterion(logits, states[batch], batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        criterion.end_epoch()
    with torch.no_grad():
        logits = boost_lu(model(images), alpha=5.0).mean((2, 3))
    assert np.nanmean(average_precision(logits, truth)) > np.mean(truth.float().mean(0).numpy()) + 0.15


def test_options_of_make_loss():
    criterion = make_loss("asl", gamma_negative=2.0, reject_pool=4)
    assert (criterion.settings.asl.gamma_negative, criterion.settings.reject_pool) == (2.0, 4)
    assert make_loss("em-apl", num_images=3, num_epochs=2, alpha=0.3, beta=0.5).settings.em.alpha == 0.3
    for name, options, message in (
        ("alpha-loss", {}, "alpha-loss.* asl"),
        ("asl", {"gamma": 2.0}, "'gamma'.* gamma_negative"),
        ("asl", {"clip": 1.5}, r"asl\.clip is 1\.5"),
        ("role", {}, "num_images"),
    ):
        with pytest.raises(SettingsError, match=message):
            make_loss(name, **options)
    with pytest.raises(SettingsError, match=r"'drop'.* reject"):
        LargeLoss(rate=0.1, mode="drop")  # pyright: ignore
    with pytest.raises(ValueError, match="from -1 to 7"):
        LargeLoss(rate=0.1)(torch.zeros(1, 2), torch.tensor([[-1, 7]]))
    with pytest.raises(ValueError, match="3/2"):
        LargeLoss(rate=1.5)(torch.zeros(1, 2), torch.tensor([[-1, 1]]))
