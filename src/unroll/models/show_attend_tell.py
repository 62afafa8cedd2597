"""Show, Attend and Tell: at every word the decoder looks at a place of the picture.

Paper: Xu et al. 2015, arXiv:1502.03044. With a_p the vector of region p (`layers/vision.py`), y_t the word read at step
t, E its embedding, h the LSTM's hidden vector:

    h_{-1}, c_{-1} = tanh(W mean_p a_p + b), each with a matrix of its own
    alpha_t = attention(h_{t-1}, a)                    `layers/attention.py`; the paper's is additive
    soft    z_t = beta_t sum_p alpha_tp a_p            beta_t = sigmoid(w . h_{t-1}), the paper's gate
    hard    z_t = beta_t a_{s_t}                       s_t drawn from alpha_t in training, the likeliest otherwise
    h_t, c_t = LSTM([E y_t ; z_t], h_{t-1}, c_{t-1})
    p(y_{t+1} | ...) = softmax(b + U (E y_t + L_h h_t + L_z z_t))         U = E when `tied`

With `two_layers` the attention stands between two LSTMs, as in Anderson et al. 2018 (1707.07998, bottom-up and top-down)
but without their feedback from the second to the first. No step then waits for the one before, so all steps of training
are computed by one kernel a layer, which on a CPU takes a third of the time:

    h1_t = LSTM_1(E y_t, h1_{t-1})      z_t = sum_p attention(h1_t, a)_p a_p      h_t = LSTM_2([h1_t ; z_t], h_{t-1})

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
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.attention import attention_layer
from unroll.layers.dropout import Dropout, WordDropout
from unroll.layers.generator import ConditionalGenerator, GeneratorOutput, State, read_memory
from unroll.layers.language_model import embedding_layer
from unroll.layers.recurrent import LSTM
from unroll.layers.softmax import Softmax
from unroll.layers.vision import Vision, VisionOptions, seen


class Config(Strict):
    """`region`: width of a region's vector; `dropout` of embedded words and of the vector before the softmax.

    word_dropout: of whole words that are read, so that the next one comes from the picture and not from the one before.
    """

    encoder: VisionOptions = VisionOptions()
    region: int = Field(128, ge=1)
    embedding: int = Field(256, ge=1)
    width: int = Field(256, ge=1)
    attention: Literal["additive", "general"] = "additive"
    hard: bool = False
    two_layers: bool = False
    tied: bool = True
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    word_dropout: float = Field(0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def known(self) -> Self:
        if self.hard and self.two_layers:
            raise ValueError("two_layers: is for soft attention, hard attention is the paper's alone")
        return self


TINY: list[dict[str, Any]] = [
    {"encoder": {"widths": [4, 8], "groups": 2, "dropout": 0.2}, "region": 4, "embedding": 5, "width": 6, "dropout": 0.2},
    {"encoder": {"widths": [4, 8], "groups": 2}, "region": 4, "embedding": 5, "width": 6, "attention": "general",
     "tied": False},
    {"encoder": {"widths": [4, 8], "groups": 2}, "region": 4, "embedding": 5, "width": 6, "hard": True},
    {"encoder": {"blind": True}, "region": 4, "embedding": 5, "width": 6},
    {"encoder": {"widths": [4, 8], "groups": 2}, "region": 4, "embedding": 5, "width": 6, "two_layers": True,
     "dropout": 0.2, "word_dropout": 0.2},
    {"encoder": {"widths": [4, 8], "groups": 2, "colour": "beside"}, "region": 4, "embedding": 5, "width": 6},
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
        self.attention = attention_layer(config.attention, width, region)
        self.cell = LSTM(embedding, width)
        names = list(LSTM.state_names)
        if config.two_layers:
            self.upper = LSTM(width + region, width)
            names += [f"upper_{name}" for name in names]
        else:
            self.gate = nn.Linear(width, 1)
            self.context_gates = nn.Linear(region, 4 * width, bias=False)  # the part of the cell's weights for z_t
        self.begin = nn.ModuleDict({name: nn.Linear(region, width) for name in names})
        self.hidden_to_word = nn.Linear(width, embedding, bias=False)
        self.context_to_word = nn.Linear(region, embedding, bias=False)
        self.dropout = Dropout(config.dropout, shared_over_time=True)
        self.word_dropout = WordDropout(config.word_dropout, words)
        self.output = Softmax(embedding, words, self.embed_target if config.tied else None)
        if config.hard:
            self.baseline = nn.Parameter(torch.zeros(()))

    def encode(self, inputs: Mapping[str, Tensor]) -> State:
        """`image` uint8 [B,H,W,3] -> memory: values [B,P,D], keys [B,P,A], mask [B,P]."""
        values = self.vision.dropout(self.vision(seen(inputs, self.reads)))  # [B,P,D]
        mask = values.new_ones(values.shape[:2]).bool()
        return {"values": values, "keys": self.attention.keys(values), "mask": mask}

    def initial_state(self, memory: State) -> State:
        """{"hidden", "memory": [B,H]}, with two layers also "upper_hidden", "upper_memory"."""
        mean = memory["values"].mean(1)  # [B,D]
        like = self.cell.weight_hidden.dtype
        return {name: torch.tanh(matrix(mean)).to(like) for name, matrix in self.begin.items()}

    def forward(self, tokens: Tensor, memory: State, state: State) -> GeneratorOutput:
        """`tokens` [N,T] -> hidden [N,T,E], attention [N,T,P]."""
        embedded = self.dropout(self.word_dropout(self.embed_target(tokens), tokens))  # [N,T,E]
        if self.config.two_layers:
            return self._two_layers(embedded, memory, state)
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
        attention = torch.cat(looked, 1)  # [N,T,P]
        extras = self._extras(attention, torch.stack(choices, 1)) if self.config.hard and self.training else {}
        hidden = self._before_softmax(embedded, torch.stack(hiddens, 1), torch.stack(contexts, 1))
        return GeneratorOutput(hidden, state, attention, extras)

    def _two_layers(self, embedded: Tensor, memory: State, state: State) -> GeneratorOutput:
        """LSTM, attention and LSTM over all steps at once: [N,T,E]."""
        lower, lower_state = self.cell(embedded, {name: state[name] for name in LSTM.state_names})  # [N,T,H]
        context, attention = read_memory(self.attention, lower, memory)  # [N,T,D] [N,T,P]
        wide = torch.cat([lower, context.to(lower.dtype)], -1)
        hidden, upper = self.upper(wide, {name: state[f"upper_{name}"] for name in LSTM.state_names})  # [N,T,H]
        after = {**lower_state, **{f"upper_{name}": value for name, value in upper.items()}}
        return GeneratorOutput(self._before_softmax(embedded, hidden, context), after, attention)

    def _before_softmax(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """E y_t + L_h h_t + L_z z_t: [N,T,E]."""
        return self.dropout(embedded + self.hidden_to_word(hidden) + self.context_to_word(context))

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
