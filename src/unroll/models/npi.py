"""Neural programmer-interpreter: a core LSTM that learns to call programs, from their execution traces.

Paper: Reed & de Freitas 2016, arXiv:1511.06279. Every call of a program runs the same core with a state of its own,
which begins at zero. With the cells e under the pointers, the arguments a and the embedding p = M_prog[program]:

    s = f_enc(e, a)                                  what is seen, one-hot, through a network of two layers
    h = f_lstm([s; p], h)
    end      ~ sigmoid(w h + b)                      the call ends and its caller goes on
    program  ~ softmax(M_key (W h))                  else this one is called: the key nearest to what the core asks for
    argument ~ softmax(W_i h)                        with these arguments

Trained on traces, a call is a sequence of its own: all calls of a batch of traces are the rows of one matrix.

Deliberate differences: one LSTM layer by default (two in the paper); a step that ends calls nothing, since the end of
the numbers is seen only after the pointers have moved; programs are chosen by softmax over the keys' products, as the
paper trains them, and the largest of them, without a threshold on the end.

Number to reach: 100 % of sums with 3 digits and, from a curriculum of short ones, of 20 digits and more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.recurrent import LSTM

State = dict[str, Tensor]


class Config(Strict):
    """`width` of the core, `seen` of what the encoder makes of a pad, `program` and `key` of the program memory."""

    width: int = Field(128, ge=1)
    layers: int = Field(1, ge=1)
    seen: int = Field(64, ge=1)
    program: int = Field(32, ge=1)
    key: int = Field(8, ge=1)


TINY: list[dict[str, Any]] = [
    {"width": 6, "seen": 5, "program": 4, "key": 3},
    {"width": 5, "seen": 4, "program": 3, "key": 2, "layers": 2},
]
"""Small configurations, at least one for each option: what the contract tests build."""


@dataclass
class Decision:
    """What each step says: `end` [F,T] the log-odds of ending, `programs` [F,T,G] and `arguments` [F,T,A,V] log-
    probabilities of what is called otherwise, and the state after the last step."""

    end: Tensor
    programs: Tensor
    arguments: Tensor
    state: State


class Model(nn.Module):
    """F calls at a time. `vocabulary`: {"programs": G, "rows": R, "symbols": V, "arguments": A}; the last symbol is a
    blank cell and an argument that is not there."""

    def __init__(self, config: Config, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.symbols, self.argument_count = vocabulary["symbols"], vocabulary["arguments"]
        places = vocabulary["rows"] + self.argument_count
        self.see = nn.EmbeddingBag(places * self.symbols, config.seen, mode="sum")
        self.see_more = nn.Linear(config.seen, config.seen)
        self.programs = nn.Parameter(torch.randn(vocabulary["programs"], config.program))  # [G,P]
        self.keys = nn.Parameter(torch.randn(vocabulary["programs"], config.key))  # [G,K]
        widths = [config.seen + config.program] + [config.width] * (config.layers - 1)
        self.core = nn.ModuleList(LSTM(width, config.width) for width in widths)
        self.end = nn.Linear(config.width, 1)
        self.ask = nn.Linear(config.width, config.key)
        self.argument = nn.Linear(config.width, self.argument_count * self.symbols)

    def initial_state(self, batch: int) -> State:
        """Zeros [F,H] for each layer: the state of calls that have just been opened."""
        states = [layer.initial_state(batch) for layer in self.core]  # type: ignore[operator]
        return {f"{name}{number}": value for number, state in enumerate(states) for name, value in state.items()}

    def forward(self, program: Tensor, arguments: Tensor, seen: Tensor, state: State) -> Decision:
        """`program` [F] that runs with `arguments` [F,A]; `seen` [F,T,R] the cells before each step."""
        calls, steps, _ = seen.shape
        given = torch.cat([seen, arguments[:, None].expand(-1, steps, -1)], -1)  # [F,T,R+A]
        given = given + torch.arange(given.shape[2], device=given.device) * self.symbols  # a row for each place
        encoded = torch.relu(self.see(given.flatten(0, 1)))  # [F*T,E]
        encoded = torch.relu(self.see_more(encoded)).view(calls, steps, -1)  # [F,T,E]
        running = self.programs[program][:, None].expand(-1, steps, -1)  # [F,T,P]
        hidden = torch.cat([encoded, running], -1)  # [F,T,E+P]
        after: State = {}
        for number, layer in enumerate(self.core):
            own = {name: state[f"{name}{number}"] for name in ("hidden", "memory")}
            hidden, own = layer(hidden, own)  # [F,T,H]
            after |= {f"{name}{number}": value for name, value in own.items()}
        scores = self.argument(hidden).view(calls, steps, self.argument_count, self.symbols)  # [F,T,A,V]
        return Decision(
            self.end(hidden).squeeze(-1),
            F.log_softmax(F.linear(self.ask(hidden), self.keys), -1),
            F.log_softmax(scores, -1),
            after,
        )
