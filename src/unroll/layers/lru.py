"""Linear recurrent unit: a diagonal, complex, linear recurrence with a gated output, `(inputs [B,T,D], state) -> (outputs, state)`.

Paper: Orvieto et al. 2023, arXiv:2303.06349. With N complex numbers of state, * the elementwise product:

    h_t = lambda * h_{t-1} + gamma * (B x_t)          lambda = exp(-exp(nu) + i theta),  gamma = sqrt(1 - |lambda|^2)
    y_t = Re(C h_t) + D x_t
    out = (W y_t) * sigmoid(V y_t)                    a gated linear unit, without which the layer would be linear

|lambda| starts uniform on the ring from `slowest_from` to `slowest_to`, theta uniform on [0, `phase`]: a ring near 1 keeps
what was read over thousands of steps. Over T steps a change of theta is felt T times, so lambda moves at the share `pace` of the
learning rate (what is learnt is nu / pace and theta / pace). Without `normalised` gamma is 1, which suits sequences of few
events: what is read is then not made smaller the longer it is kept. `read` puts
a layer before the recurrence, so that one unit can choose what to remember: a gated one, or max(0, W x + b), which is
exactly nothing for what does not concern it; its b starts `threshold` lower than torch would have it: the larger, the fewer
inputs are remembered at first.

Deliberate differences: gamma follows lambda instead of being a parameter; a time step is computed after the other by
`scan.py`, which on a CPU is the fastest way; no normalisation or dropout between layers.

State: real, imaginary [B,N].

Numbers to reach: adding problem T = 600, mean squared error <= 1e-3; copy memory T = 1,000, <= 1e-3 nats a prediction.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.scan import linear_scan

State = dict[str, Tensor]


class Config(Strict):
    """`states`: how many complex numbers are carried, none stated: as many as the layer is wide."""

    states: int | None = Field(None, ge=1)
    slowest_from: float = Field(0.9, gt=0.0, lt=1.0)
    slowest_to: float = Field(0.999, gt=0.0, lt=1.0)
    phase: float = Field(2 * math.pi, ge=0.0, le=2 * math.pi)
    pace: float = Field(1.0, gt=0.0, le=1.0)
    normalised: bool = True
    read: Literal["linear", "gated", "rectified"] = "linear"
    threshold: float = Field(0.0, ge=0.0)

    @model_validator(mode="after")
    def in_order(self) -> Self:
        if self.slowest_from > self.slowest_to:
            raise ValueError(f"slowest_from: {self.slowest_from} is above slowest_to, {self.slowest_to}")
        if self.threshold and self.read != "rectified":
            raise ValueError(f"threshold: only read rectified has one, read is {self.read}")
        return self


TINY = [
    {"states": 5},
    {"slowest_from": 0.99, "slowest_to": 0.9999, "phase": 0.5, "read": "gated", "normalised": False, "pace": 0.1},
    {"states": 4, "read": "rectified", "threshold": 0.1},
]
"""Small configurations, at least one for each option: what the contract tests build."""


class Layer(nn.Module):
    """The unit; `width` is that of its outputs."""

    state_names = ("real", "imaginary")

    def __init__(self, input_width: int, width: int, config: Config) -> None:
        super().__init__()
        self.input_width, self.width, self.config = input_width, width, config
        self.states = config.states or width
        read = input_width if config.read == "linear" else width
        self.before = {"linear": nn.Identity(), "gated": nn.Sequential(nn.Linear(input_width, 2 * width), nn.GLU()),
                       "rectified": nn.Sequential(nn.Linear(input_width, width), nn.ReLU())}[config.read]  # fmt: skip
        self.log_decay = nn.Parameter(torch.empty(self.states))  # [N] nu
        self.phase = nn.Parameter(torch.empty(self.states))  # [N] theta
        self.to_state = nn.Parameter(torch.empty(2 * self.states, read))  # [2N,D] B, real parts first
        self.from_state = nn.Parameter(
            torch.empty(width, 2 * self.states)
        )  # [H,2N] C, the imaginary parts' sign turned
        self.skip = nn.Linear(read, width)
        self.gate_out = nn.Linear(width, 2 * width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the paper's section 3: eigenvalues uniform on a ring, B and C normal with variance 1/D and 1/N."""
        low, high = self.config.slowest_from, self.config.slowest_to
        with torch.no_grad():
            radius = (torch.rand(self.states) * (high**2 - low**2) + low**2).sqrt()
            self.log_decay.copy_((-radius.log()).log() / self.config.pace)
            self.phase.copy_(torch.rand(self.states) * self.config.phase / self.config.pace)
            nn.init.normal_(self.to_state, std=(2 * self.to_state.shape[1]) ** -0.5)
            for name, bias in self.before.named_parameters():
                if name.endswith("bias"):
                    bias.sub_(self.config.threshold)
            nn.init.normal_(self.from_state, std=self.states**-0.5)

    def initial_state(self, batch: int) -> State:
        """Zeros [B,N] for the real and the imaginary parts."""
        return {name: self.log_decay.new_zeros(batch, self.states) for name in self.state_names}

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """inputs [B,T,D] -> outputs [B,T,H] and the state after them."""
        if inputs.dim() != 3 or inputs.shape[1] == 0 or inputs.shape[2] != self.input_width:
            raise ValueError(f"lru: inputs are {tuple(inputs.shape)}, expected [B,T,{self.input_width}] with T >= 1")
        with torch.autocast(inputs.device.type, enabled=False):
            steps = self.before(inputs.transpose(0, 1).to(self.phase.dtype))  # [T,B,D]
            radius = (-(self.log_decay * self.config.pace).exp()).exp()  # [N]
            decay = torch.polar(radius, self.phase * self.config.pace)  # [N] complex
            read = F.linear(steps, self.to_state)  # [T,B,2N]
            if self.config.normalised:
                read = read * (1 - radius.square()).clamp_min(1e-12).sqrt().repeat(2)
            real, imaginary = read.chunk(2, -1)
            start = torch.complex(state["real"], state["imaginary"])  # [B,N]
            states = linear_scan(decay, torch.complex(real, imaginary), start)  # [T,B,N] complex
            parts = torch.view_as_real(states).transpose(-1, -2).flatten(-2)  # [T,B,2N]
            outputs = F.glu(self.gate_out(F.linear(parts, self.from_state) + self.skip(steps)), -1)
        last = states[-1]
        return outputs.transpose(0, 1), {"real": last.real.contiguous(), "imaginary": last.imag.contiguous()}
