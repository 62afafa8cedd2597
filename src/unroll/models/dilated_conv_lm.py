"""Language models of causal dilated convolutions with residual blocks.

Papers: `gated`: van den Oord et al. 2016, 1609.03499 (WaveNet); `bytenet`: Kalchbrenner et al. 2016, 1610.10099 (the
decoder with its ReLU block); `tcn`: Bai et al. 2018, 1803.01271. Dilations: Yu & Koltun 2015, 1511.07122.

With C_d(x) a causal convolution of dilation d, W a product at each time step, x_0 = embedding of the tokens, and one
block for each of `dilations`:

    gated     z = tanh(C_d(x)) * sigmoid(C'_d(x));  x <- x + W_r z;  s <- s + W_s z;   hidden = relu(W relu(s))
    bytenet   x <- x + W_2 relu(N(C_d(relu(N(W_1 relu(N(x)))))));                      hidden = relu(N(x))
    tcn       x <- relu(x + relu(C_d(relu(C_d(x)))))                                   hidden = x

N is layer normalisation; the convolutions of `tcn` have their weights normalised. Dropout follows every relu inside a
`tcn` block (whole channels, as in the paper, with `shared_over_time`), the gate of a `gated` block and the convolution
of a `bytenet` block, the embedding and the hidden vector. `token_dropout` blanks whole tokens of the input, so that no
prediction can lean on one exact string of them ("blank noise", Xie et al. 2017, 1703.02573).

State: the last (k-1)d inputs of every convolution, so that chunks of any size and single steps give what one pass does.

Deliberate differences: an embedding takes the place of WaveNet's first convolution over one-hot symbols; `layer_norm`
normalises the input of each `gated` block, which WaveNet does not; ByteNet's language model used multiplicative units
in place of the ReLU block of its translation model.

Numbers to reach: tiny-shakespeare, nats per character < 1.50 within 40 minutes on two cores (Kneser-Ney 6-gram 1.5385);
ByteNet's 1.31 bits per character (0.91 nats) on enwik8 and the TCN's 1.31 on PTB characters need a GPU.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.convolution import CausalConvolution, DilatedBlock
from unroll.layers.dropout import Dropout, draw_mask
from unroll.layers.language_model import (
    LanguageModel,
    LanguageModelOutput,
    State,
    embedding_layer,
    numbered,
    output_layer,
    part_of,
)


class Config(Strict):
    """`width` of the residual stream, `channels` inside a block (default: `width`; `bytenet`: half of it)."""

    block: Literal["gated", "bytenet", "tcn"] = "gated"
    width: int = Field(256, ge=1)
    channels: int | None = Field(None, ge=1)
    kernel: int = Field(2, ge=2)
    dilations: list[int] = Field([1, 2, 4, 8, 16, 32], min_length=1)
    layer_norm: bool = False
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    token_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    shared_over_time: bool = False
    tied: bool = False
    cutoffs: list[int] = Field([])

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if min(self.dilations) < 1:
            raise ValueError(f"dilations: found {min(self.dilations)}, allowed is 1 and more")
        if self.layer_norm and self.block != "gated":
            raise ValueError("layer_norm: only blocks of kind gated have a choice")
        if self.tied and self.cutoffs:
            raise ValueError("tied: an adaptive softmax (cutoffs) cannot be tied")
        return self

    @property
    def inside(self) -> int:
        return self.channels or (max(1, self.width // 2) if self.block == "bytenet" else self.width)


TINY: list[dict[str, Any]] = [
    {"block": "gated", "width": 6, "dilations": [1, 2, 5], "token_dropout": 0.2},
    {"block": "gated", "width": 6, "channels": 4, "kernel": 3, "dilations": [2, 1], "layer_norm": True, "tied": True},
    {"block": "bytenet", "width": 6, "kernel": 3, "dilations": [1, 2, 4], "dropout": 0.3},
    {"block": "tcn", "width": 6, "dilations": [1, 3], "dropout": 0.3, "shared_over_time": True, "cutoffs": [4, 8]},
]
"""Small configurations, at least one for each option: what the contract tests build."""


class TokenDropout(nn.Module):
    """Zeroes the vectors of single tokens in training. The others keep their length, as they have it outside training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, embedded: Tensor) -> Tensor:
        """`embedded` [B,T,D] with the vectors of a share `p` of the tokens zeroed."""
        if not self.training or self.p == 0.0:
            return embedded
        mask = draw_mask(embedded.shape[:2], self.p, True, embedded.device, embedded.dtype)  # [B,T]
        return embedded * (mask > 0).unsqueeze(-1)


class GatedBlock(nn.Module):
    """WaveNet's block. The last one feeds the skip sum alone: nothing would read its residual output."""

    def __init__(self, config: Config, dilation: int, last: bool) -> None:
        super().__init__()
        width, channels = config.width, config.inside
        self.norm = nn.LayerNorm(width) if config.layer_norm else nn.Identity()
        self.convolution = CausalConvolution(width, 2 * channels, config.kernel, dilation)
        self.dropout = Dropout(config.dropout, config.shared_over_time)
        self.residual = None if last else nn.Linear(channels, width)
        self.skip = nn.Linear(channels, width)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        return self.convolution.initial_state(batch, device, dtype)

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """inputs [B,T,D] -> residual stream [B,T,D], contribution to the skip sum [B,T,D], state."""
        filtered, state = self.convolution(self.norm(inputs), state)  # [B,T,2C]
        content, gate = filtered.chunk(2, dim=-1)  # [B,T,C]
        gated = self.dropout(torch.tanh(content) * torch.sigmoid(gate))  # [B,T,C]
        outputs = inputs if self.residual is None else inputs + self.residual(gated)
        return outputs, self.skip(gated), state


class BytenetBlock(nn.Module):
    """ByteNet's block, causal, with the outputs that this file's blocks have."""

    def __init__(self, config: Config, dilation: int, last: bool) -> None:
        super().__init__()
        dropout = Dropout(config.dropout, config.shared_over_time)
        self.block = DilatedBlock(config.width, config.inside, config.kernel, dilation, dropout)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        return self.block.initial_state(batch, device, dtype)

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, None, State]:
        """inputs [B,T,D] -> residual stream [B,T,D], no skip, state."""
        outputs, state = self.block(inputs, state)
        return outputs, None, state


class TcnBlock(nn.Module):
    """The TCN's block: two weight-normalised convolutions of the same dilation."""

    def __init__(self, config: Config, dilation: int, last: bool) -> None:
        super().__init__()
        width, channels = config.width, config.inside
        self.first = CausalConvolution(width, channels, config.kernel, dilation, weight_norm=True)
        self.second = CausalConvolution(channels, width, config.kernel, dilation, weight_norm=True)
        self.dropout = Dropout(config.dropout, config.shared_over_time)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        first = self.first.initial_state(batch, device, dtype)
        second = self.second.initial_state(batch, device, dtype)
        return {"first": first["past"], "second": second["past"]}

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, None, State]:
        """inputs [B,T,D] -> residual stream [B,T,D], no skip, state."""
        inner, first = self.first(inputs, {"past": state["first"]})  # [B,T,C]
        outputs, second = self.second(self.dropout(F.relu(inner)), {"past": state["second"]})  # [B,T,D]
        outputs = F.relu(inputs + self.dropout(F.relu(outputs)))
        return outputs, None, {"first": first["past"], "second": second["past"]}


BLOCKS: dict[str, type[GatedBlock | BytenetBlock | TcnBlock]] = {
    "gated": GatedBlock,
    "bytenet": BytenetBlock,
    "tcn": TcnBlock,
}


class Model(LanguageModel):
    """One block for each dilation on a residual stream over the embedded tokens."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        width, count = config.width, len(config.dilations)
        self.embed = embedding_layer(vocabulary, width, config.tied)
        self.token_dropout = TokenDropout(config.token_dropout)
        self.dropout = Dropout(config.dropout, config.shared_over_time)
        block = BLOCKS[config.block]
        self.blocks = nn.ModuleList(block(config, d, last=i == count - 1) for i, d in enumerate(config.dilations))
        self.norm = nn.LayerNorm(width) if config.block == "bytenet" else nn.Identity()
        self.finish = nn.Linear(width, width) if config.block == "gated" else nn.Identity()
        self.output = output_layer(width, vocabulary, config.cutoffs, self.embed if config.tied else None)

    @property
    def receptive_field(self) -> int:
        """Number of tokens, the present one included, on which a prediction depends: 1 + sum of (k-1)d."""
        layers = [layer for layer in self.modules() if isinstance(layer, CausalConvolution)]
        return 1 + sum(layer.history for layer in layers)

    def initial_state(self, batch: int) -> State:
        """Zeros {"<block>.<name>": [B,(k-1)d,C]}: as if zeros had stood before every convolution's first input."""
        weight = self.embed.weight
        state: State = {}
        for i, block in enumerate(self.blocks):
            state |= numbered(i, block.initial_state(batch, weight.device, weight.dtype))  # type: ignore[operator]
        return state

    def forward(self, tokens: Tensor, state: State) -> LanguageModelOutput:
        """`tokens` [B,T] -> hidden [B,T,D]."""
        stream = self.dropout(self.token_dropout(self.embed(tokens)))  # [B,T,D]
        skips: Tensor | None = None
        after: State = {}
        for i, block in enumerate(self.blocks):
            stream, skip, block_state = block(stream, part_of(state, i))
            if skip is not None:
                skips = skip if skips is None else skips + skip
            after |= numbered(i, block_state)
        hidden = self.norm(stream) if skips is None else self.finish(F.relu(skips))
        if self.config.block != "tcn":
            hidden = F.relu(hidden)
        return LanguageModelOutput(self.dropout(hidden), after)
