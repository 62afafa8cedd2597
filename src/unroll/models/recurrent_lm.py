"""Recurrent language models: stacked RNN, LSTM or GRU, with the regularisers of AWD-LSTM and skips across time.

Papers: Elman 1990 (rnn); Hochreiter & Schmidhuber 1997 (lstm); Cho et al. 2014, 1406.1078 (gru); Zaremba et al. 2014,
1409.2329 (dropout between layers); Wu et al. 2016, 1609.08144 (residual connections between layers); Press & Wolf 2017,
1608.05859 (tied embeddings); Chang et al. 2017, 1710.02224 (dilated recurrence); Merity et al. 2018, 1708.02182 (AWD).

With x^0 = embedding of the tokens, a cell (equations: `layers/recurrent.py`) and a dilation d for each layer l:

    h^l_t = cell(x^{l-1}_t, h^l_{t-d})          x^l = h^l, or x^{l-1} + h^l from the second layer on with `residual`
    p(w_{t+1} | w_1..t) = softmax(b + U x^L_t)  U = the embedding matrix when `tied`

Dropouts (Merity et al.): `embedding` drops whole words, `input` embedded words, `between` the outputs of all layers but
the last, `output` those of the last, `weight` entries of the hidden-to-hidden matrices; all but the last kind with one
mask for the whole window (`shared_over_time`, false: Zaremba et al.). Penalties on the last layer's output h:

    activation = alpha mean((dropped h_t)^2)    temporal = beta mean((h_t - h_{t-1})^2)      both within the window

State: hidden vector (and memory) of each layer, [B,H], or of the last d steps, [B,d,H], in a dilated one. Cells that are
files of `layers/` (neural Turing machines, ...) bring a state of their own.

Deliberate differences: see `layers/recurrent.py` for biases; a dilated network has no layer that fuses its d lanes.

Numbers to reach: tiny-shakespeare, nats per character < 1.50 (Kneser-Ney 6-gram 1.5385, nanoGPT on an A100 1.4697);
WikiText-2, AWD-LSTM without fine-tuning or cache, 65.8 test perplexity; PTB 2x200 LSTM 115.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.dropout import Dropout, WeightDropout, WordDropout
from unroll.layers.language_model import (
    LanguageModel,
    LanguageModelOutput,
    State,
    embedding_layer,
    numbered,
    output_layer,
    part_of,
)
from unroll.layers.recurrent import CELLS, cell_config, recurrent_layer, sequence_layer

Probability = Field(0.0, ge=0.0, lt=1.0)


class Dropouts(Strict):
    """Probabilities of the five kinds of dropout."""

    embedding: float = Probability
    input: float = Probability
    between: float = Probability
    output: float = Probability
    weight: float = Probability
    shared_over_time: bool = True


class Config(Strict):
    """`cell`: rnn, lstm, gru, or a file of `layers/` that has a `Layer` (ntm, ...), with its `options`. `embedding`
    defaults to `width`; `dilations` has one entry a layer (none: 1 everywhere). With `tied` the last layer is as wide as
    the embedding. `reset` belongs to gru, `forget_bias` to lstm; `ponder_cost` to a cell that ponders."""

    cell: str = "lstm"
    options: dict[str, Any] = Field({})
    layers: int = Field(2, ge=1)
    width: int = Field(512, ge=1)
    embedding: int | None = Field(None, ge=1)
    reset: Literal["before", "after"] = "before"
    forget_bias: float = 1.0
    bias: bool = True
    tied: bool = False
    residual: bool = False
    dilations: list[int] = Field([])
    dropout: Dropouts = Dropouts()
    activation_penalty: float = Field(0.0, ge=0.0)
    temporal_penalty: float = Field(0.0, ge=0.0)
    ponder_cost: float = Field(0.0, ge=0.0)
    cutoffs: list[int] = Field([])

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.dilations and (len(self.dilations) != self.layers or min(self.dilations) < 1):
            raise ValueError(f"dilations: one number >= 1 for each of {self.layers} layers is needed")
        if self.tied and self.cutoffs:
            raise ValueError("tied: an adaptive softmax (cutoffs) cannot be tied")
        if self.residual and len(set(self.widths[1:])) > 1:
            raise ValueError("residual: with tied, embedding and width must be equal")
        for key, cell in (("reset", "gru"), ("forget_bias", "lstm")):
            if key in self.model_fields_set and self.cell != cell:
                raise ValueError(f"{key}: only cell {cell} has it, the cell is {self.cell}")
        cell_config(self.cell, self.options)
        if self.cell not in CELLS and (self.dropout.weight or not self.bias):
            raise ValueError(
                f"dropout.weight and bias: only cells {', '.join(CELLS)} have them, the cell is {self.cell}"
            )
        return self

    @property
    def widths(self) -> list[int]:
        """Width before the first layer and after each."""
        embedding = self.embedding or self.width
        return [embedding, *[self.width] * (self.layers - 1), embedding if self.tied else self.width]

    def layer(self, number: int) -> Any:
        """The layer after widths[number], by itself or dilated."""
        before, after = self.widths[number : number + 2]
        if self.cell in CELLS and not self.options:
            options: dict[str, Any] = {"bias": self.bias}
            if self.cell == "gru":
                options["reset"] = self.reset
            if self.cell == "lstm":
                options["forget_bias"] = self.forget_bias
            layer: Any = recurrent_layer(self.cell, before, after, **options)
        else:
            layer = sequence_layer(self.cell, before, after, self.options)
        dilation = self.dilations[number] if self.dilations else 1
        return layer if dilation == 1 else DilatedLayer(layer, dilation)


TINY: list[dict[str, Any]] = [
    {"cell": "rnn", "layers": 1, "width": 6, "cutoffs": [4, 8]},
    {"cell": "gru", "layers": 2, "width": 6, "embedding": 4, "reset": "after", "residual": True},
    {"cell": "gru", "layers": 3, "width": 5, "reset": "before", "bias": False, "dilations": [1, 2, 3]},
    {"cell": "lstm", "layers": 3, "width": 5, "residual": True, "dilations": [1, 2, 4], "dropout": {"weight": 0.3}},
    {
        "cell": "lstm", "layers": 3, "width": 6, "embedding": 4, "tied": True,
        "dropout": {"embedding": 0.2, "input": 0.3, "between": 0.3, "output": 0.3, "weight": 0.3},
        "activation_penalty": 2.0, "temporal_penalty": 1.0,
    },
    {"cell": "ntm", "layers": 2, "width": 6, "options": {"slots": 5, "slot_width": 3}, "dilations": [1, 2]},
    {"cell": "act", "layers": 1, "width": 6, "options": {"cell": "gru", "maximum": 3}, "ponder_cost": 0.1},
]  # fmt: skip
"""Small configurations, at least one for each option: what the contract tests build."""


class DilatedLayer(nn.Module):
    """A recurrent layer whose state at t comes from t - d: d lanes, each a d-th of the time steps, side by side.

    State: that of the layer with one more dimension, [B,d,H]: what the next d steps will read, in their order.
    """

    def __init__(self, layer: Any, dilation: int) -> None:
        super().__init__()
        self.layer, self.dilation = layer, dilation

    @property
    def weight_hidden(self) -> Tensor | None:
        return getattr(self.layer, "weight_hidden", None)

    def initial_state(self, batch: int) -> State:
        lanes = self.layer.initial_state(batch * self.dilation)
        return {name: value.unflatten(0, (batch, self.dilation)) for name, value in lanes.items()}

    def forward(self, inputs: Tensor, state: State, weight_hidden: Tensor | None = None) -> tuple[Tensor, State]:
        """inputs [B,T,D] -> outputs [B,T,H] and the state after them, for any T."""
        rounds, rest = divmod(inputs.shape[1], self.dilation)
        whole = rounds * self.dilation
        outputs = []
        if rounds:
            steps = inputs[:, :whole].unflatten(1, (rounds, self.dilation))  # [B,rounds,d,D]
            out, state = self._lanes(steps.transpose(1, 2), state, weight_hidden)  # [B,d,rounds,H]
            outputs.append(out.transpose(1, 2).flatten(1, 2))  # [B,rounds*d,H]
        if rest:
            first = {name: value[:, :rest] for name, value in state.items()}
            out, first = self._lanes(inputs[:, whole:].unsqueeze(2), first, weight_hidden)  # [B,rest,1,H]
            outputs.append(out.squeeze(2))
            state = {name: torch.cat([value[:, rest:], first[name]], dim=1) for name, value in state.items()}
        return torch.cat(outputs, dim=1), state

    def _lanes(self, inputs: Tensor, state: State, weight_hidden: Tensor | None) -> tuple[Tensor, State]:
        """Each lane as a row of its own: inputs [B,lanes,T,D] -> outputs [B,lanes,T,H], state [B,lanes,H]."""
        rows = inputs.shape[:2]
        state = {name: value.flatten(0, 1) for name, value in state.items()}
        weight = () if weight_hidden is None else (weight_hidden,)
        outputs, state = self.layer(inputs.flatten(0, 1), state, *weight)
        return outputs.unflatten(0, rows), {name: value.unflatten(0, rows) for name, value in state.items()}


class Model(LanguageModel):
    """Embedding, recurrent layers, softmax, with a dropout in front of each."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        dropout, locked = config.dropout, config.dropout.shared_over_time
        self.embed = embedding_layer(vocabulary, config.widths[0], config.tied)
        self.word_dropout = WordDropout(dropout.embedding, vocabulary)
        self.input_dropout = Dropout(dropout.input, locked)
        self.layers = nn.ModuleList(config.layer(number) for number in range(config.layers))
        self.weight_dropout = WeightDropout(dropout.weight)
        self.between_dropout = Dropout(dropout.between, locked)
        self.output_dropout = Dropout(dropout.output, locked)
        tied = self.embed if config.tied else None
        self.output = output_layer(config.widths[-1], vocabulary, config.cutoffs, tied)

    def initial_state(self, batch: int) -> State:
        """Zeros {"<layer>.hidden": [B,H] or [B,d,H], and "<layer>.memory" for an LSTM}."""
        state: State = {}
        for number, layer in enumerate(self.layers):
            state |= numbered(number, layer.initial_state(batch))  # type: ignore[operator]
        return state

    def forward(self, tokens: Tensor, state: State) -> LanguageModelOutput:
        """`tokens` [B,T] -> hidden [B,T,D] and, in training, the penalties `activation` and `temporal`."""
        inputs = self.input_dropout(self.word_dropout(self.embed(tokens), tokens))  # [B,T,D]
        outputs = inputs
        after: State = {}
        for number, layer in enumerate(self.layers):
            weight = (self.weight_dropout(layer.weight_hidden),) if self.config.cell in CELLS else ()
            outputs, layer_state = layer(inputs, part_of(state, number), *weight)  # [B,T,H]
            if self.config.residual and number > 0:
                outputs = outputs + inputs
            inputs = self.between_dropout(outputs) if number + 1 < self.config.layers else outputs
            after |= numbered(number, layer_state)
        hidden = self.output_dropout(outputs)  # [B,T,H]
        penalties = self.penalties(outputs, hidden)
        if self.training and self.config.ponder_cost:
            spent = [after[name] - state[name] for name in after if name.endswith(".ponder")]
            penalties["ponder"] = self.config.ponder_cost * torch.stack(spent).sum(0).mean() / tokens.shape[1]
        return LanguageModelOutput(hidden, after, penalties)

    def penalties(self, outputs: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """Merity et al.'s activation (AR) and temporal (TAR) penalties of the last layer's output [B,T,H]."""
        penalties: dict[str, Tensor] = {}
        if not self.training:
            return penalties
        if self.config.activation_penalty:
            penalties["activation"] = self.config.activation_penalty * dropped.float().square().mean()
        if self.config.temporal_penalty and outputs.shape[1] > 1:
            penalties["temporal"] = self.config.temporal_penalty * outputs.diff(dim=1).float().square().mean()
        return penalties
