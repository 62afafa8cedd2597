"""The fast ways to run a recurrent layer over a whole sequence, and the one place where they are chosen.

    CUDA                                torch's cuDNN kernels
    CPU, float32                        torch's kernels; its LSTM is oneDNN's
    CPU, bfloat16 autocast, LSTM        oneDNN's bfloat16 LSTM with the memory in float32 (`_onednn_lstm`)
    CPU, bfloat16 autocast, others      torch's kernels in bfloat16
    one time step on a CPU              the plain loop: setting up a oneDNN kernel costs four times as much
    GRU, reset before the product       the plain loop

Every function takes inputs [B,T,D], states [B,H], weight_input [G*H,D], weight_hidden [G*H,H], bias [G*H] or None, and
returns outputs [B,T,H] and the final states [B,H], the latter in the type of the states given.

Measured on two cores with AVX-512 bf16, forward and backward, memory kept between steps (`unroll.memory`), in GFLOP/s
where a matrix product runs at 413: batch 64 x 128, H 512: 320; batch 20 x 35, H 200: 238, H 650: 224. A loop of
ours in bfloat16 with prepacked weights reached 338, 135 and 284: not worth its code. What is lost at small batches and
large H is lost in oneDNN's backward pass, which adds up the gradient of weight_hidden step by step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LSTM_MODE = 2
"""Which cell `mkldnn_rnn_layer` runs."""


def loop_is_faster(inputs: Tensor) -> bool:
    """Whether the plain loop beats every kernel for inputs [B,T,D]."""
    return inputs.shape[1] == 1 and inputs.device.type == "cpu"


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
    if _product_type(inputs, weight_input) == torch.bfloat16 and _has_onednn_bfloat16(inputs):
        return _onednn_lstm(inputs, hidden, memory, parameters)
    outputs, last_hidden, last_memory = _torch_kernel(torch.lstm, inputs, (hidden, memory), parameters)
    return outputs, last_hidden, last_memory


def _has_onednn_bfloat16(inputs: Tensor) -> bool:
    if inputs.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _onednn_lstm(
    inputs: Tensor, hidden: Tensor, memory: Tensor, parameters: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """oneDNN's LSTM with bfloat16 products and a float32 memory.

    torch.lstm under autocast hands the memory over in bfloat16, where an increment below 1/256 of its value is lost: a
    memory that should count to 1 in a thousand steps stops at 0.5. The kernel itself keeps the type it is given.
    """
    inputs, hidden, *weights = (tensor.to(torch.bfloat16) for tensor in (inputs, hidden, *parameters))
    with torch.autocast("cpu", enabled=False):
        outputs, last_hidden, last_memory, _ = torch.ops.aten.mkldnn_rnn_layer(
            inputs.transpose(0, 1).contiguous(),  # [T,B,D]
            *weights,
            hidden,
            memory.float(),
            reverse=False,
            batch_sizes=[],
            mode=_LSTM_MODE,
            hidden_size=hidden.shape[1],
            num_layers=1,
            has_biases=True,
            bidirectional=False,
            batch_first=False,
            train=torch.is_grad_enabled(),
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
    """torch.rnn_tanh, gru or lstm for one layer, in one type throughout, which they leave to their caller."""
    kind = _product_type(inputs, parameters[0])
    inputs, *rest = (tensor.to(kind) for tensor in (inputs, *states, *parameters))
    before = [state.unsqueeze(0).contiguous() for state in rest[: len(states)]]  # [1,B,H] each
    weights = rest[len(states) :]
    if inputs.device.type == "cuda":
        weights = _one_chunk(weights)
    first = before if len(before) > 1 else before[0]
    with torch.autocast(inputs.device.type, enabled=False):
        outputs, *after = function(inputs, first, weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
    return [outputs, *(state.squeeze(0).to(given.dtype) for state, given in zip(after, states, strict=True))]


def _one_chunk(weights: list[Tensor]) -> list[Tensor]:
    """The same weights one after the other in memory, as cuDNN wants them: it would copy them itself, and warn."""
    chunk = torch.cat([weight.flatten() for weight in weights])
    parts = chunk.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
