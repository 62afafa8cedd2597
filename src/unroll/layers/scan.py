"""The linear recurrence h_t = a_t h_{t-1} + b_t, element by element: what recurrences that are parallel over time share.

One fused multiplication and addition a step, forwards and backwards, with all that needs no order in time done at once:
on a CPU faster than any scan in log(T) rounds, and no more memory than its output. Letters: T time, B rows, N width.

    dh_t = a_{t+1}* dh_{t+1} + (gradient of output t)      db_t = dh_t      da_t = dh_t h_{t-1}*
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_scan(decay: Tensor, inputs: Tensor, start: Tensor) -> Tensor:
    """decay [N] or [T,B,N], inputs [T,B,N], start [B,N] -> every state [T,B,N]; real or complex."""
    found: Tensor = _Scan.apply(decay, inputs, start)
    return found


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, inputs: Tensor, start: Tensor) -> Tensor:
        states = torch.empty_like(inputs)
        decays = _over_time(decay, len(inputs))
        before = start
        for a, b, out in zip(decays, inputs.unbind(0), states.unbind(0), strict=True):
            before = torch.addcmul(b, a, before, out=out)
        ctx.save_for_backward(decay, start, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        decay, start, states = ctx.saved_tensors
        [given] = gradients
        d_states = torch.empty_like(states)
        decays = _over_time(decay.conj().resolve_conj(), len(states))
        rows, outs = given.unbind(0), d_states.unbind(0)
        after = outs[-1].copy_(rows[-1])
        for t in range(len(states) - 2, -1, -1):
            after = torch.addcmul(rows[t], decays[t + 1], after, out=outs[t])
        d_start = decays[0] * after if ctx.needs_input_grad[2] else None
        d_decay = None
        if ctx.needs_input_grad[0]:
            d_decay = torch.empty_like(states) if decay.dim() == 3 else None
            if d_decay is not None:
                torch.mul(d_states[0], start.conj(), out=d_decay[0])
                torch.mul(d_states[1:], states[:-1].conj(), out=d_decay[1:])
            else:
                d_decay = (d_states[0] * start.conj()).sum(0) + (d_states[1:] * states[:-1].conj()).sum((0, 1))
        return d_decay, d_states, d_start


def _over_time(decay: Tensor, steps: int) -> tuple[Tensor, ...] | list[Tensor]:
    return decay.unbind(0) if decay.dim() == 3 else [decay] * steps
