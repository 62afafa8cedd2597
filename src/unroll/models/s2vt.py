"""Sequence to sequence, video to text: two LSTMs, one above the other, read the frames and then write the words.

Paper: Venugopalan et al. 2015, arXiv:1505.00487. With f_s the vector of frame s (`layers/vision.py`), E the embedding of
words, and 0 where there is no input (the paper's <pad>):

    reading, s = 1 .. S    h1_s = LSTM_1(f_s, .)      h2_s = LSTM_2([h1_s ; 0], .)
    writing, t = 0 .. T    h1_t = LSTM_1(0, .)        h2_t = LSTM_2([h1_t ; E y_t], .)
    p(y_{t+1} | ...) = softmax(b + U h2_t)

Both phases use the same parameters, and the states go on from one into the other. With `attention` (Yao et al. 2015,
1502.08029: temporal attention) the word is also told what the frames were that it is about,

    c_t = sum_s alpha_ts [f_s ; h2_s]     p(y_{t+1} | ...) = softmax(b + U tanh(W [h2_t ; c_t]))

where the weights come from h2_t, after the recurrent layer, so that all steps of training are computed by one kernel.
f_s is a mean over the places of a frame, which no longer says which colour belongs to which shape. With `regions` the
decoder attends to every place of every frame instead, as Xu et al. 2015 (1502.03044) do to those of one picture:

    c_t = sum_s sum_p alpha_tsp [f_sp ; h2_s]         f_sp: the vector of region p of frame s

h2_s holds what all frames so far showed, and lets a model learn which things go together instead of what a region is. With
`times` a learnt vector of the frame's number, e_s, stands in its place: [f_sp ; e_s]. Neither says which of two things
moves; with `motion` a region knows of itself in the frames before and after (a convolution over time, Tran et al. 2015,
1412.0767), 0 before the first and after the last:

    f_sp <- f_sp + relu(V_1 f_{s-1,p} + V_2 f_sp + V_3 f_{s+1,p} + v)

With `third_layer` an LSTM reads
what was looked at and remembers it, as in `show_attend_tell`'s `two_layers`, so that what has been named is known from
the pictures too and not from the words alone:

    h3_t = LSTM_3([h2_t ; c_t], h3_{t-1})             p(y_{t+1} | ...) = softmax(b + U tanh(W [h3_t ; c_t]))

Deliberate differences: the frames' network is trained with the rest; one picture is a clip of one frame.

Number to reach: MSVD, METEOR 29.8 (RGB and optical flow; 29.2 with RGB alone), with VGG.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.attention import attention_layer
from unroll.layers.dropout import Dropout, WordDropout
from unroll.layers.generator import ConditionalGenerator, GeneratorOutput, State, read_memory
from unroll.layers.language_model import embedding_layer, numbered, part_of
from unroll.layers.recurrent import LSTM
from unroll.layers.softmax import Softmax
from unroll.layers.vision import Vision, VisionOptions, seen


class Config(Strict):
    """`frame`: width of a frame's vector; `regions`: attention looks at the regions of all frames; `times`: so many frames
    have a vector that says which one it is, in the place of the LSTM's state, 0 for the state; `motion`: a region knows
    of itself in the frames before and after; `third_layer`: an LSTM after attention; `dropout` of embedded words and what
    goes into the softmax; `word_dropout` of whole words that are read, so that the next one comes from the picture and
    not from those before."""

    encoder: VisionOptions = VisionOptions()
    frame: int = Field(128, ge=1)
    embedding: int = Field(256, ge=1)
    width: int = Field(256, ge=1)
    attention: Literal["none", "additive", "general"] = "none"
    regions: bool = False
    times: int = Field(0, ge=0)
    motion: bool = False
    third_layer: bool = False
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    word_dropout: float = Field(0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def known(self) -> Self:
        if self.regions and self.attention == "none":
            raise ValueError("regions: says what attention looks at, found attention none; use additive or general")
        if self.attention == "none" and (self.times or self.third_layer):
            raise ValueError("times, third_layer: are for attention, found attention none; use additive or general")
        return self


TINY: list[dict[str, Any]] = [
    {"encoder": {"widths": [4, 8], "groups": 2}, "frame": 4, "embedding": 5, "width": 6},
    {"encoder": {"widths": [4, 8], "groups": 2, "dropout": 0.2}, "frame": 4, "embedding": 5, "width": 6,
     "attention": "general", "dropout": 0.2, "word_dropout": 0.1},
    {"encoder": {"widths": [4], "groups": 2}, "frame": 4, "embedding": 5, "width": 6, "attention": "additive"},
    {"encoder": {"widths": [4], "groups": 2, "dropout": 0.2}, "frame": 4, "embedding": 5, "width": 6,
     "attention": "general", "regions": True},
    {"encoder": {"widths": [4], "groups": 2}, "frame": 4, "embedding": 5, "width": 6, "attention": "general",
     "regions": True, "times": 3, "third_layer": True},
    {"encoder": {"widths": [4], "groups": 2, "colour": "strongest", "grey": 0.5}, "frame": 4, "embedding": 5, "width": 6,
     "attention": "general", "motion": True},
    {"encoder": {"blind": True}, "frame": 4, "embedding": 5, "width": 6},
]  # fmt: skip
"""Small configurations, at least one for each option: what the contract tests build."""


class Model(ConditionalGenerator):
    """Encoder of frames, two LSTMs, softmax. `vocabulary`: {"target": size}, BOS and EOS included."""

    reads = "frames"

    def __init__(self, config: Config, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        words, width = vocabulary["target"], config.width
        self.vision = Vision(config.encoder, config.frame)
        self.embed_target = embedding_layer(words, config.embedding, tied=False)
        self.lower, self.upper = LSTM(config.frame, width), LSTM(width + config.embedding, width)
        self.dropout = Dropout(config.dropout, shared_over_time=True)
        self.word_dropout = WordDropout(config.word_dropout, words)
        memory = config.frame + width
        self.attention = None if config.attention == "none" else attention_layer(config.attention, width, memory)
        self.combine = None if self.attention is None else nn.Linear(width + memory, width)
        self.times = nn.Parameter(torch.randn(config.times, width) * 0.1) if config.times else None
        self.motion = nn.Linear(3 * config.frame, config.frame) if config.motion else None
        self.third = LSTM(width + memory, width) if config.third_layer else None
        self.output = Softmax(width, words)

    # --- reading ----------------------------------------------------------------------------------------------------

    def encode(self, inputs: Mapping[str, Tensor]) -> State:
        """`frames` uint8 [B,F,H,W,3] and `frame_counts` [B] -> memory: values [B,S,D+H], mask [B,S], keys, final state.

        S: the frames F, or with `regions` the regions F P. Frames beyond a clip's count may hold anything.
        """
        frames = seen(inputs, self.reads)
        rows, count = frames.shape[:2]
        mask = torch.arange(count, device=frames.device) < inputs["frame_counts"][:, None]  # [B,F]
        grid = self.vision(frames.flatten(0, 1), count)  # [B*F,P,D]
        places = grid.shape[1]
        if self.motion is not None:
            grid = self._moving(grid.view(rows, count, places, -1) * mask[..., None, None]).flatten(0, 1)
        if self.config.regions:
            grid = self.vision.dropout(grid.reshape(rows, count * places, -1)).view_as(grid)
        vectors = self.vision.vector(grid).view(rows, count, -1)  # [B,F,D]
        if not self.config.regions:
            vectors = self.vision.dropout(vectors)
        lower, lower_state = self.lower(vectors, self.lower.initial_state(rows), mask=mask)  # [B,F,H]
        nothing = lower.new_zeros(rows, count, self.config.embedding)
        upper, upper_state = self.upper(torch.cat([lower, nothing], -1), self.upper.initial_state(rows), mask=mask)
        states = numbered(0, lower_state) | numbered(1, upper_state)
        if self.third is not None:
            states |= numbered(2, self.third.initial_state(rows))
        memory = {f"final.{name}": value for name, value in states.items()}
        if self.times is not None:
            numbers = torch.arange(count, device=frames.device).clamp_max(len(self.times) - 1)  # [F]
            upper = self.times[numbers].expand(rows, -1, -1)  # [B,F,H]
        if self.config.regions:
            vectors = grid.view(rows, count * places, -1)  # [B,F*P,D]
            mask, upper = mask.repeat_interleave(places, 1), upper.repeat_interleave(places, 1)
        memory["mask"] = mask
        memory["values"] = torch.cat([vectors, upper.to(vectors.dtype)], -1) * mask[..., None]  # [B,S,D+H]
        if self.attention is not None:
            memory["keys"] = self.attention.keys(memory["values"])
        return memory

    def _moving(self, grid: Tensor) -> Tensor:
        """The regions of all frames [B,F,P,D], and what is in the same places one frame before and after."""
        assert self.motion is not None
        around = nn.functional.pad(grid, (0, 0, 0, 0, 1, 1))  # [B,F+2,P,D]
        windows = torch.cat([around[:, :-2], grid, around[:, 2:]], -1)  # [B,F,P,3D]
        return grid + torch.relu(self.motion(windows))

    def initial_state(self, memory: State) -> State:
        """{"<layer>.hidden", "<layer>.memory": [B,H]}: where reading ended; a third layer begins with nothing."""
        return {name.removeprefix("final."): value for name, value in memory.items() if name.startswith("final.")}

    # --- writing ----------------------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, memory: State, state: State) -> GeneratorOutput:
        """`tokens` [N,T] -> hidden [N,T,H], attention [N,T,S]."""
        embedded = self.dropout(self.word_dropout(self.embed_target(tokens), tokens))  # [N,T,E]
        nothing = embedded.new_zeros(*tokens.shape, self.config.frame)
        lower, lower_state = self.lower(nothing, part_of(state, 0))  # [N,T,H]
        inputs = torch.cat([lower, embedded.to(lower.dtype)], -1)
        hidden, upper_state = self.upper(inputs, part_of(state, 1))  # [N,T,H]
        after, weights = numbered(0, lower_state) | numbered(1, upper_state), None
        if self.attention is not None and self.combine is not None:
            contexts, weights = read_memory(self.attention, hidden, memory)  # [N,T,D+H] [N,T,S]
            if self.third is not None:
                hidden, third_state = self.third(torch.cat([hidden, contexts.to(hidden.dtype)], -1), part_of(state, 2))
                after |= numbered(2, third_state)
            hidden = torch.tanh(self.combine(torch.cat([hidden, contexts.to(hidden.dtype)], -1)))
        return GeneratorOutput(self.dropout(hidden), after, weights)
