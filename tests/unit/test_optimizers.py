"""Schedules, clipping, averaging and their survival of a checkpoint."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from unroll.config import Optimizer, Schedule
from unroll.training.optimizers import OptimizerPolicy, schedule_factor, without_compiler


def policy(model: nn.Module, steps: int = 100, **options: object) -> OptimizerPolicy:
    return OptimizerPolicy(Optimizer.model_validate({"learning_rate": 0.1, **options}), model, steps)


def take_step(model: nn.Linear, owner: OptimizerPolicy, step: int) -> None:
    owner.optimizer.zero_grad()
    torch.manual_seed(step)
    (model(torch.randn(4, 3)) ** 2).sum().backward()
    owner.clip()
    owner.step(step)


def test_cosine_rises_over_warmup_and_ends_at_the_floor() -> None:
    schedule = Schedule(name="cosine", warmup=10, floor=0.1)
    factors = [schedule_factor(schedule, step, 110) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[110] == pytest.approx(0.1)


def test_inverse_square_root_halves_when_steps_quadruple() -> None:
    schedule = Schedule(name="inverse_square_root", warmup=100)
    assert schedule_factor(schedule, 399, 0) == pytest.approx(0.5 * schedule_factor(schedule, 99, 0))


def test_plateau_decays_only_after_its_patience() -> None:
    owner = policy(nn.Linear(3, 2), schedule={"name": "plateau", "factor": 0.5, "patience": 1})
    for score in (3.0, 2.0, 2.5):
        owner.validated(score)
    assert owner.learning_rate(0) == pytest.approx(0.1)
    owner.validated(2.5)
    assert owner.learning_rate(0) == pytest.approx(0.05)


def test_clipping_bounds_the_global_norm() -> None:
    model = nn.Linear(3, 2)
    owner = policy(model, clip=0.01)
    (model(torch.ones(4, 3)) ** 2).sum().backward()
    before = float(owner.clip())
    after = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in model.parameters() if p.grad is not None))
    assert before > 0.01
    assert after <= 0.01 * (1 + 1e-6)


def test_biases_do_not_decay() -> None:
    groups = policy(nn.Linear(3, 2), weight_decay=0.3).optimizer.param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [(0.3, [2]), (0.0, [1])]


@pytest.mark.parametrize("ramp", [True, False])
def test_ema_is_the_weighted_mean_of_the_weights_seen(ramp: bool) -> None:
    model = nn.Linear(3, 2)
    owner = policy(model, averaging="ema", ema_decay=0.9, ema_ramp=ramp)
    expected = model.weight.detach().clone()
    for step in range(5):
        take_step(model, owner, step)
        keep = min(0.9, (2 + step) / (11 + step)) if ramp else 0.9
        expected = keep * expected + (1 - keep) * model.weight.detach()
    live = model.weight.detach().clone()
    with owner.averaged_weights():
        assert torch.allclose(model.weight, expected, atol=1e-6)
    assert torch.equal(model.weight, live)


def test_nt_asgd_starts_averaging_when_validation_stops_improving() -> None:
    model = nn.Linear(3, 2)
    owner = policy(model, name="sgd", averaging="nt_asgd", trigger=2)
    for score in (5.0, 4.0, 3.0, 4.5):
        owner.validated(score)
    assert not owner.averages
    owner.validated(6.0)
    assert owner.averages
    seen = []
    for step in range(3):
        take_step(model, owner, step)
        seen.append(model.weight.detach().clone())
    with owner.averaged_weights():
        assert torch.allclose(model.weight, torch.stack(seen).mean(0), atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "adamw", "averaging": "ema"},
        {"name": "sgd", "momentum": 0.9},
        {"name": "sgd", "averaging": "nt_asgd", "trigger": 1},
        {"name": "rmsprop", "momentum": 0.9},
    ],
)
def test_a_restored_policy_goes_on_bit_for_bit(options: dict[str, object]) -> None:
    model = nn.Linear(3, 2)
    owner = policy(model, **options)
    for step in range(4):
        take_step(model, owner, step)
        owner.validated(1.0 + step)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    other = policy(twin, **options)
    other.restore({name: value.clone() for name, value in owner.tensors().items()}, owner.state())
    for step in range(4, 8):
        take_step(model, owner, step)
        take_step(twin, other, step)
    assert torch.equal(model.weight, twin.weight)
    with owner.averaged_weights(), other.averaged_weights():
        assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD])
def test_without_the_compiler_the_steps_are_the_same(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    ends = []
    for make in (optimizer, without_compiler(optimizer)):
        torch.manual_seed(3)
        model = nn.Linear(4, 3)
        steps = make(model.parameters(), lr=0.1)
        for _ in range(3):
            steps.zero_grad(set_to_none=True)
            model(torch.ones(2, 4)).square().sum().backward()
            steps.step()
        ends.append(
            (*model.parameters(), *(s for kept in steps.state.values() for s in kept.values() if s is not None))
        )
        assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    assert all(torch.equal(plain, lean) for plain, lean in zip(*ends, strict=True))


def test_no_step_loads_the_compiler() -> None:
    """One to three seconds of every process that trains."""
    code = """
import sys
import torch
from unroll.config import Optimizer
from unroll.training.optimizers import OptimizerPolicy
for name in ("adamw", "rmsprop", "sgd"):
    model = torch.nn.Linear(2, 2)
    policy = OptimizerPolicy(Optimizer(name=name, learning_rate=0.1), model, 2)
    for step in range(2):
        policy.optimizer.zero_grad(set_to_none=True)
        model(torch.ones(1, 2)).sum().backward()
        policy.clip()
        policy.step(step)
        policy.restore(policy.tensors(), policy.state())
print("torch._dynamo" in sys.modules, "sympy" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr
