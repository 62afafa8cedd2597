"""Recurrent networks over vectors: sequence layers of any kind between what is read and a linear map to what is said.

With x^0 = the inputs, for each layer l a cell of `layers/` (rnn, lstm, gru; ntm, dnc, act, lru, ...):

    h^l_1..T = cell(x^{l-1}_1..T)       x^l = h^l, or x^{l-1} + h^l from the second layer on with `residual`
    y_t = W x^L_t + b                   logits of bits or classes, or numbers: the task knows

State: that of each layer, "<layer>.<name>". A layer whose state has "ponder" [B], the computation spent so far, gives what it
spent as the penalty `ponder` (`layers/act.py`), which the task weighs.

Numbers to reach: see `recipes/algorithms.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.language_model import State, numbered, part_of
from unroll.layers.recurrent import cell_config, sequence_layer


class Config(Strict):
    """`options`: those of the cell, where it is a file of `layers/`."""

    cell: str = "lstm"
    options: dict[str, Any] = Field({})
    layers: int = Field(1, ge=1)
    width: int = Field(100, ge=1)
    residual: bool = False

    @model_validator(mode="after")
    def known_cell(self) -> Self:
        cell_config(self.cell, self.options)
        return self


TINY: list[dict[str, Any]] = [
    {"cell": "rnn", "width": 6},
    {"cell": "gru", "layers": 3, "width": 5, "residual": True},
    {"cell": "ntm", "width": 6, "options": {"slots": 7, "slot_width": 3}},
    {"cell": "ntm", "width": 6, "options": {"slots": 6, "slot_width": 4, "read_heads": 2, "write_heads": 2, "shift": 2,
                                            "controller": "feedforward", "initial": "learnt"}},
]  # fmt: skip
"""Small configurations, at least one for each option: what the contract tests build."""


@dataclass
class Output:
    """values [B,T,O]; the state after them; penalties: named sums over the rows, for the training loss."""

    values: Tensor
    state: State
    penalties: dict[str, Tensor] = field(default_factory=dict)


class Model(nn.Module):
    """The layers and the linear map. `vocabulary`: {"inputs": D, "outputs": O}."""

    def __init__(self, config: Config, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        widths = [vocabulary["inputs"], *[config.width] * config.layers]
        self.layers = nn.ModuleList(
            sequence_layer(config.cell, before, config.width, config.options) for before in widths[:-1]
        )
        self.output = nn.Linear(config.width, vocabulary["outputs"])

    def initial_state(self, batch: int) -> State:
        """The state of each layer before the first step."""
        state: State = {}
        for number, layer in enumerate(self.layers):
            state |= numbered(number, layer.initial_state(batch))  # type: ignore[operator]
        return state

    def forward(self, inputs: Tensor, state: State) -> Output:
        """inputs [B,T,D] -> values [B,T,O]."""
        after: State = {}
        for number, layer in enumerate(self.layers):
            outputs, layer_state = layer(inputs, part_of(state, number))  # [B,T,H]
            inputs = outputs + inputs if self.config.residual and number > 0 else outputs
            after |= numbered(number, layer_state)
        spent = [(after[name] - state[name]).sum() for name in after if name.endswith(".ponder")]
        penalties = {"ponder": torch.stack(spent).sum()} if spent and self.training else {}
        return Output(self.output(inputs), after, penalties)

    @property
    def flops_per_token(self) -> int:
        """Operations of one time step: 2 for each weight of a matrix, a pondering layer counted as if it did not."""
        return 2 * sum(parameter.numel() for parameter in self.parameters() if parameter.dim() == 2)
