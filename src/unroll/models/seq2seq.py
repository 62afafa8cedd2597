"""Sequence to sequence with recurrent networks: encoder and decoder, with or without attention.

Papers: Sutskever et al. 2014, arXiv:1409.3215 (encoder-decoder, reversed source); Cho et al. 2014, 1406.1078 (GRU);
Bahdanau et al. 2015, 1409.0473 (attention, bi-directional encoder); Luong et al. 2015, 1508.04025 (attention after the
recurrent layer, input feeding); Tu et al. 2016, 1601.04811 (coverage); Wu et al. 2016, 1609.08144 (GNMT: first layer
bi-directional, residual connections, the attention of the lowest decoder layer feeds all layers above); Gal &
Ghahramani 2016, 1512.05287 (one dropout mask for all time steps); Press & Wolf 2017, 1608.05859 (tied embeddings).

Encoder, x_s the embedded source, memory m_s = top layer (both directions side by side where there are two):

    h^1_s = [forward(x)_s ; backward(x)_s]      h^l = cell(h^{l-1}), + h^{l-1} from the second layer on with `residual`

Decoder, y_t the embedded target, a layer below and layers above the attention:

    s^1_t = cell([y_t ; feed_{t-1}], s^1_{t-1})       feed = the hidden vector below, with `input_feeding`
    c_t   = attention(s^1_t, m)                        equations: `layers/attention.py`
    s^l_t = cell([s^{l-1}_t ; c_t], s^l_{t-1}), + s^{l-1}_t from the second layer on with `residual`
    hidden_t = tanh(W [s^L_t ; c_t])                   without attention: hidden_t = W s^L_t, or s^L_t if widths agree
    p(y_{t+1} | ...) = softmax(b + U hidden_t)         U = the target embedding when `tied`

The state in which the encoder ends starts the decoder: as it is (`bridge: copy`, Sutskever) or through a matrix and
tanh for each tensor of each decoder layer (`linear`). With `decoder_cell` the decoder's layers are of another kind, any
file of `layers/` with a `Layer` (ntm, dnc, act, ...): their hidden vectors start from the encoder, all else of their state
(a memory, where its heads look) as that layer starts it.

Without attention the decoder has the source from this state alone, or with `context: every_step` (Cho 2014) from a
summary c = tanh(V h) of the encoder's last hidden vector h too, which stands for c_t in the equations above and is added
to the embedded target: s^1_t = cell(y_t + c, s^1_{t-1}). `shared: true` is the course's single network with two phases:
the same embedding and cells read the source and then, after BOS, write the target.

Without input feeding all time steps of training are computed by one kernel a layer; with it they are a loop.

Deliberate differences: one bias a gate (`layers/recurrent.py`); Luong's decoder has its attention above the top layer,
here it is above the first, as in GNMT, which is the same for one layer; padding leaves the encoder's state untouched,
so batches of any composition give the same numbers.

Numbers to reach, Multi30k de-en, test_2016_flickr, BLEU: without attention 22 (a GRU encoder-decoder 20.61), with 35 (an
RNN with attention 28.30, scored on other tokens), the best recurrent system 37.5 (a Transformer 36.52).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unroll.config import Strict
from unroll.errors import UserError
from unroll.layers.attention import attention_layer
from unroll.layers.dropout import Dropout, WordDropout, draw_mask
from unroll.layers.generator import ConditionalGenerator, GeneratorOutput, State, read_memory
from unroll.layers.language_model import embedding_layer, numbered, part_of
from unroll.layers.recurrent import RecurrentLayer, cell_config, recurrent_layer, sequence_layer
from unroll.layers.softmax import Softmax

Probability = Field(0.0, ge=0.0, lt=1.0)


class Dropouts(Strict):
    """Probabilities: `embedding` of whole words, `input` of embedded words, `between` layers, of the `memory` that the
    attention reads, of the vector that is fed back (`feed`), and of the last one before the softmax (`output`)."""

    embedding: float = Probability
    input: float = Probability
    between: float = Probability
    memory: float = Probability
    feed: float = Probability
    output: float = Probability
    shared_over_time: bool = True


class Config(Strict):
    """`width` of each encoder direction, and of the decoder unless `decoder_width` is given; `embedding` of both sides.

    bidirectional: which encoder layers read in both directions. tied: `decoder` shares the target embedding with the
    softmax, `all` the source embedding too (one vocabulary for both sides). context: whether a decoder without
    attention has the source's summary from its first state alone or as an input of every step and of the softmax.
    decoder_cell: of the decoder, if not `cell`, with its `decoder_options`.
    """

    cell: Literal["lstm", "gru"] = "lstm"
    reset: Literal["before", "after"] = "after"
    decoder_cell: str | None = None
    decoder_options: dict[str, Any] = Field({})
    embedding: int = Field(256, ge=1)
    width: int = Field(256, ge=1)
    decoder_width: int | None = Field(None, ge=1)
    encoder_layers: int = Field(1, ge=1)
    decoder_layers: int = Field(1, ge=1)
    bidirectional: Literal["none", "first", "all"] = "all"
    residual: bool = False
    reversed_source: bool = False
    shared: bool = False
    bridge: Literal["copy", "linear"] = "linear"
    attention: Literal["none", "additive", "dot", "general", "multi_head"] = "general"
    heads: int = Field(1, ge=1)
    coverage: bool = False
    context: Literal["start", "every_step"] = "start"
    input_feeding: bool = False
    tied: Literal["none", "decoder", "all"] = "none"
    dropout: Dropouts = Dropouts()

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.coverage and self.attention != "additive":
            raise ValueError("coverage: belongs to additive attention")
        if self.input_feeding and self.attention == "none":
            raise ValueError("input_feeding: there is no attention whose outcome could be fed back")
        if self.context == "every_step" and self.attention != "none":
            raise ValueError(
                "context: every_step is for attention none; attention gives each step a context of its own"
            )
        if self.heads > 1 and self.attention != "multi_head":
            raise ValueError("heads: belongs to multi_head attention")
        plain = self.bidirectional == "none" and self.encoder_layers == self.decoder_layers and self.state_width_is_one
        if self.bridge == "copy" and not plain:
            raise ValueError("bridge: copy needs bidirectional none and equal layers and widths on both sides")
        if self.shared and (self.bridge != "copy" or self.attention != "none" or self.tied == "none"):
            raise ValueError("shared: one network for both phases needs bridge copy, attention none and tied all")
        if self.shared and self.context != "start":
            raise ValueError("shared: one network for both phases needs context start")
        if self.shared and self.tied != "all":
            raise ValueError("shared: one network for both phases needs tied all")
        if self.decoder_cell is None:
            if self.decoder_options:
                raise ValueError("decoder_options: belong to a decoder_cell")
        elif self.bridge == "copy":
            raise ValueError("decoder_cell: bridge copy needs the same cell on both sides")
        else:
            cell_config(self.decoder_cell, self.decoder_options)
        return self

    @property
    def inner(self) -> int:
        """Width of the decoder."""
        return self.decoder_width or self.width

    @property
    def state_width_is_one(self) -> bool:
        return self.inner == self.width

    def layer(self, inputs: int, width: int) -> RecurrentLayer:
        options: dict[str, Any] = {"reset": self.reset} if self.cell == "gru" else {}
        return recurrent_layer(self.cell, inputs, width, **options)

    def decoder_layer(self, inputs: int) -> Any:
        if self.decoder_cell is None:
            return self.layer(inputs, self.inner)
        return sequence_layer(self.decoder_cell, inputs, self.inner, self.decoder_options)

    def both_ways(self, number: int) -> bool:
        return self.bidirectional == "all" or (self.bidirectional == "first" and number == 0)

    def encoder_widths(self) -> list[int]:
        """Width before the first encoder layer and after each."""
        return [self.embedding, *(self.width * (1 + self.both_ways(n)) for n in range(self.encoder_layers))]


TINY: list[dict[str, Any]] = [
    {"embedding": 5, "width": 6, "attention": "none", "bidirectional": "none", "bridge": "copy", "encoder_layers": 2,
     "decoder_layers": 2, "shared": True, "tied": "all", "reversed_source": True},
    {"cell": "gru", "embedding": 5, "width": 6, "attention": "none", "dropout": {"input": 0.2, "output": 0.2}},
    {"embedding": 5, "width": 4, "decoder_width": 6, "decoder_layers": 2, "attention": "none", "context": "every_step",
     "dropout": {"memory": 0.2}},
    {"embedding": 5, "width": 4, "decoder_width": 8, "attention": "dot", "tied": "decoder"},
    {"embedding": 5, "width": 4, "attention": "general", "input_feeding": True, "decoder_layers": 2,
     "dropout": {"embedding": 0.1, "input": 0.2, "between": 0.2, "memory": 0.2, "feed": 0.2, "output": 0.2}},
    {"cell": "gru", "reset": "before", "embedding": 5, "width": 4, "attention": "additive", "coverage": True,
     "input_feeding": True},
    {"embedding": 6, "width": 6, "attention": "multi_head", "heads": 2, "encoder_layers": 3, "decoder_layers": 3,
     "bidirectional": "first", "residual": True, "tied": "all"},
    {"embedding": 5, "width": 4, "attention": "none", "decoder_cell": "ntm",
     "decoder_options": {"slots": 5, "slot_width": 3}},
    {"embedding": 5, "width": 4, "attention": "dot", "decoder_width": 8, "decoder_layers": 2, "decoder_cell": "dnc",
     "decoder_options": {"slots": 4, "slot_width": 3}, "input_feeding": True},
    {"cell": "gru", "embedding": 5, "width": 4, "attention": "none", "context": "every_step", "decoder_cell": "act",
     "decoder_options": {"cell": "lstm", "maximum": 3}},
]  # fmt: skip
"""Small configurations, at least one for each option: what the contract tests build."""


class Encoder(nn.Module):
    """Recurrent layers over the source: [B,S,E] -> memory [B,S,D] and the final state of the top layer or of all."""

    def __init__(self, config: Config, layers: list[RecurrentLayer] | None = None) -> None:
        super().__init__()
        self.config = config
        widths = config.encoder_widths()
        pairs = list(pairwise(widths))
        self.forward_layers = nn.ModuleList(layers or [config.layer(before, config.width) for before, _ in pairs])
        self.backward_layers = nn.ModuleList(
            config.layer(before, config.width) if config.both_ways(number) else nn.Identity()
            for number, (before, _) in enumerate(pairs)
        )
        self.between_dropout = Dropout(config.dropout.between, config.dropout.shared_over_time)

    def forward(self, inputs: Tensor, mask: Tensor) -> tuple[Tensor, State]:
        """inputs [B,S,E], mask [B,S] -> outputs [B,S,D], states {"<layer>.<name>" [B,H]}, both directions side by side."""
        states: State = {}
        for number, layer in enumerate(self.forward_layers):
            outputs, state = self._run(layer, inputs, mask)
            if self.config.both_ways(number):
                backward, back_state = self._run(self.backward_layers[number], inputs.flip(1), mask.flip(1))
                outputs = torch.cat([outputs, backward.flip(1).to(outputs.dtype)], -1)  # [B,S,2H]
                state = {name: torch.cat([state[name], back_state[name]], -1) for name in state}
            if self.config.residual and number > 0 and outputs.shape == inputs.shape:
                outputs = outputs + inputs
            states |= numbered(number, state)
            inputs = self.between_dropout(outputs) if number + 1 < len(self.forward_layers) else outputs
        return inputs, states

    def _run(self, layer: nn.Module, inputs: Tensor, mask: Tensor) -> tuple[Tensor, State]:
        outputs, state = layer(inputs, layer.initial_state(len(inputs)), mask=mask)  # type: ignore[operator]
        return outputs, state


class Model(ConditionalGenerator):
    """Encoder, attention, decoder and softmax. `vocabulary`: {"source": size, "target": size}, BOS and EOS included."""

    def __init__(self, config: Config, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.config, drop = config, config.dropout
        locked, width = drop.shared_over_time, config.inner
        self.embed_target = embedding_layer(vocabulary["target"], config.embedding, tied=True)
        same = config.tied == "all"
        self.embed_source = self.embed_target if same else embedding_layer(vocabulary["source"], config.embedding, True)
        self.source_words = WordDropout(drop.embedding, vocabulary["source"])
        self.target_words = WordDropout(drop.embedding, vocabulary["target"])
        self.input_dropout = Dropout(drop.input, locked)
        self.between_dropout = Dropout(drop.between, locked)
        self.memory_dropout = Dropout(drop.memory, locked)
        self.output_dropout = Dropout(drop.output, locked)
        memory = config.encoder_widths()[-1]
        everywhere, attends = config.context == "every_step", config.attention != "none"
        context = memory if attends else config.embedding if everywhere else 0
        self.summary = nn.Linear(memory, config.embedding) if everywhere else None
        first = config.embedding + (config.embedding if config.input_feeding else 0)
        above = range(1, config.decoder_layers)
        self.layers = nn.ModuleList(
            [config.decoder_layer(first), *(config.decoder_layer(width + context) for _ in above)]
        )
        self.encoder = Encoder(config, list(self.layers) if config.shared else None)  # type: ignore[arg-type]
        self.attention = (
            attention_layer(config.attention, width, memory, config.heads, config.coverage) if attends else None
        )
        self.bridge = self._bridge() if config.bridge == "linear" else None
        plain = not context and width == config.embedding
        self.combine = nn.Identity() if plain else nn.Linear(width + context, config.embedding)
        tied = None if config.tied == "none" else self.embed_target
        self.output = Softmax(config.embedding, vocabulary["target"], tied)

    def _bridge(self) -> nn.ModuleDict:
        """A matrix for every tensor of the decoder's state, of another cell's for the hidden vector, from the encoder's
        last layer.

        Raises:
            UserError: nothing that the encoder has read would reach the decoder.
        """
        inputs, outputs = self.config.encoder_widths()[-1], self.config.inner
        names = [f"{n}_{name}" for n in range(len(self.layers)) for name in self.layers[n].state_names  # type: ignore[union-attr]
                 if self.config.decoder_cell is None or name == "hidden"]  # fmt: skip
        if not names and self.attention is None and self.summary is None:
            raise UserError(f"model.decoder_cell: {self.config.decoder_cell} has no hidden vector to start from the source; "
                            "give it attention, or context every_step")  # fmt: skip
        return nn.ModuleDict({name: nn.Linear(inputs, outputs) for name in names})

    # --- reading ----------------------------------------------------------------------------------------------------

    def encode(self, inputs: Mapping[str, Tensor]) -> State:
        """`source` [B,S] and `source_lengths` [B] -> memory: values [B,S,D], keys [B,S,A], mask [B,S], the final state.

        Padding may hold any token; every source has at least one (its EOS).
        """
        source, lengths = inputs["source"], inputs["source_lengths"]  # [B,S] [B]
        mask = torch.arange(source.shape[1], device=source.device) < lengths[:, None]  # [B,S]
        if self.config.reversed_source:
            source = reverse_within(source, lengths)
        embedded = self.input_dropout(self.source_words(self.embed_source(source), source))  # [B,S,E]
        values, final = self.encoder(embedded, mask)  # [B,S,D]
        memory = {"mask": mask, **{f"final.{name}": value for name, value in final.items()}}
        memory["values"] = self.memory_dropout(values)
        if self.summary is not None:
            ended = final[f"{self.config.encoder_layers - 1}.hidden"][:, None]  # [B,1,D]
            memory["context"] = self.memory_dropout(torch.tanh(self.summary(ended)))  # [B,1,E]
        if self.attention is not None:
            memory["keys"] = self.attention.keys(memory["values"])
        return memory

    def initial_state(self, memory: State) -> State:
        """{"<layer>.<name>": [B,H] or as the layer has it}, and with input feeding or coverage "feed" [B,E] or "coverage" [B,S]."""
        state: State = {}
        last = self.config.encoder_layers - 1
        for number, layer in enumerate(self.layers):
            if self.config.decoder_cell is not None:
                state |= numbered(number, layer.initial_state(len(memory["mask"])))  # type: ignore[operator]
            for name in layer.state_names:  # type: ignore[union-attr]
                if self.bridge is None:
                    state[f"{number}.{name}"] = memory[f"final.{number}.{name}"]
                elif f"{number}_{name}" in self.bridge:
                    ended = torch.tanh(self.bridge[f"{number}_{name}"](memory[f"final.{last}.{name}"]))
                    state[f"{number}.{name}"] = ended.to(self.embed_target.weight.dtype)
        rows, positions = memory["mask"].shape
        like = self.embed_target.weight
        if self.config.input_feeding:
            state["feed"] = like.new_zeros(rows, self.config.embedding)
        if self.config.coverage:
            state["coverage"] = like.new_zeros(rows, positions)
        return state

    # --- writing ----------------------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, memory: State, state: State) -> GeneratorOutput:
        """`tokens` [N,T] -> hidden [N,T,E], attention [N,T,S]."""
        inputs = self.input_dropout(self.target_words(self.embed_target(tokens), tokens))  # [N,T,E]
        if self.config.input_feeding or self.config.coverage:
            return self._step_by_step(inputs, memory, state)
        hidden, state, weights = self._layers(inputs, memory, state)
        return GeneratorOutput(self.output_dropout(hidden), state, weights)

    def _layers(self, inputs: Tensor, memory: State, state: State) -> tuple[Tensor, State, Tensor | None]:
        """Recurrent layers and attention over [N,T,E] -> hidden [N,T,E], state, weights [N,T,S]."""
        after: State = {}
        contexts, weights = None, None
        if self.summary is not None:
            contexts = for_all_steps(memory["context"], inputs)  # [N,T,E]
            inputs = inputs + contexts
        outputs, layer_state = self.layers[0](inputs, part_of(state, 0))  # [N,T,H]
        after |= numbered(0, layer_state)
        if self.attention is not None:
            coverage = state["coverage"][:, None] if self.config.coverage else None
            contexts, weights = read_memory(self.attention, outputs, memory, coverage)  # [N,T,D] [N,T,S]
        for number in range(1, len(self.layers)):
            below = self.between_dropout(outputs)
            wide = below if contexts is None else torch.cat([below, contexts.to(below.dtype)], -1)  # [N,T,H+D]
            outputs, layer_state = self.layers[number](wide, part_of(state, number))
            if self.config.residual:
                outputs = outputs + below
            after |= numbered(number, layer_state)
        if contexts is None:
            return self.combine(outputs), after, weights
        return torch.tanh(self.combine(torch.cat([outputs, contexts.to(outputs.dtype)], -1))), after, weights

    def _step_by_step(self, inputs: Tensor, memory: State, state: State) -> GeneratorOutput:
        """The same, one time step after the other, where a step reads what the one before came to."""
        feeding, hiddens, attentions = self.config.input_feeding, [], []
        dropped = self.config.dropout.feed if self.training and feeding else 0.0
        mask = draw_mask(state["feed"].shape, dropped, True, inputs.device, inputs.dtype) if dropped else None
        for step in inputs.split(1, dim=1):  # [N,1,E] each
            if feeding:
                feed = state["feed"] if mask is None else state["feed"] * mask
                step = torch.cat([step, feed[:, None].to(step.dtype)], -1)  # [N,1,2E]
            hidden, after, weights = self._layers(step, memory, state)
            assert weights is not None
            if feeding:
                after["feed"] = hidden[:, 0].to(state["feed"].dtype)
            if self.config.coverage:
                after["coverage"] = state["coverage"] + weights[:, 0]
            state = after
            hiddens.append(hidden)
            attentions.append(weights)
        return GeneratorOutput(self.output_dropout(torch.cat(hiddens, 1)), state, torch.cat(attentions, 1))


def reverse_within(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Each row [B,S] back to front within its length; padding stays where it is."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    source = torch.where(places < lengths[:, None], lengths[:, None] - 1 - places, places)  # [B,S]
    return tokens.gather(1, source)


def for_all_steps(context: Tensor, inputs: Tensor) -> Tensor:
    """`context` [B,1,E] of each source for all K = N/B hypotheses and T steps of `inputs` [N,T,E]: [N,T,E]."""
    count = len(inputs) // max(1, len(context))
    return context.repeat_interleave(count, 0).expand(-1, inputs.shape[1], -1).to(inputs.dtype)
