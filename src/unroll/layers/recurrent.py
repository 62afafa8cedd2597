"""Recurrent sequence layers, RNN, LSTM and GRU: `layer(inputs [B,T,D], state) -> (outputs [B,T,H], state)`.

Papers: Elman 1990 (RNN); Hochreiter & Schmidhuber 1997 with the forget gate of Gers 2000 (LSTM); Cho 2014,
arXiv:1406.1078 (GRU). Equations, with * the elementwise product and W = weight_input, U = weight_hidden, b = bias, of
which every gate has a block of its own:

    RNN    h_t = tanh(W x_t + U h_{t-1} + b)
    LSTM   f, i, o = sigmoid(W x_t + U h_{t-1} + b)      forget, input and output gate
           c~ = tanh(W x_t + U h_{t-1} + b)              candidate
           c_t = f * c_{t-1} + i * c~                    memory: f = 1, i = 0 leaves it unchanged, exactly
           h_t = o * tanh(c_t)
    GRU    r, z = sigmoid(W x_t + U h_{t-1} + b)         reset and update gate
           reset="before"  h~ = tanh(W x_t + U (r * h_{t-1}) + b)             h_t = (1 - z) * h_{t-1} + z * h~
           reset="after"   h~ = tanh(W x_t + b + r * (U h_{t-1} + b_hidden))  h_t = z * h_{t-1} + (1 - z) * h~

`before` is the form of the paper and of the course (whose GRU has no biases: `bias=False`), `after` that of cuDNN and
torch. The two differ in where r acts and, by the toolkits' convention, in which side of the mixture z weighs.

Deliberate differences from `torch.nn`: one bias for the sum W x + U h instead of two that only ever act as a sum (under
plain SGD torch's pair therefore learns twice as fast); the forget gate's bias starts at 1 (Jozefowicz 2015), not near
0. The rows of the weights stand in torch's order (LSTM: input, forget, candidate, output; GRU: reset, update,
candidate), so that torch's weights copy straight in and its kernels run on ours without a copy.

State goes in and comes out, batch at dimension 0 of every tensor, in the parameters' type (float32 under autocast,
where the outputs may be bfloat16). `method="loop"` is the plain loop over time, kept as the reference that the fast
paths of `recurrent_kernels.py` must equal in outputs and gradients.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unroll.config import check, load_part
from unroll.errors import UserError
from unroll.layers import recurrent_kernels as kernels

State = dict[str, Tensor]

HOLD = 1e4
"""Drives a gate to exactly 0 or 1, whatever else is added to it."""
_HOLD_COLUMNS = 8
"""The one column that marks padding, filled up to a width that the matrix kernels like."""


class RecurrentLayer(nn.Module):
    """What the three layers share: parameters, state, the choice between loop and fast path, the loop itself.

    A layer has `gates` blocks of weights and the state tensors named in `state_names`.
    """

    gates: int
    state_names: tuple[str, ...] = ("hidden",)

    def __init__(
        self, input_width: int, width: int, *, bias: bool = True, method: Literal["fast", "loop"] = "fast"
    ) -> None:
        super().__init__()
        self.input_width, self.width, self.method = input_width, width, method
        self.weight_input = nn.Parameter(torch.empty(self.gates * width, input_width))  # [G*H,D]
        self.weight_hidden = nn.Parameter(torch.empty(self.gates * width, width))  # [G*H,H]
        self.bias = nn.Parameter(torch.empty(self.gates * width)) if bias else None  # [G*H]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(H), as torch.nn does."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.width**-0.5), self.width**-0.5)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros [B,H] for each name of the state, by default where the parameters are and of their type."""
        like = self.weight_hidden
        return {
            name: torch.zeros(batch, self.width, device=device or like.device, dtype=dtype or like.dtype)
            for name in self.state_names
        }

    def forward(
        self, inputs: Tensor, state: State, weight_hidden: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Run over [B,T,D] from `state`; returns the hidden states [B,T,H] and the state after the last step.

        `weight_hidden` [G*H,H] stands in for the parameter of that name (weight drop). Steps where `mask` [B,T] is
        false (padding, before or after the sequence) leave the state as it is, exactly; their outputs mean nothing.
        Raises ValueError when a shape is wrong.
        """
        weight_hidden = self.weight_hidden if weight_hidden is None else weight_hidden
        self._check(inputs, state, weight_hidden)
        if mask is not None and not bool(mask.all()):
            return self._run_masked(inputs, state, weight_hidden, mask)
        return self._run(inputs, state, self.weight_input, weight_hidden)

    def _run(self, inputs: Tensor, state: State, weight_input: Tensor, weight_hidden: Tensor) -> tuple[Tensor, State]:
        if self.method == "loop" or kernels.loop_is_faster(inputs):
            return self.loop(inputs, state, weight_input, weight_hidden)
        return self.fast(inputs, state, weight_input, weight_hidden)

    def _run_masked(self, inputs: Tensor, state: State, weight_hidden: Tensor, mask: Tensor) -> tuple[Tensor, State]:
        """Masked steps carry one more input, 1, whose weights shut the gates: no kernel needs to know of masks.

        A gate driven by +-HOLD is exactly 0 or 1. The hidden vector of an LSTM still changes with the output gate, so
        the last real one is taken from the outputs.
        """
        hold = torch.zeros(len(weight_hidden), _HOLD_COLUMNS, dtype=inputs.dtype, device=inputs.device)  # [G*H,8]
        hold[:, 0] = self.hold_column().to(inputs)
        marks = F.pad((~mask).to(inputs.dtype)[..., None], (0, _HOLD_COLUMNS - 1))  # [B,T,8]
        weight_input = torch.cat([self.weight_input, hold.to(self.weight_input.dtype)], 1)  # [G*H,D+8]
        outputs, after = self._run(torch.cat([inputs, marks], -1), state, weight_input, weight_hidden)
        steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        last = (mask * steps).amax(1)  # [B] number of the last real step, 0 if there is none
        index = (last - 1).clamp_min(0)[:, None, None].expand(-1, 1, self.width)
        hidden = outputs.gather(1, index).squeeze(1).to(state["hidden"].dtype)  # [B,H]
        return outputs, {**after, "hidden": torch.where(last[:, None] > 0, hidden, state["hidden"])}

    def hold_column(self) -> Tensor:
        """What to add to the gates [G*H] so that a step leaves the memory as it is."""
        raise UserError(f"{type(self).__name__}: has no gate that could hold its state over padding; use lstm or gru")

    def loop(self, inputs: Tensor, state: State, weight_input: Tensor, weight_hidden: Tensor) -> tuple[Tensor, State]:
        """The reference: one `step` after the other."""
        outputs = []
        for projected in F.linear(inputs, weight_input, self.bias).unbind(1):  # [B,G*H] each
            state = self.step(projected, state, weight_hidden)
            outputs.append(state["hidden"])
        return torch.stack(outputs, 1), state  # [B,T,H]

    def step(self, projected: Tensor, state: State, weight_hidden: Tensor) -> State:
        """The equations: from W x_t + b [B,G*H] and the state before to the state after."""
        raise NotImplementedError

    def fast(self, inputs: Tensor, state: State, weight_input: Tensor, weight_hidden: Tensor) -> tuple[Tensor, State]:
        """The same as `loop`, in the fastest way known for this device and type."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.input_width}, {self.width}, bias={self.bias is not None}, method={self.method!r}"

    def _check(self, inputs: Tensor, state: State, weight_hidden: Tensor) -> None:
        name = type(self).__name__
        if inputs.dim() != 3 or inputs.shape[1] == 0 or inputs.shape[2] != self.input_width:
            raise ValueError(f"{name}: inputs are {tuple(inputs.shape)}, expected [B,T,{self.input_width}] with T >= 1")
        tensors = {"weight_hidden": weight_hidden, **{key: state[key] for key in self.state_names}}
        for key, tensor in tensors.items():
            rows = len(self.weight_hidden) if key == "weight_hidden" else len(inputs)
            if tensor.shape != (rows, self.width):
                raise ValueError(f"{name}: {key} is {tuple(tensor.shape)}, expected {(rows, self.width)}")


class RNN(RecurrentLayer):
    """Elman's tanh network; state {"hidden": [B,H]}."""

    gates = 1

    def step(self, projected: Tensor, state: State, weight_hidden: Tensor) -> State:
        hidden = torch.tanh(projected + F.linear(state["hidden"], weight_hidden))  # [B,H]
        return {"hidden": hidden.to(weight_hidden.dtype)}

    def fast(self, inputs: Tensor, state: State, weight_input: Tensor, weight_hidden: Tensor) -> tuple[Tensor, State]:
        outputs, hidden = kernels.rnn(inputs, state["hidden"], weight_input, weight_hidden, self.bias)
        return outputs, {"hidden": hidden}


class LSTM(RecurrentLayer):
    """Long short-term memory; state {"hidden": [B,H], "memory": [B,H]}.

    `forget_bias` is the forget gate's bias at the start; None leaves it at torch's noise around 0.
    """

    gates = 4
    state_names = ("hidden", "memory")

    def __init__(self, input_width: int, width: int, *, forget_bias: float | None = 1.0, **options: Any) -> None:
        self.forget_bias = forget_bias
        super().__init__(input_width, width, **options)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None and self.forget_bias is not None:
            nn.init.constant_(self.bias[self.width : 2 * self.width], self.forget_bias)

    def hold_column(self) -> Tensor:
        hold = torch.zeros(4, self.width)
        hold[0], hold[1] = -HOLD, HOLD  # input gate 0, forget gate 1
        return hold.flatten()

    def step(self, projected: Tensor, state: State, weight_hidden: Tensor) -> State:
        gates = projected + F.linear(state["hidden"], weight_hidden)  # [B,4H]
        i, f, candidate, o = gates.chunk(4, -1)  # [B,H] each
        memory = f.sigmoid() * state["memory"] + i.sigmoid() * candidate.tanh()  # [B,H]
        return {"hidden": o.sigmoid() * memory.tanh(), "memory": memory}

    def fast(self, inputs: Tensor, state: State, weight_input: Tensor, weight_hidden: Tensor) -> tuple[Tensor, State]:
        outputs, hidden, memory = kernels.lstm(
            inputs, state["hidden"], state["memory"], weight_input, weight_hidden, self.bias
        )
        return outputs, {"hidden": hidden, "memory": memory}


class GRU(RecurrentLayer):
    """Gated recurrent unit with the reset gate `before` (Cho 2014) or `after` (cuDNN) the recurrent product.

    State {"hidden": [B,H]}. `after` has one more parameter, `bias_hidden` [H], which r scales and which therefore
    cannot be merged into `bias`. No library has a kernel for `before`: it runs as a loop.
    """

    gates = 3

    def __init__(
        self, input_width: int, width: int, *, reset: Literal["before", "after"] = "before", **options: Any
    ) -> None:
        if reset not in ("before", "after"):
            raise UserError(f"gru: reset is {reset!r}, allowed: 'before', 'after'")
        self.reset = reset
        super().__init__(input_width, width, **options)
        self.bias_hidden: nn.Parameter | None = None
        if reset == "after" and self.bias is not None:
            self.bias_hidden = nn.Parameter(torch.empty(width).uniform_(-(width**-0.5), width**-0.5))  # [H]

    def hold_column(self) -> Tensor:
        hold = torch.zeros(3, self.width)
        hold[1] = HOLD if self.reset == "after" else -HOLD  # the update gate that keeps the hidden vector
        return hold.flatten()

    def step(self, projected: Tensor, state: State, weight_hidden: Tensor) -> State:
        hidden, width = state["hidden"], self.width
        if self.reset == "after":
            recurrent = F.linear(hidden, weight_hidden)  # [B,3H]
            r, z = (projected + recurrent)[:, : 2 * width].sigmoid().chunk(2, -1)  # [B,H] each
            inner = recurrent[:, 2 * width :]
            inner = inner if self.bias_hidden is None else inner + self.bias_hidden
            candidate = torch.tanh(projected[:, 2 * width :] + r * inner)  # [B,H]
            mixed = z * hidden + (1 - z) * candidate
        else:
            recurrent = F.linear(hidden, weight_hidden[: 2 * width])  # [B,2H]
            r, z = (projected[:, : 2 * width] + recurrent).sigmoid().chunk(2, -1)  # [B,H] each
            candidate = torch.tanh(projected[:, 2 * width :] + F.linear(r * hidden, weight_hidden[2 * width :]))
            mixed = (1 - z) * hidden + z * candidate
        return {"hidden": mixed.to(weight_hidden.dtype)}

    def fast(self, inputs: Tensor, state: State, weight_input: Tensor, weight_hidden: Tensor) -> tuple[Tensor, State]:
        if self.reset == "before":
            return self.loop(inputs, state, weight_input, weight_hidden)
        outputs, hidden = kernels.gru(inputs, state["hidden"], weight_input, weight_hidden, self.bias, self.bias_hidden)
        return outputs, {"hidden": hidden}


CELLS: dict[str, type[RecurrentLayer]] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}


def recurrent_layer(cell: str, input_width: int, width: int, **options: Any) -> RecurrentLayer:
    """The layer called `cell` ("rnn", "lstm", "gru") with its class's options. Raises UserError for an unknown name."""
    if cell not in CELLS:
        raise UserError(f"recurrent layer: cell is {cell!r}, allowed: {', '.join(CELLS)}")
    return CELLS[cell](input_width, width, **options)


def cell_config(cell: str, options: Mapping[str, Any]) -> Any:
    """The typed options of a cell: none of those of this file, the `Config` of a file of `layers/` with a `Layer`.

    Raises:
        ValueError: no such cell, or options that it does not have; one line, for the validators of models.
    """
    if cell in CELLS:
        if options:
            raise ValueError(f"options: cell {cell} has none here")
        return None
    try:
        return check(
            load_part("layers", cell, f"cell is none of {', '.join(CELLS)}").Config, options, f"options of {cell}"
        )
    except UserError as error:
        raise ValueError(str(error)) from None


def sequence_layer(cell: str, input_width: int, width: int, options: Mapping[str, Any]) -> Any:
    """Any layer of the signature `(inputs [B,T,D], state) -> (outputs [B,T,H], state)`, by its name: a cell of this file,
    or the `Layer` of the file of `layers/` that is called so. Stage `dependencies` knows the name from the recipe."""
    config = cell_config(cell, options)
    if cell in CELLS:
        return recurrent_layer(cell, input_width, width)
    return load_part("layers", cell, "cell").Layer(input_width, width, config)
