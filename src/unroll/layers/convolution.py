"""Dilated convolutions over time: causal (output t sees inputs t, t - d, ..., t - (k-1)d) or centred on t, and
ByteNet's residual block of either.

Papers: van den Oord et al. 2016, 1609.03499; Kalchbrenner et al. 2016, 1610.10099 (the block); weight normalisation:
Salimans & Kingma 2016, 1602.07868.

    causal    y_t = b + sum_i W_i x_{t - (k-1-i) d}        with weight normalisation  W = g v / |v|  per output channel
    centred   y_t = b + sum_i W_i x_{t + (i - (k-1)/2) d}
    block     x <- x + W_2 relu(N(C_d(relu(N(W_1 relu(N(x)))))))       N: layer normalisation

Computed as one matrix product over the k shifted inputs laid side by side. Time stays at dim 1, so no transposition
is needed around it, and a step is the same product as a pass. Measured against `conv1d` in bf16 autocast, forward and
backward, two threads of a Zen 4, C=256, B=32, T=256: 21 ms to 24 ms for k=2, 29 ms to 30 ms for k=3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unroll.layers.dropout import Dropout


def side_by_side(inputs: Tensor, kernel: int, dilation: int) -> Tensor:
    """For every time step the `kernel` inputs that it sees, the oldest first.

    Args:
        inputs: [B,(k-1)d+T,C], of which the first (k-1)d steps are history.

    Returns:
        [B,T,k*C]
    """
    length = inputs.shape[1] - (kernel - 1) * dilation
    return torch.cat([inputs[:, tap * dilation : tap * dilation + length] for tap in range(kernel)], dim=-1)


class CausalConvolution(nn.Module):
    """A causal dilated convolution [B,T,C] -> [B,T,C'] whose state is the last (k-1)d inputs.

    State: {"past": [B,(k-1)d,C]}, the oldest first; zeros at the start, as zero padding would give.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, dilation: int = 1, weight_norm: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.kernel, self.dilation = inputs, outputs, kernel, dilation
        bound = 1.0 / math.sqrt(kernel * inputs)
        self.weight = nn.Parameter(torch.empty(outputs, kernel * inputs).uniform_(-bound, bound))  # [C',k*C]
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.gain = nn.Parameter(self.weight.detach().norm(dim=1)) if weight_norm else None  # [C']

    @property
    def history(self) -> int:
        """Inputs before the present one that an output depends on: (k-1)d."""
        return (self.kernel - 1) * self.dilation

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        return {"past": torch.zeros(batch, self.history, self.inputs, device=device, dtype=dtype)}

    def forward(self, inputs: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """`inputs` [B,T,C] -> outputs [B,T,C'] and the state after them, in the type it came in."""
        past, device = state["past"], inputs.device.type
        if torch.is_autocast_enabled(
            device
        ):  # one conversion of each input; autocast itself would convert all k copies
            inputs = inputs.to(torch.get_autocast_dtype(device))
        inputs = torch.cat([past.to(inputs.dtype), inputs], dim=1)  # [B,(k-1)d+T,C]
        weight = self.weight if self.gain is None else self.gain[:, None] * F.normalize(self.weight, dim=1)
        outputs = F.linear(side_by_side(inputs, self.kernel, self.dilation), weight, self.bias)  # [B,T,C']
        return outputs, {"past": inputs[:, inputs.shape[1] - self.history :].to(past.dtype)}


class CentredConvolution(nn.Module):
    """A dilated convolution [B,T,C] -> [B,T,C'] that sees as far ahead as back; zeros stand beyond the ends."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel: found {kernel}, a convolution centred on its output needs an odd one")
        self.kernel, self.dilation = kernel, dilation
        bound = 1.0 / math.sqrt(kernel * inputs)
        self.weight = nn.Parameter(torch.empty(outputs, kernel * inputs).uniform_(-bound, bound))  # [C',k*C]
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` [B,T,C] -> [B,T,C']."""
        reach = (self.kernel - 1) // 2 * self.dilation
        padded = F.pad(inputs, (0, 0, reach, reach))  # [B,T+(k-1)d,C]
        return F.linear(side_by_side(padded, self.kernel, self.dilation), self.weight, self.bias)


class ConvolutionBlock(nn.Module):
    """A residual block around a dilated convolution: x <- x + _after(C_d(_before(x))), which the kinds of block fill in.

    Causal it has a state; centred (`causal` false) it takes a mask instead, so that padding changes nothing.
    """

    convolution: CausalConvolution | CentredConvolution

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The state of a causal block before its first input."""
        assert isinstance(self.convolution, CausalConvolution)
        return self.convolution.initial_state(batch, device, dtype)

    def forward(self, inputs: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """A causal block: inputs [B,T,D] -> residual stream [B,T,D] and the state after them."""
        filtered, state = self.convolution(self._before(inputs), state)  # [B,T,C']
        return inputs + self._after(filtered), state

    def both_ways(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """A centred block: inputs [B,S,D], mask [B,S] (true where there is something) -> residual stream [B,S,D]."""
        filtered = self.convolution(self._before(inputs) * mask[..., None])  # [B,S,C']
        return inputs + self._after(filtered)

    def _before(self, inputs: Tensor) -> Tensor:
        """[B,T,D] -> what the convolution reads [B,T,C]."""
        raise NotImplementedError

    def _after(self, filtered: Tensor) -> Tensor:
        """What the convolution gives [B,T,C'] -> what is added to the residual stream [B,T,D]."""
        raise NotImplementedError


def dilated_convolution(
    causal: bool, inputs: int, outputs: int, kernel: int, dilation: int
) -> CausalConvolution | CentredConvolution:
    return (CausalConvolution if causal else CentredConvolution)(inputs, outputs, kernel, dilation)


class DilatedBlock(ConvolutionBlock):
    """ByteNet's residual block: the convolution works on `channels`, fewer than the `width` of the residual stream."""

    def __init__(
        self, width: int, channels: int, kernel: int, dilation: int, dropout: Dropout, causal: bool = True
    ) -> None:
        super().__init__()
        self.norm_in, self.narrow = nn.LayerNorm(width), nn.Linear(width, channels)
        self.norm_narrow = nn.LayerNorm(channels)
        self.convolution = dilated_convolution(causal, channels, channels, kernel, dilation)
        self.norm_out, self.widen = nn.LayerNorm(channels), nn.Linear(channels, width)
        self.dropout = dropout

    def _before(self, inputs: Tensor) -> Tensor:
        narrow = self.narrow(F.relu(self.norm_in(inputs)))  # [B,T,C]
        return F.relu(self.norm_narrow(narrow))

    def _after(self, filtered: Tensor) -> Tensor:
        return self.widen(self.dropout(F.relu(self.norm_out(filtered))))  # [B,T,D]
