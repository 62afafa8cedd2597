"""The fast path of the neural Turing machine: all time steps in one function, with its gradient written out.

Autograd would keep a graph of some fifty small operations a step and walk it back; most of the time of a small machine
is that bookkeeping. Here the forward pass writes what the backward pass needs into tensors [T,...] made once, the
backward pass is the equations of `ntm.py` differentiated by hand, and everything that is a sum over time (the gradients
of the weights) is one matrix product at the end. `tests/unit/test_ntm.py` holds both to autograd.

Letters as in `ntm.py`; z: what goes into a softmax; d before a name: the gradient of the loss with respect to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SMOOTH = 1e-6
"""Added to squared lengths in the cosine."""
EMPTY = 1e-6
"""What a memory holds at a constant start."""
TINY_WEIGHT = 1e-12
"""Added to weightings before the logarithm."""


class Parts(NamedTuple):
    """What a controller says to its heads, before any bound: key [B,A,M], add, erase [B,W,M], gate, beta, gamma [B,A],
    shifts [B,A,S]."""

    key: Tensor
    add: Tensor
    erase: Tensor
    gate: Tensor
    beta: Tensor
    gamma: Tensor
    shifts: Tensor

    def addressing(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """key, beta, gate, shifts, gamma within their bounds."""
        return (self.key.tanh(), F.softplus(self.beta), self.gate.sigmoid(), self.shifts.softmax(-1),
                1 + F.softplus(self.gamma))  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """How many heads of which size, and where their parameters stand in the controller's output [B,P]: key, add (tanh),
    erase, gate (sigmoid), beta, gamma (softplus), shifts (softmax), so that each function acts on one block."""

    reading: int
    writing: int
    slot_width: int
    shifts: int

    @property
    def count(self) -> int:
        return self.reading + self.writing

    @property
    def blocks(self) -> tuple[int, ...]:
        """Ends of the blocks key, add, erase, gate, beta, gamma, shifts."""
        heads, written = self.count, self.writing * self.slot_width
        ends, end = [], 0
        for size in (heads * self.slot_width, written, written, heads, heads, heads, heads * self.shifts):
            end += size
            ends.append(end)
        return tuple(ends)

    @property
    def parameters(self) -> int:
        return self.blocks[-1]

    def split(self, said: Tensor) -> Parts:
        """[..., P] cut into its parts, as views."""
        key, add, erase, gate, beta, gamma, _ = self.blocks
        lead = said.shape[:-1]
        width = self.slot_width
        return Parts(
            said[..., :key].view(*lead, self.count, width),
            said[..., key:add].view(*lead, self.writing, width),
            said[..., add:erase].view(*lead, self.writing, width),
            said[..., erase:gate],
            said[..., gate:beta],
            said[..., beta:gamma],
            said[..., gamma:].view(*lead, self.count, self.shifts),
        )


def run(
    projected: Tensor, state: dict[str, Tensor], weights: tuple[Tensor, Tensor, Tensor], heads: Heads
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """projected [T,B,G*H] = W x + b -> hidden [T,B,H], reads [T,B,R*M], state. weights: of the recurrence [G*H,H+R*M], of
    the heads [P,H], their bias [P]."""
    cell = state.get("cell")
    starts = (state["hidden"], cell, state["memory"], state["weights"], state["reads"])
    hidden, reads, cell_after, memory, weightings = _Machine.apply(projected, *starts, *weights, heads)
    after = {"hidden": hidden[-1], "memory": memory, "weights": weightings, "reads": reads[-1]}
    return hidden, reads, after | ({} if cell is None else {"cell": cell_after})


class _Machine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        hidden: Tensor,
        cell: Tensor | None,
        memory: Tensor,
        weightings: Tensor,
        reads: Tensor,
        weight_hidden: Tensor,
        weight_heads: Tensor,
        bias_heads: Tensor,
        heads: Heads,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        steps, batch, _ = projected.shape
        slots, width, lstm = memory.shape[1], hidden.shape[1], cell is not None
        reading, count, slot_width, reach = heads.reading, heads.count, heads.slot_width, heads.shifts // 2
        _, add_end, _, gate_end, _, gamma_end, _ = heads.blocks
        keep = any(ctx.needs_input_grad)
        kept = steps if keep else 1

        def room(*shape: int, times: int = kept) -> Tensor:
            return projected.new_empty(times, batch, *shape)

        both = room(width + reading * slot_width, times=steps + 1)  # h and r side by side
        both[0, :, :width], both[0, :, width:] = hidden, reads
        gates = room(projected.shape[-1])
        cells = room(width, times=kept + 1) if lstm else None
        squashed = room(width) if lstm else None  # tanh of the cell
        said, bounded = room(heads.parameters), room(heads.parameters)
        memories, places = room(slots, slot_width, times=kept + 1), room(count, slots, times=kept + 1)
        memories[0], places[0] = memory, weightings
        scaled = room(count, slot_width)  # k beta / |k|
        inverse = room(1, slots)  # 1 / |m|
        dots, content = room(count, slots), room(count, slots)
        padded = room(count, slots + 2 * reach)  # wg with its ends repeated
        shifted, logs = room(count, slots), room(count, slots)

        # Views of every step at once: cut one by one in the loop they would cost as much as the arithmetic.
        recurrent, to_heads = weight_hidden.t(), weight_heads.t()
        projections, boths = projected.unbind(0), both.unbind(0)
        hiddens, all_reads = both[..., :width].unbind(0), both[..., width:].unbind(0)
        gate_rows, said_rows = gates.unbind(0), said.unbind(0)
        tanh_from, tanh_to = (x[..., :add_end].unbind(0) for x in (said, bounded))
        sigmoid_from, sigmoid_to = (x[..., add_end:gate_end].unbind(0) for x in (said, bounded))
        plus_from, plus_to = (x[..., gate_end:gamma_end].unbind(0) for x in (said, bounded))
        shifts_from, shifts_to = heads.split(said).shifts.unbind(0), heads.split(bounded).shifts.unbind(0)
        keys, adds, erases, _, _, _, _ = (part.unbind(0) for part in heads.split(bounded))
        mixes, betas = (x.unsqueeze(-1).unbind(0) for x in (heads.split(bounded).gate, heads.split(bounded).beta))
        gammas = heads.split(bounded).gamma.unsqueeze(-1).unbind(0)
        memory_rows, across = memories.unbind(0), memories.transpose(2, 3).unbind(0)
        place_rows, reading_rows = places.unbind(0), places[:, :, :reading].unbind(0)
        writing_rows = places[:, :, reading:].unbind(0)
        scaled_rows, inverse_rows, flat_inverse = scaled.unbind(0), inverse.unbind(0), inverse[:, :, 0].unbind(0)
        dot_rows, content_rows = dots.unbind(0), content.unbind(0)
        middle = padded[..., reach : reach + slots].unbind(0)
        ends = [(padded[..., to].unbind(0), padded[..., source].unbind(0)) for to, source in _ends(slots, reach)]
        unfolded = _unfolded(padded, heads.shifts, slots).unbind(0)
        shifted_rows, log_rows = shifted.unbind(0), logs.unbind(0)
        if cells is not None and squashed is not None and cell is not None:
            cells[0] = cell
            cell_rows, squashed_rows = cells.unbind(0), squashed.unbind(0)
            sigmoids, candidates = gates[..., : 3 * width].unbind(0), gates[..., 3 * width :].unbind(0)
            i_rows, f_rows, o_rows = (gates[..., k * width : (k + 1) * width].unbind(0) for k in range(3))

        for t in range(steps):
            n, after = (t, t + 1) if keep else (0, 0)
            h, m = hiddens[t + 1], memory_rows[n]
            gate = torch.addmm(projections[t], boths[t], recurrent, out=gate_rows[n])
            if lstm:
                sigmoids[n].sigmoid_()
                candidates[n].tanh_()
                c = torch.mul(f_rows[n], cell_rows[n], out=cell_rows[after]).addcmul_(i_rows[n], candidates[n])
                torch.mul(o_rows[n], torch.tanh(c, out=squashed_rows[n]), out=h)
            else:
                torch.tanh(gate, out=h)
            torch.addmm(bias_heads, h, to_heads, out=said_rows[n])
            torch.tanh(tanh_from[n], out=tanh_to[n])
            torch.sigmoid(sigmoid_from[n], out=sigmoid_to[n])
            plus_to[n].copy_(F.softplus(plus_from[n]))
            shifts = shifts_to[n].copy_(shifts_from[n].softmax(-1))  # [B,A,S]
            key = keys[n]
            k_inverse = torch.linalg.vecdot(key, key).add_(SMOOTH).rsqrt_().unsqueeze(-1)  # [B,A,1]
            k = torch.mul(key, k_inverse.mul_(betas[n]), out=scaled_rows[n])
            torch.linalg.vecdot(m, m, out=flat_inverse[n]).add_(SMOOTH).rsqrt_()
            dot = torch.bmm(k, across[n], out=dot_rows[n])
            wc = torch.softmax(dot * inverse_rows[n], -1, out=content_rows[n])
            torch.lerp(place_rows[n], wc, mixes[n], out=middle[n])
            for to, source in ends:
                to[n].copy_(source[n])
            ws = torch.bmm(shifts.flip(-1).view(-1, 1, heads.shifts), unfolded[n])  # [B*A,1,N]
            ws = torch.add(ws.view(batch, count, slots), TINY_WEIGHT, out=shifted_rows[n])
            torch.softmax(torch.log(ws, out=log_rows[n]) * (gammas[n] + 1), -1, out=place_rows[after])
            all_reads[t + 1].copy_(torch.bmm(reading_rows[after], m).view(batch, -1))
            _write(m, writing_rows[after], erases[n], adds[n], memory_rows[after])
        if keep:
            ctx.heads, ctx.lstm = heads, lstm
            ctx.save_for_backward(both, gates, cells, squashed, said, bounded, memories, places, scaled, inverse, dots,
                                  content, padded, shifted, logs, weight_hidden, weight_heads)  # fmt: skip
        last_cell = None if cells is None else cells[-1].clone()
        outputs = both[1:, :, :width].contiguous(), both[1:, :, width:].contiguous()
        return *outputs, last_cell, memories[-1].clone(), places[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return _backward(ctx, gradients)


def _backward(ctx: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The gradients of all arguments of `forward`, from those of its results."""
    (both, gates, cells, squashed, said, bounded, memories, places, scaled, inverse, dots, content, padded, shifted,
     logs, weight_hidden, weight_heads) = ctx.saved_tensors  # fmt: skip
    heads: Heads = ctx.heads
    steps, batch, _ = gates.shape
    slots, slot_width = memories.shape[2:]
    reading, count, reach, width = heads.reading, heads.count, heads.shifts // 2, weight_heads.shape[1]
    _, add_end, _, gate_end, _, gamma_end, _ = heads.blocks
    d_hidden, d_reads, d_cell, d_memory, d_places = gradients

    d_both = both.new_zeros(batch, both.shape[2])
    d_m = torch.zeros_like(memories[0]) if d_memory is None else d_memory.clone()
    d_w = torch.zeros_like(places[0]) if d_places is None else d_places.clone()
    d_gates, d_said = torch.empty_like(gates), torch.empty_like(said)
    lefts = both.new_empty(batch, reading + count, slots)  # what memory was read by: weightings, d dots
    rights = both.new_empty(batch, reading + count, slot_width)
    wide = both.new_empty(1, batch, count, slots + 2 * reach)
    middle, ends = wide[0, ..., reach : reach + slots], _ends(slots, reach)
    wide_unfolded = _unfolded(wide, heads.shifts, slots)[0]

    # What needs no loop: slopes of all bounds, lengths of the keys.
    parts, d_parts = heads.split(bounded), heads.split(d_said)
    slopes = torch.empty_like(said[..., :gamma_end])
    torch.addcmul(slopes.new_ones(()), bounded[..., :add_end], bounded[..., :add_end], value=-1,
                  out=slopes[..., :add_end])  # fmt: skip
    squeezed = bounded[..., add_end:gate_end]
    torch.mul(squeezed, 1 - squeezed, out=slopes[..., add_end:gate_end])
    torch.sigmoid(said[..., gate_end:gamma_end], out=slopes[..., gate_end:gamma_end])
    k_inverse = torch.linalg.vecdot(parts.key, parts.key).add_(SMOOTH).rsqrt_()  # [T,B,A]
    k_scale = parts.beta * k_inverse
    powers = (parts.gamma + 1).unsqueeze(-1) / shifted  # [T,B,A,N]
    moved = content - places[:-1]
    cubes = inverse[:, :, 0].pow(3)  # [T,B,N]
    slope_rows, k_inverses, k_scales = slopes.unbind(0), k_inverse.unbind(0), k_scale.unsqueeze(-1).unbind(0)
    k_bends = (k_scale * k_inverse.square()).unbind(0)
    power_rows, moved_rows, cube_rows = powers.unbind(0), moved.unbind(0), cubes.unbind(0)
    bent_rows, said_rows = d_said[..., :gamma_end].unbind(0), d_said.unbind(0)
    keys, adds, erases, mixes = (x.unbind(0) for x in (parts.key, parts.add, parts.erase, parts.gate.unsqueeze(-1)))
    shift_rows, flat_shifts = parts.shifts.unbind(0), parts.shifts.flatten(1, 2).unsqueeze(2).unbind(0)
    d_key, d_add, d_erase, d_mix, d_beta, d_gamma, d_shift = (part.unbind(0) for part in d_parts)
    gate_rows, memory_rows, across = d_gates.unbind(0), memories.unbind(0), memories.transpose(2, 3).unbind(0)
    place_rows, reading_rows = places.unbind(0), places[:, :, :reading].unbind(0)
    writing_rows, content_rows, dot_rows = places[:, :, reading:].unbind(0), content.unbind(0), dots.unbind(0)
    inverse_rows, log_rows, scaled_rows = inverse.unbind(0), logs.unbind(0), scaled.unbind(0)
    sources = _unfolded(padded, heads.shifts, slots).transpose(2, 3).unbind(0)
    no_rows = (None,) * steps
    given_hidden = no_rows if d_hidden is None else d_hidden.unbind(0)
    given_reads = no_rows if d_reads is None else d_reads.unbind(0)
    d_c = None
    if cells is not None:
        d_c = torch.zeros_like(cells[0]) if d_cell is None else d_cell.clone()
        squashed_slopes = torch.addcmul(squashed.new_ones(()), squashed, squashed, value=-1)
        through = (squashed_slopes * gates[..., 2 * width : 3 * width]).unbind(0)  # dh -> dc
        i, f, o, candidate = gates.chunk(4, -1)
        # d gates = these times (dc, dc, dh, dc)
        to_gates = torch.cat([candidate * i * (1 - i), cells[:-1] * f * (1 - f), squashed * o * (1 - o),
                              i * (1 - candidate * candidate)], -1).unbind(0)  # fmt: skip
        forgets = f.unbind(0)
    else:
        hidden = both[1:, :, :width]
        to_gates = (1 - hidden * hidden).unbind(0)

    for t in range(steps - 1, -1, -1):
        dh, dr, m, w = d_both[:, :width], d_both[:, width:], memory_rows[t], place_rows[t + 1]
        dh = dh if given_hidden[t] is None else dh + given_hidden[t]
        dr = dr if given_reads[t] is None else dr + given_reads[t]
        dr = dr.reshape(batch, reading, slot_width)
        # write, read
        d_m = _write_backward(m, writing_rows[t + 1], erases[t], adds[t], d_m, d_w[:, reading:], d_erase[t], d_add[t])
        d_w[:, :reading] += torch.bmm(dr, across[t])
        # sharpen
        z = torch._softmax_backward_data(d_w, w, -1, w.dtype)  # [B,A,N]
        d_gamma[t].copy_(torch.linalg.vecdot(z, log_rows[t]))
        d_ws = z.mul_(power_rows[t])
        # shift
        d_turned = torch.bmm(d_ws.view(batch * count, 1, slots), sources[t])  # [B*A,1,S]
        d_shifts = d_turned.view(batch, count, -1).flip(-1)
        middle.copy_(d_ws)
        for to, source in ends:
            wide[0, ..., to] = wide[0, ..., source]
        d_wg = torch.bmm(flat_shifts[t], wide_unfolded).view(batch, count, slots)
        # interpolate
        d_mix[t].copy_(torch.linalg.vecdot(d_wg, moved_rows[t]))
        d_wc = d_wg * mixes[t]
        d_w = d_wg.sub_(d_wc)
        # content
        z = torch._softmax_backward_data(d_wc, content_rows[t], -1, w.dtype)
        d_inverse = (z * dot_rows[t]).sum(1)  # [B,N]
        d_dots = z.mul_(inverse_rows[t])
        d_k = torch.bmm(d_dots, m)  # [B,A,M], of the scaled key
        torch.cat([reading_rows[t + 1], d_dots], 1, out=lefts)
        torch.cat([dr, scaled_rows[t]], 1, out=rights)
        d_m.baddbmm_(lefts.transpose(1, 2), rights)
        d_m.addcmul_(m, d_inverse.mul_(cube_rows[t]).unsqueeze(-1), value=-1)
        key = keys[t]
        along = torch.linalg.vecdot(d_k, key)  # [B,A]
        torch.mul(along, k_inverses[t], out=d_beta[t])
        torch.mul(d_k, k_scales[t], out=d_key[t]).addcmul_(key, along.mul_(k_bends[t]).unsqueeze(-1), value=-1)
        # bounds
        bent_rows[t].mul_(slope_rows[t])
        d_shift[t].copy_(torch._softmax_backward_data(d_shifts, shift_rows[t], -1, w.dtype))
        # controller
        dh = torch.addmm(dh, said_rows[t], weight_heads)
        if d_c is not None:
            d_c.addcmul_(dh, through[t])
            dg = torch.mul(torch.cat([d_c, d_c, dh, d_c], 1), to_gates[t], out=gate_rows[t])
            d_c.mul_(forgets[t])
        else:
            dg = torch.mul(dh, to_gates[t], out=gate_rows[t])
        d_both = torch.mm(dg, weight_hidden)
    flat_gates, flat_said = d_gates.flatten(0, 1), d_said.flatten(0, 1)
    d_weight_hidden = flat_gates.t() @ both[:-1].flatten(0, 1)
    d_weight_heads = flat_said.t() @ both[1:, :, :width].flatten(0, 1)
    return (d_gates, d_both[:, :width], d_c, d_m, d_w, d_both[:, width:], d_weight_hidden, d_weight_heads,
            flat_said.sum(0), None)  # fmt: skip


def _ends(slots: int, reach: int) -> list[tuple[slice, slice]]:
    """(to, from) of the copies that repeat the ends of a row of slots, which stands at `reach` of its padded form."""
    if not reach:
        return []
    return [(slice(0, reach), slice(slots, slots + reach)), (slice(slots + reach, None), slice(reach, 2 * reach))]


def _unfolded(padded: Tensor, shifts: int, slots: int) -> Tensor:
    """A view [T,B*A,S,N] of contiguous padded rows [T,B,A,N+S-1]: row s starts s places later."""
    steps, batch, count, length = padded.shape
    return padded.as_strided((steps, batch * count, shifts, slots), (batch * count * length, length, 1, 1))


def _write(memory: Tensor, weightings: Tensor, erase: Tensor, add: Tensor, out: Tensor) -> None:
    """out [B,N,M] = memory prod (1 - w e) + sum w a; weightings [B,W,N], erase, add [B,W,M]. `out` may be `memory`."""
    for head in range(weightings.shape[1]):
        erased = weightings[:, head, :, None] * erase[:, head, None]  # [B,N,M]
        memory = torch.addcmul(memory, memory, erased, value=-1, out=out)
    out.baddbmm_(weightings.transpose(1, 2), add)


def _write_backward(
    memory: Tensor, weightings: Tensor, erase: Tensor, add: Tensor, d_out: Tensor, d_weightings: Tensor,
    d_erase: Tensor, d_add: Tensor,
) -> Tensor:  # fmt: skip
    """The gradient with respect to memory; adds to that of the weightings, fills those of erase and add."""
    d_weightings += torch.bmm(add, d_out.transpose(1, 2))
    d_add.copy_(torch.bmm(weightings, d_out))
    written = weightings.shape[1]
    erased = [weightings[:, head, :, None] * erase[:, head, None] for head in range(written)]
    weighted = d_out * memory  # [B,N,M]
    for head in range(written):
        others = weighted
        for other in range(written):
            if other != head:
                others = others - others * erased[other]
        d_weightings[:, head] -= torch.bmm(others, erase[:, head, :, None])[..., 0]
        torch.neg(torch.bmm(weightings[:, head, None], others)[:, 0], out=d_erase[:, head])
    for part in erased:
        d_out = torch.addcmul(d_out, d_out, part, value=-1, out=d_out)
    return d_out
