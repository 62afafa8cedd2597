"""The fast ways to run a recurrent layer over a whole sequence, and the one place where they are chosen.

Every function takes inputs [B,T,D], states [B,H], weight_input [G*H,D], weight_hidden [G*H,H], bias [G*H] or None, and returns
outputs [B,T,H] and the final states [B,H], the latter in the type of the states given.

    CUDA                        torch's cuDNN kernels
    CPU, float32 and float64    torch's kernels (oneDNN for a float32 LSTM)
    CPU, bfloat16 autocast      oneDNN's bfloat16 LSTM with the memory in float32, see `_onednn_lstm`; else torch's kernels
    one step on a CPU, or a GRU with the reset gate before the product: the plain loop (`layers/recurrent.py`)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LSTM_MODE = 2
"""Which cell `mkldnn_rnn_layer` runs."""


def rnn(
    inputs: Tensor, hidden: Tensor, weight_input: Tensor, weight_hidden: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Elman RNN."""
    outputs, last = _torch_kernel(torch.rnn_tanh, inputs, (hidden,), _parameters(weight_input, weight_hidden, bias))
    return outputs, last


def gru(
    inputs: Tensor,
    hidden: Tensor,
    weight_input: Tensor,
    weight_hidden: Tensor,
    bias: Tensor | None,
    bias_hidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """GRU with the reset gate after the product; bias_hidden [H] belongs to the candidate."""
    parameters = _parameters(weight_input, weight_hidden, bias, bias_hidden)
    outputs, last = _torch_kernel(torch.gru, inputs, (hidden,), parameters)
    return outputs, last


def lstm(
    inputs: Tensor, hidden: Tensor, memory: Tensor, weight_input: Tensor, weight_hidden: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """LSTM; `memory` stays in its own type throughout, except on CUDA under autocast."""
    parameters = _parameters(weight_input, weight_hidden, bias)
    run = _onednn_lstm if _product_type(inputs, weight_input) == torch.bfloat16 and _has_onednn(inputs) else None
    if run is not None:
        return run(inputs, hidden, memory, parameters)
    outputs, last_hidden, last_memory = _torch_kernel(torch.lstm, inputs, (hidden, memory), parameters)
    return outputs, last_hidden, last_memory


def _has_onednn(inputs: Tensor) -> bool:
    available = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return inputs.device.type == "cpu" and bool(available)


def _onednn_lstm(
    inputs: Tensor, hidden: Tensor, memory: Tensor, parameters: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """oneDNN's LSTM with bfloat16 products and a float32 memory.

    torch.lstm under autocast hands the memory over in bfloat16, where an increment below 1/256 of its value is lost: a memory
    that should count to 1 in a thousand steps stops at 0.5. The kernel itself keeps the type it is given.
    """
    inputs, hidden, *weights = (tensor.to(torch.bfloat16) for tensor in (inputs, hidden, *parameters))
    weight_input, weight_hidden, bias, zeros = weights
    with torch.autocast("cpu", enabled=False):
        outputs, last_hidden, last_memory, _ = torch.ops.aten.mkldnn_rnn_layer(
            inputs.transpose(0, 1).contiguous(),  # [T,B,D]
            weight_input,
            weight_hidden,
            bias,
            zeros,
            hidden,
            memory.float(),
            False,
            [],
            _LSTM_MODE,
            hidden.shape[1],
            1,
            True,
            False,
            False,
            torch.is_grad_enabled(),
        )
    return outputs.transpose(0, 1), last_hidden.to(memory.dtype), last_memory.to(memory.dtype)


def _product_type(inputs: Tensor, weight: Tensor) -> torch.dtype:
    device = inputs.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _parameters(
    weight_input: Tensor, weight_hidden: Tensor, bias: Tensor | None, bias_hidden: Tensor | None = None
) -> list[Tensor]:
    """The four tensors of torch's kernels; ours have one bias, so the second is zero but where `bias_hidden` acts."""
    zeros = weight_hidden.new_zeros(len(weight_hidden))  # [G*H]
    second = zeros if bias_hidden is None else torch.cat([zeros[: -len(bias_hidden)], bias_hidden])
    return [weight_input, weight_hidden, zeros if bias is None else bias, second]


def _torch_kernel(
    function: Callable[..., Any], inputs: Tensor, states: tuple[Tensor, ...], parameters: list[Tensor]
) -> list[Tensor]:
    """torch.rnn_tanh, gru or lstm for one layer, in one type throughout, which these functions leave to their caller."""
    kind = _product_type(inputs, parameters[0])
    inputs, *rest = (tensor.to(kind) for tensor in (inputs, *states, *parameters))
    before = [state.unsqueeze(0).contiguous() for state in rest[: len(states)]]  # [1,B,H] each
    weights = rest[len(states) :]
    first = before if len(before) > 1 else before[0]
    with torch.autocast(inputs.device.type, enabled=False):
        outputs, *after = function(inputs, first, weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
    return [outputs, *(state.squeeze(0).to(given.dtype) for state, given in zip(after, states, strict=True))]
