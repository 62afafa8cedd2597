"""Neural Turing machine: a controller with read and write heads on a memory, `(inputs [B,T,D], state) -> (outputs, state)`.

Paper: Graves, Wayne & Danihelka 2014, arXiv:1410.5401. Letters: A heads (read heads first, then write heads), R read and
W write heads, N slots, M slot width, S shifts. At every step the controller, LSTM or one tanh layer, sees the input and
the last read vectors, and gives each head k (key), beta, g, s (weights of the shifts), gamma, each write head also e
(erase) and a (add). With the memory m and the head's weighting w of the step before:

    content      wc = softmax_i(beta cos(k, m_i))                                  (5), (6)
    location     wg = g wc + (1 - g) w                                             (7)
                 ws_i = sum_j s_j wg_{i-j}    j = -shift..shift, around the end    (8)
                 w  = ws^gamma / sum ws^gamma                                      (9)
    read         r  = sum_i w_i m_i                                                (2)
    write        m  = m prod_w (1 - w e) + sum_w w a                               (3), (4)

All heads address the memory as it is before the step's writes; reads see that memory too. Output: h_t + U r_t, so that
the layer is as wide as its controller and anything linear in (h, r) can still be read from it.

Deliberate differences: k and a are bounded by tanh; cos is smoothed, k m / sqrt((|k|^2 + c) (|m|^2 + c)) with c = 1e-6,
so that an empty slot has a finite gradient; `constant` starts (Collier & Beel 2018, arXiv:1807.08518) have memory 1e-6,
every head on slot 0 and a controller of zeros; `learnt` ones make all of these parameters.

State: hidden [B,H], cell [B,H] (LSTM alone), memory [B,N,M], weights [B,A,N], reads [B,R*M].

`method="loop"` is the equations above, step by step under autograd: the reference that the fast path (`ntm_kernels.py`)
equals in outputs and gradients.

Number to reach: copy of 1 to 20 vectors of 8 bits, < 0.1 bit a sequence within 30,000 sequences.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers import ntm_kernels as kernels
from unroll.layers.ntm_kernels import EMPTY, SMOOTH, TINY_WEIGHT, Heads

State = dict[str, Tensor]


class Config(Strict):
    """`shift`: how far a head may move in a step. `initial`: see the module. `sharpness`: where beta starts is
    softplus(sharpness); at 0 a head that looks for content sees nearly all slots alike, and is slow to learn to."""

    slots: int = Field(128, ge=1)
    slot_width: int = Field(20, ge=1)
    read_heads: int = Field(1, ge=1)
    write_heads: int = Field(1, ge=1)
    shift: int = Field(1, ge=0)
    controller: Literal["lstm", "feedforward"] = "lstm"
    initial: Literal["constant", "learnt"] = "constant"
    sharpness: float = 0.0
    method: Literal["fast", "loop"] = "fast"

    @model_validator(mode="after")
    def shifts_fit(self) -> Self:
        if 2 * self.shift + 1 > self.slots:
            raise ValueError(f"shift: {self.shift} passes its own start in {self.slots} slots")
        return self


TINY = [
    {"slots": 7, "slot_width": 3},
    {
        "slots": 6,
        "slot_width": 4,
        "read_heads": 2,
        "write_heads": 2,
        "shift": 2,
        "controller": "feedforward",
        "initial": "learnt",
        "sharpness": 3.0,
    },
    {"slots": 5, "slot_width": 3, "write_heads": 2, "shift": 0, "method": "loop"},
]
"""Small configurations, at least one for each option: what the contract tests build."""


class Layer(nn.Module):
    """The machine; `width` is that of the controller and of the outputs."""

    def __init__(self, input_width: int, width: int, config: Config) -> None:
        super().__init__()
        self.input_width, self.width, self.config = input_width, width, config
        self.heads = Heads(config.read_heads, config.write_heads, config.slot_width, 2 * config.shift + 1)
        gates = 4 if config.controller == "lstm" else 1
        reads = config.read_heads * config.slot_width
        self.weight_input = nn.Parameter(torch.empty(gates * width, input_width))  # [G*H,D]
        self.weight_hidden = nn.Parameter(torch.empty(gates * width, width + reads))  # [G*H,H+R*M]
        self.bias = nn.Parameter(torch.empty(gates * width))  # [G*H]
        self.weight_heads = nn.Parameter(torch.empty(self.heads.parameters, width))  # [P,H]
        self.bias_heads = nn.Parameter(torch.zeros(self.heads.parameters))  # [P]
        self.read_to_output = nn.Parameter(torch.empty(width, reads))  # [H,R*M]
        self.starts = nn.ParameterDict()
        if config.initial == "learnt":
            constant = self._constant_state()
            self.starts = nn.ParameterDict({name: nn.Parameter(value) for name, value in constant.items()})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Controller: as torch starts an LSTM, with a forget bias of 1; heads and reads: Xavier."""
        bound = self.width**-0.5
        for parameter in (self.weight_input, self.weight_hidden, self.bias):
            nn.init.uniform_(parameter, -bound, bound)
        if self.config.controller == "lstm":
            nn.init.constant_(self.bias[self.width : 2 * self.width], 1.0)
        nn.init.xavier_uniform_(self.weight_heads, gain=1.4)
        nn.init.normal_(self.bias_heads, std=0.01)
        with torch.no_grad():
            self.heads.split(self.bias_heads).beta.add_(self.config.sharpness)
        nn.init.xavier_uniform_(self.read_to_output)
        for name, start in self.starts.items():
            if name != "weights":
                nn.init.normal_(start, std=0.1)

    def _constant_state(self) -> State:
        """One row of the constant start. Of `weights` the logits, of which the learnt start takes the softmax."""
        config, width = self.config, self.width
        weights = torch.zeros(self.heads.count, config.slots)
        weights[:, 0] = 5.0
        state = {
            "hidden": torch.zeros(width),
            "memory": torch.full((config.slots, config.slot_width), EMPTY),
            "weights": weights,
            "reads": torch.zeros(config.read_heads * config.slot_width),
        }
        return state | ({"cell": torch.zeros(width)} if config.controller == "lstm" else {})

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(self._constant_state())

    def initial_state(self, batch: int) -> State:
        """The start for `batch` rows, where the parameters are and of their type."""
        if self.config.initial == "learnt":
            rows = dict(self.starts.items())
            rows["weights"] = rows["weights"].softmax(-1)
        else:
            rows = {name: value.to(self.bias) for name, value in self._constant_state().items()}
            rows["weights"] = (rows["weights"] > 0).to(self.bias)
        return {name: value.expand(batch, *value.shape).clone() for name, value in rows.items()}

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """inputs [B,T,D] -> outputs [B,T,H] and the state after them."""
        if inputs.dim() != 3 or inputs.shape[1] == 0 or inputs.shape[2] != self.input_width:
            raise ValueError(f"ntm: inputs are {tuple(inputs.shape)}, expected [B,T,{self.input_width}] with T >= 1")
        with torch.autocast(inputs.device.type, enabled=False):
            steps = inputs.transpose(0, 1).to(self.bias.dtype)  # [T,B,D]
            projected = F.linear(steps, self.weight_input, self.bias)  # [T,B,G*H]
            run = self.loop if self.config.method == "loop" else self.fast
            hidden, reads, after = run(projected, state)  # [T,B,H] [T,B,R*M]
            outputs = hidden + F.linear(reads, self.read_to_output)
        return outputs.transpose(0, 1), after

    def fast(self, projected: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """The same as `loop`, with gradients by hand."""
        weights = (self.weight_hidden, self.weight_heads, self.bias_heads)
        return kernels.run(projected, state, weights, self.heads)

    def loop(self, projected: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """The reference: one `step` after the other."""
        hiddens, reads = [], []
        for step in projected:
            state = self.step(step, state)
            hiddens.append(state["hidden"])
            reads.append(state["reads"])
        return torch.stack(hiddens), torch.stack(reads), state

    def step(self, projected: Tensor, state: State) -> State:
        """The equations: from W x_t + b [B,G*H] and the state before to the state after."""
        gates = projected + F.linear(torch.cat([state["hidden"], state["reads"]], -1), self.weight_hidden)
        after: State = {}
        if self.config.controller == "lstm":
            i, f, o, candidate = gates.chunk(4, -1)  # [B,H] each
            after["cell"] = f.sigmoid() * state["cell"] + i.sigmoid() * candidate.tanh()
            hidden = o.sigmoid() * after["cell"].tanh()
        else:
            hidden = gates.tanh()
        parts = self.heads.split(F.linear(hidden, self.weight_heads, self.bias_heads))
        memory, reading = state["memory"], self.config.read_heads
        weights = address(memory, state["weights"], *parts.addressing())  # [B,A,N]
        reads = weights[:, :reading] @ memory  # [B,R,M]
        erase, add, writing = parts.erase.sigmoid(), parts.add.tanh(), weights[:, reading:]  # [B,W,M] [B,W,M] [B,W,N]
        kept = (1 - writing.unsqueeze(-1) * erase.unsqueeze(-2)).prod(1)  # [B,N,M]
        after |= {"hidden": hidden, "weights": weights, "reads": reads.flatten(1)}
        return {**after, "memory": memory * kept + writing.transpose(1, 2) @ add}


def address(
    memory: Tensor, before: Tensor, key: Tensor, beta: Tensor, gate: Tensor, shifts: Tensor, gamma: Tensor
) -> Tensor:
    """Where the heads look: memory [B,N,M], weightings before [B,A,N], key [B,A,M], beta, gate, gamma [B,A], shifts
    [B,A,S] with the shift of -S//2 first -> weightings [B,A,N]."""
    norms = ((key.square().sum(-1, keepdim=True) + SMOOTH) * (memory.square().sum(-1)[:, None] + SMOOTH)).sqrt()
    content = (beta[..., None] * (key @ memory.transpose(1, 2)) / norms).softmax(-1)  # [B,A,N]
    mixed = gate[..., None] * content + (1 - gate[..., None]) * before
    reach = shifts.shape[-1] // 2
    shifted = sum(shifts[..., j, None] * mixed.roll(j - reach, -1) for j in range(shifts.shape[-1]))
    assert isinstance(shifted, Tensor)
    return (gamma[..., None] * (shifted + TINY_WEIGHT).log()).softmax(-1)
