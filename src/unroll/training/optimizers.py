"""The optimiser policy: the step, the learning rate, the answer to a validation score, and averaged weights.

Sources: AdamW (Loshchilov & Hutter 2019), RMSProp (Hinton 2012; Graves 2013), NT-ASGD (Merity et al. 2018, algorithm 1),
cosine (Loshchilov & Hutter 2017), inverse square root (Vaswani et al. 2017). Weight decay is applied to parameters of
two or more dimensions, that is to no bias and no gain.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unroll.config import Optimizer, Schedule
from unroll.training.checkpoint import flatten_optimizer, restore_optimizer


def build_optimizer(config: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimiser named in the recipe."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    rate = config.learning_rate
    if config.name == "adamw":
        return without_compiler(torch.optim.AdamW)(groups, lr=rate, betas=config.betas, fused=True)
    if config.name == "rmsprop":
        return without_compiler(torch.optim.RMSprop)(groups, lr=rate, alpha=config.betas[1], momentum=config.momentum)
    return without_compiler(torch.optim.SGD)(groups, lr=rate, momentum=config.momentum)


def without_compiler(optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The same optimiser, whose methods do not import torch's compiler before their first step.

    torch wraps them to keep the compiler out of them, and imports it for that: one to three seconds of every process
    that trains (sympy and all), though nothing is compiled here. The functions beneath the wrappers do the work.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(optimizer.step))  # type: ignore[attr-defined]
    return type(optimizer.__name__, (optimizer,), methods)  # type: ignore[arg-type]


def schedule_factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """Learning rate at `step` (counted from 0) as a fraction of the peak; `plateau` is handled by the policy."""
    warm = min(1.0, (step + 1) / schedule.warmup) if schedule.warmup else 1.0
    if schedule.name == "cosine":
        progress = min(1.0, max(0, step - schedule.warmup) / max(1, total_steps - schedule.warmup))
        return warm * (schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    if schedule.name == "inverse_square_root":
        start = max(1, schedule.warmup)
        return warm * math.sqrt(start / max(start, step + 1))
    return warm


class OptimizerPolicy:
    """Owns the optimiser and everything that decides how its step is taken. All state survives a checkpoint."""

    def __init__(self, config: Optimizer, model: nn.Module, total_steps: int) -> None:
        self.config = config
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(config, self.parameters)
        self.total_steps = total_steps
        self.scale = 1.0
        self.best = math.inf
        self.bad_validations = 0
        self.scores: list[float] = []
        self.averaged_steps = 0
        self.averages: list[Tensor] = []
        if config.averaging == "ema":
            self.averages = [p.detach().clone() for p in self.parameters]

    def learning_rate(self, step: int, window_scale: float = 1.0) -> float:
        """The rate for `step`; a shorter random window takes a proportionally smaller one (Merity et al. 2018, 3.1)."""
        factor = schedule_factor(self.config.schedule, step, self.total_steps)
        return self.config.learning_rate * self.scale * factor * window_scale

    def clip(self) -> Tensor:
        """Clip the global gradient norm to `config.clip`; returns the norm before clipping."""
        limit = math.inf if self.config.clip is None else self.config.clip
        return nn.utils.clip_grad_norm_(self.parameters, limit)

    def step(self, step: int, window_scale: float = 1.0) -> float:
        """Update the weights; returns the learning rate used."""
        rate = self.learning_rate(step, window_scale)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.average()
        return rate

    @torch.no_grad()
    def average(self) -> None:
        if not self.averages:
            return
        self.averaged_steps += 1
        if self.config.averaging == "ema":
            ramp = (1 + self.averaged_steps) / (10 + self.averaged_steps)
            keep = min(self.config.ema_decay, ramp) if self.config.ema_ramp else self.config.ema_decay
        else:
            keep = 1 - 1 / self.averaged_steps
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - keep)

    def validated(self, score: float) -> None:
        """React to a validation score (lower is better): plateau decay, or the start of averaging."""
        schedule, window = self.config.schedule, self.config.trigger
        if self.config.averaging == "nt_asgd" and not self.averages:
            if len(self.scores) > window and score > min(self.scores[:-window]):
                self.averages = [p.detach().clone() for p in self.parameters]
            self.scores.append(score)
        if score < self.best:
            self.best, self.bad_validations = score, 0
            return
        self.bad_validations += 1
        if schedule.name == "plateau" and self.bad_validations > schedule.patience:
            self.scale, self.bad_validations = self.scale * schedule.factor, 0

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights (if there are any): for validation and export."""
        if not self.averages:
            yield
            return
        kept = [p.detach().clone() for p in self.parameters]
        self._fill(self.averages)
        try:
            yield
        finally:
            self._fill(kept)

    def adopt_averages(self) -> None:
        """Make the averaged weights the model's own, at the end of a run."""
        if self.averages:
            self._fill(self.averages)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps as tensors."""
        averages = {f"average.{number}": value for number, value in enumerate(self.averages)}
        return {**{f"state.{key}": value for key, value in flatten_optimizer(self.optimizer).items()}, **averages}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON."""
        names = ("scale", "best", "bad_validations", "scores", "averaged_steps")
        return {name: getattr(self, name) for name in names}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        prefix = "state."
        restore_optimizer(self.optimizer, {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        count = sum(key.startswith("average.") for key in tensors)
        device = self.parameters[0].device
        self.averages = [tensors[f"average.{number}"].to(device) for number in range(count)]
        for name, value in state.items():
            setattr(self, name, value)
