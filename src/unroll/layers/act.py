"""Adaptive computation time around any recurrent layer: it decides at every time step how often its cell is applied.

Paper: Graves 2016, arXiv:1603.08983. At time t the cell runs n = 1, 2, ... on (x_t, [n = 1]), from its own state, and

    h^n = sigmoid(w y^n + b)                                  halting unit
    N = min {n: h^1 + .. + h^n >= 1 - epsilon}, at most `maximum`
    p^n = h^n for n < N,  p^N = R = 1 - (h^1 + .. + h^{N-1})  halting weights: they sum to 1
    y_t = sum_n p^n y^n,  s_t = sum_n p^n s^n                 every tensor of the cell's state is averaged so
    ponder = N + R                                            what costs; its gradient is that of R

A row that has halted takes no part in further steps: what it gives does not depend on the other rows.

State: that of the cell, and ponder [B], the sum of N + R so far; what was spent, times a `ponder_cost`, joins the loss.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.recurrent import cell_config, sequence_layer

State = dict[str, Tensor]
PONDER = "ponder"


class Config(Strict):
    """`cell`, with its `options`, is what runs; `halting_bias` is b at the start: 1 makes the first steps count most."""

    cell: str = "rnn"
    options: dict[str, Any] = Field({})
    maximum: int = Field(20, ge=1)
    epsilon: float = Field(0.01, gt=0.0, lt=1.0)
    halting_bias: float = 1.0

    @model_validator(mode="after")
    def known_cell(self) -> Self:
        if self.cell == "act":
            raise ValueError("cell: act cannot run inside act")
        cell_config(self.cell, self.options)
        return self


TINY: list[dict[str, Any]] = [
    {"cell": "gru", "maximum": 4, "epsilon": 0.1},
    {"cell": "lstm", "halting_bias": -1.0, "maximum": 6},
    {"cell": "ntm", "options": {"slots": 5, "slot_width": 3}, "maximum": 3},
]
"""Small configurations, at least one for each option: what the contract tests build."""


class Layer(nn.Module):
    """The cell and its halting unit."""

    def __init__(self, input_width: int, width: int, config: Config) -> None:
        super().__init__()
        self.input_width, self.width, self.config = input_width, width, config
        self.cell = sequence_layer(config.cell, input_width + 1, width, config.options)
        self.halt = nn.Linear(width, 1)
        nn.init.constant_(self.halt.bias, config.halting_bias)

    @property
    def state_names(self) -> tuple[str, ...]:
        return (*self.cell.state_names, PONDER)

    def initial_state(self, batch: int) -> State:
        """That of the cell, and nothing spent."""
        state: State = self.cell.initial_state(batch)
        return {**state, PONDER: self.halt.weight.new_zeros(batch)}

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """inputs [B,T,D] -> outputs [B,T,H] and the state after them."""
        if inputs.dim() != 3 or inputs.shape[1] == 0 or inputs.shape[2] != self.input_width:
            raise ValueError(f"act: inputs are {tuple(inputs.shape)}, expected [B,T,{self.input_width}] with T >= 1")
        spent = state[PONDER]
        inner = {name: value for name, value in state.items() if name != PONDER}
        outputs = []
        for step in inputs.unbind(1):  # [B,D] each
            output, inner, weights, steps = self.ponder(step, inner)
            outputs.append(output)
            remainder = weights.gather(0, (steps - 1)[None])[0]  # [B]
            spent = spent + steps.to(spent.dtype) + remainder.to(spent.dtype)
        return torch.stack(outputs, 1), {**inner, PONDER: spent}

    def ponder(self, step: Tensor, state: State) -> tuple[Tensor, State, Tensor, Tensor]:
        """One time step [B,D]: output [B,H], state, halting weights [n,B] and the number of steps N [B]."""
        rows, config = len(step), self.config
        first = torch.cat([step, step.new_ones(rows, 1)], -1)[:, None]  # [B,1,D+1]
        again = torch.cat([step, step.new_zeros(rows, 1)], -1)[:, None]
        halted, running = step.new_zeros(rows), torch.ones(rows, dtype=torch.bool, device=step.device)
        steps = torch.zeros(rows, dtype=torch.int64, device=step.device)
        weights, outputs, states = [], [], []
        for n in range(1, config.maximum + 1):
            output, state = self.cell(first if n == 1 else again, state)
            probability = self.halt(output[:, 0])[:, 0].sigmoid().to(halted.dtype)  # [B]
            ends = running & ((halted + probability >= 1 - config.epsilon) | (n == config.maximum))
            weight = torch.where(ends, 1 - halted, torch.where(running, probability, 0.0))
            weights.append(weight)
            outputs.append(output[:, 0])
            states.append(state)
            halted, steps = halted + weight, steps + running
            running = running & ~ends
            if not bool(running.any()):
                break
        every = torch.stack(weights)  # [n,B]
        return _mean(every, outputs), {k: _mean(every, [s[k] for s in states]) for k in state}, every, steps


def _mean(weights: Tensor, values: list[Tensor]) -> Tensor:
    """sum_n p^n v^n: weights [n,B], values [B,...] each."""
    shape = (*weights.shape, *[1] * (values[0].dim() - 1))
    return (weights.view(shape) * torch.stack(values)).sum(0)
