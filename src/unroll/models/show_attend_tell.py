"""Show, Attend and Tell: at every word the decoder looks at a place of the picture.

Paper: Xu et al. 2015, arXiv:1502.03044. With a_p the vector of region p (`layers/vision.py`), y_t the word read at step
t, E its embedding, h the LSTM's hidden vector:

    h_{-1}, c_{-1} = tanh(W mean_p a_p + b), each with a matrix of its own
    alpha_t = attention(h_{t-1}, a)                    `layers/attention.py`; the paper's is additive
    soft    z_t = beta_t sum_p alpha_tp a_p            beta_t = sigmoid(w . h_{t-1}), the paper's gate
    hard    z_t = beta_t a_{s_t}                       s_t drawn from alpha_t in training, the likeliest otherwise
    h_t, c_t = LSTM([E y_t ; z_t], h_{t-1}, c_{t-1})
    p(y_{t+1} | ...) = softmax(b + U (E y_t + L_h h_t + L_z z_t))         U = E when `tied`

Losses beside the words' (weights in the recipe's `train.objective`, made in `tasks/captioning.py`):

    doubly stochastic    sum_p (1 - sum_t alpha_tp)^2, so that the whole picture is looked at in the course of a sentence
    hard attention       REINFORCE (Williams 1992): -(r - baseline) log alpha_t(s_t) - entropy weight * H(alpha_t), with
                         reward r = mean log p of the sentence's words, for which this model gives `log_choice`,
                         `entropy` and `baseline`

The baseline is a parameter that follows the rewards by the gradient of (baseline - r)^2 / 2: a moving mean that needs no
state of its own, so that it is the same for any number of workers and in a resumed run.

Deliberate differences: the picture's network is trained with the decoder (the paper's VGG is frozen); hard attention always
draws (the paper takes the soft context every other time).

Numbers to reach: COCO, BLEU-4 24.3 (soft), 25.0 (hard) with VGG; 1.09 CIDEr with ResNet-101 (Att2in).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.attention import attention_layer
from unroll.layers.dropout import Dropout
from unroll.layers.generator import ConditionalGenerator, GeneratorOutput, State, read_memory
from unroll.layers.language_model import embedding_layer
from unroll.layers.recurrent import LSTM
from unroll.layers.softmax import Softmax
from unroll.layers.vision import Vision, VisionOptions, seen


class Config(Strict):
    """`region`: width of a region's vector; `dropout` of embedded words and of the vector before the softmax."""

    encoder: VisionOptions = VisionOptions()
    region: int = Field(128, ge=1)
    embedding: int = Field(256, ge=1)
    width: int = Field(256, ge=1)
    attention: Literal["additive", "general"] = "additive"
    hard: bool = False
    tied: bool = True
    dropout: float = Field(0.0, ge=0.0, lt=1.0)


TINY: list[dict[str, Any]] = [
    {"encoder": {"widths": [4, 8], "groups": 2, "dropout": 0.2}, "region": 4, "embedding": 5, "width": 6, "dropout": 0.2},
    {"encoder": {"widths": [4, 8], "groups": 2}, "region": 4, "embedding": 5, "width": 6, "attention": "general",
     "tied": False},
    {"encoder": {"widths": [4, 8], "groups": 2}, "region": 4, "embedding": 5, "width": 6, "hard": True},
    {"encoder": {"blind": True}, "region": 4, "embedding": 5, "width": 6},
]  # fmt: skip
"""Small configurations, at least one for each option: what the contract tests build."""


class Model(ConditionalGenerator):
    """Encoder, attention, LSTM and softmax. `vocabulary`: {"target": size}, BOS and EOS included."""

    reads = "image"

    def __init__(self, config: Config, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        words, width, region, embedding = vocabulary["target"], config.width, config.region, config.embedding
        self.vision = Vision(config.encoder, region)
        self.embed_target = embedding_layer(words, embedding, tied=True)
        self.begin = nn.ModuleDict({name: nn.Linear(region, width) for name in LSTM.state_names})
        self.attention = attention_layer(config.attention, width, region)
        self.gate = nn.Linear(width, 1)
        self.cell = LSTM(embedding, width)
        self.context_gates = nn.Linear(region, 4 * width, bias=False)  # the part of the cell's weights for z_t
        self.hidden_to_word = nn.Linear(width, embedding, bias=False)
        self.context_to_word = nn.Linear(region, embedding, bias=False)
        self.dropout = Dropout(config.dropout, shared_over_time=True)
        self.output = Softmax(embedding, words, self.embed_target if config.tied else None)
        if config.hard:
            self.baseline = nn.Parameter(torch.zeros(()))

    def encode(self, inputs: Mapping[str, Tensor]) -> State:
        """`image` uint8 [B,H,W,3] -> memory: values [B,P,D], keys [B,P,A], mask [B,P]."""
        values = self.vision.dropout(self.vision(seen(inputs, self.reads)))  # [B,P,D]
        mask = values.new_ones(values.shape[:2]).bool()
        return {"values": values, "keys": self.attention.keys(values), "mask": mask}

    def initial_state(self, memory: State) -> State:
        """{"hidden", "memory": [B,H]}."""
        mean = memory["values"].mean(1)  # [B,D]
        like = self.cell.weight_hidden.dtype
        return {name: torch.tanh(matrix(mean)).to(like) for name, matrix in self.begin.items()}

    def forward(self, tokens: Tensor, memory: State, state: State) -> GeneratorOutput:
        """`tokens` [N,T] -> hidden [N,T,E], attention [N,T,P]."""
        embedded = self.dropout(self.embed_target(tokens))  # [N,T,E]
        words = nn.functional.linear(embedded, self.cell.weight_input, self.cell.bias)  # [N,T,4H]
        hiddens, contexts, looked, choices = [], [], [], []
        for word in words.unbind(1):  # [N,4H]
            soft, weights = read_memory(self.attention, state["hidden"][:, None], memory)  # [N,1,D] [N,1,P]
            if self.config.hard:
                soft, choice = self._look_at_one(weights, memory)
                choices.append(choice)
            context = torch.sigmoid(self.gate(state["hidden"])) * soft[:, 0]  # [N,D]
            state = self.cell.step(word + self.context_gates(context), state, self.cell.weight_hidden)
            hiddens.append(state["hidden"])
            contexts.append(context)
            looked.append(weights)
        hidden, context = torch.stack(hiddens, 1), torch.stack(contexts, 1)  # [N,T,H] [N,T,D]
        hidden = embedded + self.hidden_to_word(hidden) + self.context_to_word(context)  # [N,T,E]
        attention = torch.cat(looked, 1)  # [N,T,P]
        extras = self._extras(attention, torch.stack(choices, 1)) if self.config.hard and self.training else {}
        return GeneratorOutput(self.dropout(hidden), state, attention, extras)

    def _look_at_one(self, weights: Tensor, memory: State) -> tuple[Tensor, Tensor]:
        """The vector of one region for each row and its number, from weights [N,1,P]: [N,1,D] [N]."""
        flat = weights[:, 0].detach()  # [N,P]
        choice = torch.multinomial(flat, 1)[:, 0] if self.training else flat.argmax(1)  # [N]
        rows = torch.arange(len(flat), device=flat.device) // max(1, len(flat) // max(1, len(memory["mask"])))
        return memory["values"][rows, choice][:, None], choice

    def _extras(self, attention: Tensor, choices: Tensor) -> dict[str, Tensor]:
        """What REINFORCE needs of each step, all [N,T]."""
        logarithms = attention.clamp_min(1e-12).log()  # [N,T,P]
        chosen = logarithms.gather(2, choices[..., None])[..., 0]
        entropy = -(attention * logarithms).sum(-1)
        return {"log_choice": chosen, "entropy": entropy, "baseline": self.baseline.expand_as(chosen)}
