"""Differentiable neural computer: an LSTM with a memory that it allocates, frees and walks in the order of writing.

Paper: Graves et al. 2016, Nature 538 (equations: its Methods). Letters: N slots, M slot width, R read heads. At every step,
from the memory m, usage u, write weighting w, precedence p, links L and read weightings r_k of the step before:

    retained  psi = prod_k (1 - free_k r_k)                   usage  u = (u + w - u w) psi
    allocate  a[phi_j] = (1 - u[phi_j]) prod_{i<j} u[phi_i]   phi: slots from the least used up
    write     w = g_write (g_alloc a + (1 - g_alloc) C(m, key, beta)),   m = m (1 - w e) + w v
    links     L_ij = (1 - w_i - w_j) L_ij + w_i p_j,  L_ii = 0,   p = (1 - sum w) p + w
    read      r_k = pi_1 L' r_k + pi_2 C(m, key_k, beta_k) + pi_3 L r_k,   read vector = sum_i r_ki m_i

C(m, k, beta) = softmax_i(beta cos(m_i, k)). Output: h_t + U (read vectors), as wide as the controller.

Deliberate differences: the cosine is smoothed as in `ntm.py`; usage is kept off 0 and 1 by 1e-6 where its products are
differentiated; the links are not thinned, so a step costs N^2.

State: hidden, cell [B,H], memory [B,N,M], usage, written, precedence [B,N], links [B,N,N], weights [B,R,N], reads [B,R*M].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unroll.config import Strict

State = dict[str, Tensor]
SMOOTH = 1e-6


class Config(Strict):
    """Sizes of the memory."""

    slots: int = Field(32, ge=2)
    slot_width: int = Field(16, ge=1)
    read_heads: int = Field(1, ge=1)


TINY = [{"slots": 5, "slot_width": 3}, {"slots": 4, "slot_width": 2, "read_heads": 2}]
"""Small configurations, at least one for each option: what the contract tests build."""


class Layer(nn.Module):
    """The computer; `width` is that of the controller and of the outputs."""

    state_names = ("hidden", "cell", "memory", "usage", "written", "precedence", "links", "weights", "reads")

    def __init__(self, input_width: int, width: int, config: Config) -> None:
        super().__init__()
        self.input_width, self.width, self.config = input_width, width, config
        reads, slot = config.read_heads * config.slot_width, config.slot_width
        self.sizes = [reads, config.read_heads, slot, 1, slot, slot, config.read_heads, 1, 1, 3 * config.read_heads]
        self.project = nn.Linear(input_width, 4 * width)
        self.recurrent = nn.Linear(width + reads, 4 * width, bias=False)
        self.interface = nn.Linear(width, sum(self.sizes))
        self.read_to_output = nn.Linear(reads, width, bias=False)
        with torch.no_grad():
            self.project.bias[width : 2 * width] = 1.0  # the forget gate

    def initial_state(self, batch: int) -> State:
        """An empty memory, everything else zero."""
        config, like = self.config, self.project.weight
        slots = (batch, config.slots)
        shapes = {
            "hidden": (batch, self.width), "cell": (batch, self.width), "memory": (*slots, config.slot_width),
            "usage": slots, "written": slots, "precedence": slots, "links": (*slots, config.slots),
            "weights": (batch, config.read_heads, config.slots), "reads": (batch, config.read_heads * config.slot_width),
        }  # fmt: skip
        return {name: like.new_zeros(shape) for name, shape in shapes.items()}

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """inputs [B,T,D] -> outputs [B,T,H] and the state after them."""
        if inputs.dim() != 3 or inputs.shape[1] == 0 or inputs.shape[2] != self.input_width:
            raise ValueError(f"dnc: inputs are {tuple(inputs.shape)}, expected [B,T,{self.input_width}] with T >= 1")
        hidden, reads = [], []
        with torch.autocast(inputs.device.type, enabled=False):
            for projected in self.project(inputs.to(self.project.weight.dtype)).unbind(1):  # [B,4H] each
                state = self.step(projected, state)
                hidden.append(state["hidden"])
                reads.append(state["reads"])
            outputs = torch.stack(hidden, 1) + self.read_to_output(torch.stack(reads, 1))
        return outputs, state

    def step(self, projected: Tensor, state: State) -> State:
        """The equations: from W x_t + b [B,4H] and the state before to the state after."""
        rows, heads, slot = len(projected), self.config.read_heads, self.config.slot_width
        gates = projected + self.recurrent(torch.cat([state["hidden"], state["reads"]], -1))
        i, f, o, candidate = gates.chunk(4, -1)  # [B,H] each
        cell = f.sigmoid() * state["cell"] + i.sigmoid() * candidate.tanh()
        hidden = o.sigmoid() * cell.tanh()
        keys, betas, key, beta, erase, value, free, allocating, writing, modes = self.interface(hidden).split(
            self.sizes, -1
        )
        memory, before, written = state["memory"], state["weights"], state["written"]

        retained = (1 - free.sigmoid()[..., None] * before).prod(1)  # [B,N]
        usage = (state["usage"] + written - state["usage"] * written) * retained
        by_content = content(memory, key[:, None], beta)[:, 0]  # [B,N]
        gate = allocating.sigmoid()
        written = writing.sigmoid() * (gate * allocation(usage) + (1 - gate) * by_content)
        memory = memory * (1 - written[..., None] * erase.sigmoid()[:, None]) + written[..., None] * value[:, None]

        precedence = state["precedence"]
        links = (1 - written[:, :, None] - written[:, None]) * state["links"] + written[:, :, None] * precedence[
            :, None
        ]
        links = links * (1 - torch.eye(links.shape[-1], dtype=links.dtype, device=links.device))
        precedence = (1 - written.sum(-1, keepdim=True)) * precedence + written

        backward, forward = before @ links, before @ links.transpose(1, 2)  # [B,R,N]
        found = content(memory, keys.view(rows, heads, slot), betas)
        mode = modes.view(rows, heads, 3).softmax(-1)
        weights = mode[..., :1] * backward + mode[..., 1:2] * found + mode[..., 2:] * forward
        return {
            "hidden": hidden, "cell": cell, "memory": memory, "usage": usage, "written": written,
            "precedence": precedence, "links": links, "weights": weights, "reads": (weights @ memory).flatten(1),
        }  # fmt: skip


def content(memory: Tensor, keys: Tensor, betas: Tensor) -> Tensor:
    """memory [B,N,M], keys [B,R,M], betas [B,R] before their bound of 1 -> weightings [B,R,N]."""
    norms = ((keys.square().sum(-1, keepdim=True) + SMOOTH) * (memory.square().sum(-1)[:, None] + SMOOTH)).sqrt()
    return ((1 + F.softplus(betas))[..., None] * (keys @ memory.transpose(1, 2)) / norms).softmax(-1)


def allocation(usage: Tensor) -> Tensor:
    """Where to write anew: usage [B,N] -> a weighting [B,N] that prefers the least used slot."""
    usage = SMOOTH + (1 - 2 * SMOOTH) * usage
    ordered, places = usage.sort(dim=-1, stable=True)
    above = torch.cat([torch.ones_like(ordered[:, :1]), ordered[:, :-1]], -1).cumprod(-1)
    return torch.zeros_like(usage).scatter(-1, places, (1 - ordered) * above)
