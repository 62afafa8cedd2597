"""Feed-forward language model: a window of embedded words and one hidden layer.

Paper: Bengio et al. 2003, "A neural probabilistic language model", JMLR 3. With n = `order` and C the embedding:

    x_t = [C(w_{t-n+2}); ...; C(w_t)]                    the n-1 words before w_{t+1}
    p(w_{t+1} | window) = softmax(b + W x_t + U tanh(d + H x_t))        W = 0 without `direct` connections

W and U are one matrix of the output layer, which reads [tanh(d + H x_t); x_t].

State: the last n-1 tokens. Before the text stands a symbol of its own, number V, with an embedding that is learnt.

Deliberate differences: dropout of the window and of the hidden layer; no mixture with a trigram model.

Numbers to reach: PTB 140.2 test perplexity, 116.7 interpolated with a Kneser-Ney 5-gram (Mikolov's thesis, table 4.1);
Brown corpus 252 against 312 of the best n-gram (the paper).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.convolution import side_by_side
from unroll.layers.dropout import Dropout
from unroll.layers.language_model import LanguageModel, LanguageModelOutput, State, output_layer


class Config(Strict):
    """`order` is n: a word is predicted from the n-1 before it. `width` of the hidden layer."""

    order: int = Field(5, ge=2)
    embedding: int = Field(60, ge=1)
    width: int = Field(100, ge=1)
    direct: bool = True
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    cutoffs: list[int] = Field([])


TINY: list[dict[str, Any]] = [
    {"order": 2, "embedding": 4, "width": 5},
    {"order": 4, "embedding": 4, "width": 5, "direct": False, "dropout": 0.3},
    {"order": 7, "embedding": 3, "width": 5, "cutoffs": [4, 8]},
]
"""Small configurations, at least one for each option: what the contract tests build."""


class Model(LanguageModel):
    """The network of the paper, computed for all windows of a text at once."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.words, self.start = config.order - 1, vocabulary
        window = self.words * config.embedding
        self.embed = nn.Embedding(vocabulary + 1, config.embedding)
        self.hidden = nn.Linear(window, config.width)
        self.dropout = Dropout(config.dropout)
        self.direct = config.direct
        self.output = output_layer(config.width + (window if config.direct else 0), vocabulary, config.cutoffs)

    def initial_state(self, batch: int) -> State:
        """{"tokens": [B,n-1]}, all the symbol that stands before the text."""
        return {"tokens": torch.full((batch, self.words), self.start, device=self.embed.weight.device)}

    def forward(self, tokens: Tensor, state: State) -> LanguageModelOutput:
        """`tokens` [B,T] -> hidden [B,T,H], or [B,T,H+(n-1)D] with direct connections."""
        seen = torch.cat([state["tokens"], tokens], dim=1)  # [B,n-1+T]
        window = side_by_side(self.embed(seen[:, 1:]), self.words, 1)  # [B,T,(n-1)*D]
        window = self.dropout(window)
        hidden = self.dropout(torch.tanh(self.hidden(window)))  # [B,T,H]
        if self.direct:
            hidden = torch.cat([hidden, window.to(hidden.dtype)], dim=-1)  # [B,T,H+(n-1)D]
        return LanguageModelOutput(hidden, {"tokens": seen[:, -self.words :]})
