"""Show and Tell: a picture becomes one vector, which an LSTM reads as if it were the word before the first one.

Paper: Vinyals et al. 2015, arXiv:1411.4555. With v the vector of the picture (`layers/vision.py`), y_0 = BOS and E the
embedding of words:

    state_{-1} = LSTM(W v, 0)                          the picture is shown once, before the sentence
    state_t    = LSTM(E y_t, state_{t-1})
    p(y_{t+1} | ...) = softmax(b + U h_t)              U = E when `tied`

Deliberate differences: the encoder is trained with the decoder from the start (the paper begins with GoogLeNet, frozen);
one LSTM layer unless told otherwise; the vector is the mean of a grid that knows where its regions are.

Number to reach: COCO, 27.7 BLEU-4 and 0.855 CIDEr with GoogLeNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.dropout import Dropout
from unroll.layers.generator import ConditionalGenerator, GeneratorOutput, State
from unroll.layers.language_model import embedding_layer, numbered, part_of
from unroll.layers.recurrent import LSTM
from unroll.layers.softmax import Softmax
from unroll.layers.vision import Vision, VisionOptions, seen


class Config(Strict):
    """`embedding` of words and of the picture's vector, `width` of the LSTM, `dropout` of its inputs and outputs."""

    encoder: VisionOptions = VisionOptions()
    embedding: int = Field(256, ge=1)
    width: int = Field(256, ge=1)
    layers: int = Field(1, ge=1)
    tied: bool = False
    dropout: float = Field(0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def widths_agree(self) -> Self:
        if self.tied and self.embedding != self.width:
            raise ValueError(f"tied: needs embedding = width, found {self.embedding} and {self.width}")
        return self


TINY: list[dict[str, Any]] = [
    {"encoder": {"widths": [4, 8], "groups": 2}, "embedding": 5, "width": 6},
    {"encoder": {"widths": [4], "groups": 2, "blocks": 2, "dropout": 0.2}, "embedding": 6, "width": 6, "layers": 2,
     "tied": True, "dropout": 0.2},
    {"encoder": {"widths": [4, 8], "groups": 2, "tuned": "last"}, "embedding": 5, "width": 6},
    {"encoder": {"blind": True}, "embedding": 5, "width": 6},
]  # fmt: skip
"""Small configurations, at least one for each option: what the contract tests build."""


class Model(ConditionalGenerator):
    """Encoder, LSTM and softmax. `vocabulary`: {"target": size}, BOS and EOS included."""

    reads = "image"

    def __init__(self, config: Config, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        words, width = vocabulary["target"], config.width
        self.vision = Vision(config.encoder, config.embedding)
        self.embed_target = embedding_layer(words, config.embedding, tied=True)
        self.layers = nn.ModuleList([LSTM(config.embedding if n == 0 else width, width) for n in range(config.layers)])
        self.dropout = Dropout(config.dropout, shared_over_time=True)
        self.output = Softmax(width, words, self.embed_target if config.tied else None)

    def encode(self, inputs: Mapping[str, Tensor]) -> State:
        """`image` uint8 [B,H,W,3] -> memory: values [B,1,D], mask [B,1]."""
        vector = self.vision.vector(self.vision.dropout(self.vision(seen(inputs, self.reads))))  # [B,D]
        return {"values": vector[:, None], "mask": vector.new_ones(len(vector), 1).bool()}

    def initial_state(self, memory: State) -> State:
        """{"<layer>.hidden", "<layer>.memory": [B,H]} after the picture was read."""
        rows = len(memory["mask"])
        nothing = [numbered(n, layer.initial_state(rows)) for n, layer in enumerate(self.layers)]  # type: ignore[operator]
        return self._run(memory["values"], {name: value for state in nothing for name, value in state.items()})[1]

    def forward(self, tokens: Tensor, memory: State, state: State) -> GeneratorOutput:
        """`tokens` [N,T] -> hidden [N,T,H]."""
        hidden, state = self._run(self.dropout(self.embed_target(tokens)), state)
        return GeneratorOutput(self.dropout(hidden), state)

    def _run(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """All layers over [N,T,E] -> [N,T,H], state."""
        after: State = {}
        for number, layer in enumerate(self.layers):
            inputs, layer_state = layer(inputs, part_of(state, number))
            after |= numbered(number, layer_state)
        return inputs, after
