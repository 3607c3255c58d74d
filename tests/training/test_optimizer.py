"""Learning-rate schedules, EMA weights, and the learning rates of backbone and head."""

import copy
import math

import pytest
import torch

from paml.errors import SettingsError
from paml.models import ModelSettings, build_model
from paml.training.optimizer import OptimizerSettings, build_optimizer, learning_rate_at, set_learning_rate, update_ema


def rates(total: int, **settings) -> list[float]:
    optimizer = OptimizerSettings(learning_rate=0.1, **settings)
    return [learning_rate_at(optimizer, step, total) for step in range(total)]


def test_constant() -> None:
    assert rates(10) == [0.1] * 10


def test_constant_after_warm_up() -> None:
    actual = rates(10, warmup_fraction=0.4)
    assert actual[0] == pytest.approx(0.1 / 25)
    assert actual[2] == pytest.approx(0.1 * (0.04 + 0.96 * 0.5))
    assert actual[:5] == sorted(actual[:5])
    assert actual[4:] == [0.1] * 6


def test_cosine_decays_to_zero() -> None:
    actual = rates(100, schedule="cosine")
    assert actual == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 100)) for step in range(100)])


def test_cosine_with_warm_up() -> None:
    actual = rates(100, schedule="cosine", warmup_fraction=0.1)
    assert actual[0] == pytest.approx(0.004)
    assert actual[10] == pytest.approx(0.1)
    assert actual[55] == pytest.approx(0.05)


def test_one_cycle_equals_torch_except_for_the_end() -> None:
    """torch ends at 1/10,000 of the initial rate, this schedule at 0. torch's steps span total - 1."""
    total = 101
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=total, pct_start=0.31, div_factor=25, final_div_factor=1e12, cycle_momentum=False
    )
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < total:
            schedule.step()
    actual = [
        learning_rate_at(OptimizerSettings(learning_rate=0.1, schedule="one_cycle"), step, 100) for step in range(100)
    ]
    assert actual[0] == pytest.approx(expected[0])
    assert max(actual) == pytest.approx(0.1)
    assert actual.index(max(actual)) == 30
    assert actual == pytest.approx(expected[:100], abs=2e-3)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_runs_of_few_steps(schedule: str, total: int) -> None:
    assert all(0 <= rate <= 0.1 for rate in rates(total, schedule=schedule))
    assert max(rates(total, schedule=schedule)) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "above 0"),
        ({"learning_rate": float("nan")}, "above 0"),
        ({"head_lr_multiplier": -1.0}, "above 0"),
        ({"ema_decay": 1.0}, "below 1"),
        ({"warmup_fraction": 1.0}, "below 1"),
        ({"name": "lamb"}, "optimizer.name is 'lamb'.*adamw"),
        ({"schedule": "linear"}, "optimizer.schedule is 'linear'.*one_cycle"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        OptimizerSettings(**changes)


def tiny_model():
    settings = ModelSettings(backbone="shufflenet_v2_x0_5", feature_layer="stage2", weights=None, output_stride=8)
    return build_model(settings, 3)


@pytest.mark.parametrize(("name", "kind"), [("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD")])
def test_the_head_has_its_own_rate_and_each_weight_is_in_one_group(name: str, kind: str) -> None:
    model = tiny_model()
    optimizer = build_optimizer(OptimizerSettings(name=name, head_lr_multiplier=7.0, weight_decay=0.3), model)  # type: ignore
    assert type(optimizer).__name__ == kind
    set_learning_rate(optimizer, 0.01)
    backbone, head = optimizer.param_groups
    assert (backbone["lr"], head["lr"]) == (0.01, pytest.approx(0.07))
    assert backbone["weight_decay"] == head["weight_decay"] == 0.3
    assert {id(p) for p in head["params"]} == {id(p) for p in model.head.parameters()}
    assert sorted(id(p) for group in (backbone, head) for p in group["params"]) == sorted(
        id(p) for p in model.parameters()
    )


def test_ema_weights_equal_a_float64_reference() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    ema_model = copy.deepcopy(model)
    reference = {name: value.double() for name, value in model.named_parameters()}
    for _ in range(50):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value))
            for buffer in model.buffers():
                buffer.add_(1)
        update_ema(ema_model, model, 0.9)
        for name, value in model.named_parameters():
            reference[name] = 0.9 * reference[name] + 0.1 * value.detach().double()
    for name, value in ema_model.named_parameters():
        torch.testing.assert_close(value.double(), reference[name], rtol=1e-5, atol=1e-5)
    for one, other in zip(ema_model.buffers(), model.buffers(), strict=True):
        assert torch.equal(one, other)
