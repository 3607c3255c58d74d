"""Schedules, averaged weights, the two learning rates."""

import copy
import math

import pytest
import torch

from paml.errors import SettingsError
from paml.models import ModelSettings, build_model
from paml.training.optimiser import OptimiserSettings, average_into, build_optimiser, rate_at, set_rate


def rates(total: int, **settings) -> list[float]:
    own = OptimiserSettings(learning_rate=0.1, **settings)
    return [rate_at(own, step, total) for step in range(total)]


def test_constant_stays() -> None:
    assert rates(10) == [0.1] * 10


def test_constant_after_a_warm_up() -> None:
    found = rates(10, warmup_share=0.4)
    assert found[0] == pytest.approx(0.1 / 25)
    assert found[2] == pytest.approx(0.1 * (0.04 + 0.96 * 0.5))
    assert found[:5] == sorted(found[:5])
    assert found[4:] == [0.1] * 6


def test_cosine_falls_to_nothing() -> None:
    found = rates(100, schedule="cosine")
    assert found == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 100)) for step in range(100)])


def test_cosine_with_a_warm_up() -> None:
    found = rates(100, schedule="cosine", warmup_share=0.1)
    assert found[0] == pytest.approx(0.004)
    assert found[10] == pytest.approx(0.1)
    assert found[55] == pytest.approx(0.05)


def test_one_cycle_is_torchs_own_but_for_its_last_rate() -> None:
    """torch ends its fall at 1/10,000 of where it began; here it ends at 0. Its steps span total - 1."""
    total = 101
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 0.1, total_steps=total, pct_start=0.31, div_factor=25, final_div_factor=1e12, cycle_momentum=False
    )
    wanted = []
    for _ in range(total):
        wanted.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        if len(wanted) < total:
            schedule.step()
    found = [rate_at(OptimiserSettings(learning_rate=0.1, schedule="one_cycle"), step, 100) for step in range(100)]
    assert found[0] == pytest.approx(wanted[0])
    assert max(found) == pytest.approx(0.1)
    assert found.index(max(found)) == 30
    assert found == pytest.approx(wanted[:100], abs=2e-3)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_a_run_of_few_steps_has_rates_too(schedule: str, total: int) -> None:
    assert all(0 <= rate <= 0.1 for rate in rates(total, schedule=schedule))
    assert max(rates(total, schedule=schedule)) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "must be above 0"),
        ({"learning_rate": float("nan")}, "must be above 0"),
        ({"head_factor": -1.0}, "must be above 0"),
        ({"average": 1.0}, r"must lie in \[0, 1\)"),
        ({"warmup_share": 1.0}, r"must lie in \[0, 1\)"),
        ({"name": "lamb"}, "optimiser.name is 'lamb'; allowed are adam, adamw, sgd"),
        ({"schedule": "linear"}, "optimiser.schedule is 'linear'; allowed are constant, cosine, one_cycle"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; it must be above 0, or null"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_what_no_optimiser_can_do_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        OptimiserSettings(**changes)


def tiny():
    settings = ModelSettings(backbone="shufflenet_v2_x0_5", feature_layer="stage2", weights=None, output_stride=8)
    return build_model(settings, 3)


@pytest.mark.parametrize(("name", "kind"), [("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD")])
def test_the_head_learns_at_its_own_rate_and_every_weight_stands_once(name: str, kind: str) -> None:
    model = tiny()
    optimiser = build_optimiser(OptimiserSettings(name=name, head_factor=7.0, weight_decay=0.3), model)  # type: ignore
    assert type(optimiser).__name__ == kind
    set_rate(optimiser, 0.01)
    body, head = optimiser.param_groups
    assert (body["lr"], head["lr"]) == (0.01, pytest.approx(0.07))
    assert body["weight_decay"] == head["weight_decay"] == 0.3
    assert {id(p) for p in head["params"]} == {id(p) for p in model.head.parameters()}
    assert sorted(id(p) for group in (body, head) for p in group["params"]) == sorted(id(p) for p in model.parameters())


def test_averaged_weights_equal_a_float64_reference() -> None:
    torch.manual_seed(0)
    model = tiny()
    averaged = copy.deepcopy(model)
    reference = {name: value.double() for name, value in model.named_parameters()}
    for _ in range(50):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value))
            for buffer in model.buffers():
                buffer.add_(1)
        average_into(averaged, model, 0.9)
        for name, value in model.named_parameters():
            reference[name] = 0.9 * reference[name] + 0.1 * value.detach().double()
    for name, value in averaged.named_parameters():
        torch.testing.assert_close(value.double(), reference[name], rtol=1e-5, atol=1e-5)
    for one, other in zip(averaged.buffers(), model.buffers(), strict=True):
        assert torch.equal(one, other)
