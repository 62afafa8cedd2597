"""ByteNet: a translator of dilated convolutions in which the decoder is stacked on the encoder.

Paper: Kalchbrenner et al. 2016, arXiv:1610.10099. Two networks of residual blocks (equations: `layers/convolution.py`),
whose dilations double and start anew: the encoder's look both ways over the source, the decoder's only back.

    m_1 .. m_S = encoder(x_1 .. x_S)                      one column for each source token, m_t = 0 for t > S
    y~_t = W [y_t ; m_t]                                  the decoder reads target token t and column t side by side
    p(y_{t+1} | ...) = softmax(b + U relu(N(decoder(y~_1 .. y~_t))))

There is no attention: what target token t needs of the source must have been brought to column t by the encoder, or be
found further back by the decoder. Dynamic unfolding: the decoder goes on past the end of the source, reading zeros,
until it writes EOS. Its work is linear in the lengths.

Options beside the paper, each of which leaves the work linear and the target without attention:

    block: gated          x <- x + W_2 (a * sigmoid(g)),  [a ; g] = C_d(W_1 N(x))      Dauphin et al. 2016, 1612.08083
    columns: every_block  x_t <- x_t + V_l m_t before decoder block l
    positions             sinusoids (Vaswani et al. 2017, 1706.03762) times a learnt number, added to both embeddings

Gates let what a decoder reads of a column depend on what it wrote before; rectifiers learn that slowly. Validation BLEU
on Multi30k de-en: 9.9 after 200 updates with all three; an earlier run with none of them (and more dropout, drawn
subwords) had 16.8 after 2,400. A mean of all columns added to each was tried on top and made it worse (7.6 after 200).

Deliberate differences: the paper gives the decoder |t^| = a |s| + b columns and masks what lies beyond, which is what
the limit of the search (`beam.longest`) says here; embeddings of tokens stand where the paper has n-gram bags of
characters; the softmax may share the target embedding.

Numbers to reach: Multi30k de-en subwords, BLEU 30 (ConvS2S, which has attention, 34.14 on other tokens).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.attention import spread
from unroll.layers.convolution import ConvolutionBlock, DilatedBlock, dilated_convolution
from unroll.layers.dropout import Dropout
from unroll.layers.generator import ConditionalGenerator, GeneratorOutput, State
from unroll.layers.language_model import embedding_layer, numbered, part_of
from unroll.layers.softmax import Softmax


class Config(Strict):
    """`width` of the residual stream, `channels` inside a block (default: half of it); `embedding` of both sides
    (default: `width`). `block`, `columns`, `positions`: see the top of this file. `dropout` is within blocks,
    `output_dropout` (default: the same) of the last vector before the softmax."""

    width: int = Field(256, ge=2)
    embedding: int | None = Field(None, ge=1)
    encoder_kernel: int = Field(3, ge=1)
    kernel: int = Field(3, ge=2)
    encoder_dilations: list[int] = Field([1, 2, 4, 8, 16], min_length=1)
    dilations: list[int] = Field([1, 2, 4, 8, 16], min_length=1)
    channels: int | None = Field(None, ge=1)
    block: Literal["bytenet", "gated"] = "bytenet"
    columns: Literal["first_block", "every_block"] = "first_block"
    positions: bool = False
    tied: Literal["none", "decoder", "all"] = "none"
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    input_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    output_dropout: float | None = Field(None, ge=0.0, lt=1.0)
    shared_over_time: bool = False


TINY: list[dict[str, Any]] = [
    {"width": 6, "encoder_dilations": [1, 2], "dilations": [1, 2]},
    {"width": 8, "embedding": 5, "encoder_kernel": 1, "kernel": 2, "encoder_dilations": [1], "dilations": [2, 1],
     "tied": "all", "dropout": 0.2, "input_dropout": 0.2, "shared_over_time": True},
    {"width": 6, "channels": 4, "block": "gated", "columns": "every_block", "positions": True,
     "output_dropout": 0.3, "encoder_dilations": [1, 2], "dilations": [1, 2]},
]  # fmt: skip
"""Small configurations, at least one for each option: what the contract tests build."""


class GatedBlock(ConvolutionBlock):
    """A gated linear unit in place of ByteNet's rectifiers, and one normalisation in place of three."""

    def __init__(
        self, width: int, channels: int, kernel: int, dilation: int, dropout: Dropout, causal: bool = True
    ) -> None:
        super().__init__()
        self.norm, self.narrow = nn.LayerNorm(width), nn.Linear(width, channels)
        self.convolution = dilated_convolution(causal, channels, 2 * channels, kernel, dilation)
        self.widen, self.dropout = nn.Linear(channels, width), dropout

    def _before(self, inputs: Tensor) -> Tensor:
        narrow: Tensor = self.narrow(self.norm(inputs))  # [B,T,C]
        return narrow

    def _after(self, filtered: Tensor) -> Tensor:
        return self.widen(self.dropout(F.glu(filtered)))  # [B,T,D]


class Model(ConditionalGenerator):
    """Encoder, decoder and softmax. `vocabulary`: {"source": size, "target": size}, BOS and EOS included."""

    def __init__(self, config: Config, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        width, embedding = config.width, config.embedding or config.width
        channels = config.channels or width // 2
        self.embed_target = embedding_layer(vocabulary["target"], embedding, True)
        same = config.tied == "all"
        self.embed_source = self.embed_target if same else embedding_layer(vocabulary["source"], embedding, True)
        self.input_dropout = Dropout(config.input_dropout, config.shared_over_time)
        dropout = Dropout(config.dropout, config.shared_over_time)
        block = GatedBlock if config.block == "gated" else DilatedBlock
        self.position_gain = nn.Parameter(torch.full((2,), 0.1)) if config.positions else None  # source, target
        self.read = nn.Linear(embedding, width)
        self.encoder = nn.ModuleList(
            block(width, channels, config.encoder_kernel, dilation, dropout, causal=False)
            for dilation in config.encoder_dilations
        )
        self.norm_memory = nn.LayerNorm(width)
        self.join = nn.Linear(embedding + width, width)
        self.decoder = nn.ModuleList(
            block(width, channels, config.kernel, dilation, dropout) for dilation in config.dilations
        )
        above = len(config.dilations) - 1 if config.columns == "every_block" else 0
        self.read_column = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(above))
        self.norm = nn.LayerNorm(width)
        dropped = config.dropout if config.output_dropout is None else config.output_dropout
        self.output_dropout = Dropout(dropped, config.shared_over_time)
        self.finish = nn.Linear(width, embedding)
        tied = None if config.tied == "none" else self.embed_target
        self.output = Softmax(embedding, vocabulary["target"], tied)

    def encode(self, inputs: Mapping[str, Tensor]) -> State:
        """`source` [B,S] and `source_lengths` [B] -> memory: values [B,S,D] (0 beyond the source), mask [B,S]."""
        source, lengths = inputs["source"], inputs["source_lengths"]  # [B,S] [B]
        mask = torch.arange(source.shape[1], device=source.device) < lengths[:, None]  # [B,S]
        embedded = self.embed_source(source)  # [B,S,E]
        if self.position_gain is not None:
            places = torch.arange(source.shape[1], device=source.device)[None]
            embedded = embedded + self.position_gain[0] * sinusoids(places, embedded.shape[-1])
        stream = self.read(self.input_dropout(embedded))  # [B,S,D]
        for block in self.encoder:
            stream = block.both_ways(stream, mask)  # type: ignore[operator]
        return {"values": self.norm_memory(stream) * mask[..., None], "mask": mask}

    def initial_state(self, memory: State) -> State:
        """{"<block>.past": [B,(k-1)d,C], "position": [B]}, the number of target tokens read."""
        weight, rows = self.embed_target.weight, len(memory["mask"])
        state: State = {"position": torch.zeros(rows, dtype=torch.int64, device=weight.device)}
        for number, block in enumerate(self.decoder):
            state |= numbered(number, block.initial_state(rows, weight.device, weight.dtype))  # type: ignore[operator]
        return state

    def forward(self, tokens: Tensor, memory: State, state: State) -> GeneratorOutput:
        """`tokens` [N,T] -> hidden [N,T,E]."""
        embedded = self.embed_target(tokens)  # [N,T,E]
        if self.position_gain is not None:
            places = state["position"][:, None] + torch.arange(tokens.shape[1], device=tokens.device)  # [N,T]
            embedded = embedded + self.position_gain[1] * sinusoids(places, embedded.shape[-1])
        embedded = self.input_dropout(embedded)
        columns = self.columns(memory, state["position"], tokens.shape[1])  # [N,T,D]
        stream = self.join(torch.cat([embedded, columns.to(embedded.dtype)], -1))  # [N,T,D]
        after: State = {"position": state["position"] + tokens.shape[1]}
        for number, block in enumerate(self.decoder):
            if number and self.read_column:
                stream = stream + self.read_column[number - 1](columns)
            stream, block_state = block(stream, part_of(state, number))
            after |= numbered(number, block_state)
        hidden = self.finish(self.output_dropout(F.relu(self.norm(stream))))  # [N,T,E]
        return GeneratorOutput(hidden, after)

    def columns(self, memory: State, positions: Tensor, count: int) -> Tensor:
        """The encoder's columns `positions` [N] .. + `count` - 1 for each hypothesis [N,T,D]; zeros past the source."""
        values = memory["values"]  # [B,S,D]
        rows, length, width = values.shape
        if not rows:
            return values.new_zeros(0, count, width)
        places = positions[:, None] + torch.arange(count, device=values.device)  # [N,T]
        index = spread(places.clamp(max=length - 1), rows).flatten(1)  # [B,K*T]
        found = values.gather(1, index[..., None].expand(-1, -1, width)).reshape(len(positions), count, width)
        return found * (places < length)[..., None]


def sinusoids(places: Tensor, width: int) -> Tensor:
    """sin and cos of `places` [N,T] at `width` / 2 frequencies from 1 down to 1/10000: [N,T,width] float32."""
    half = -(-width // 2)
    rates = torch.exp(torch.arange(half, device=places.device) * (-math.log(10_000) / max(1, half - 1)))  # [half]
    angles = places[..., None] * rates  # [N,T,half]
    return torch.cat([angles.sin(), angles.cos()], -1)[..., :width]
