"""Several models decoded as one: at each step their predictions are averaged (Sutskever et al. 2014, arXiv:1409.3215).

    probabilities        p(v) = 1/M sum_m p_m(v)                     arithmetic mean: what one model excludes may still come
    log_probabilities    p(v) = 1/Z exp(1/M sum_m log p_m(v))        geometric mean: each model can veto

The models must share the tokens, ids included; what they look like inside is their own business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from unroll.decoding.conditional import Decodable
from unroll.errors import UserError
from unroll.layers.generator import State


class Ensemble:
    """A `Decodable` made of others. Model number m finds its memory and state under names `<m>.<name>`;
    "values" and "mask" of the memory are the first model's. Attention is the mean over the models that have it,
    none if their memories differ in length.

    Raises UserError if there is no model, or if the vocabularies differ.
    """

    def __init__(
        self,
        models: Sequence[Decodable],
        average: Literal["probabilities", "log_probabilities"] = "probabilities",
    ) -> None:
        sizes = [model.vocabulary for model in models]
        if len(set(sizes)) != 1:
            raise UserError(f"ensemble: found vocabularies of {sizes}, needed is one model or more of the same")
        self.models, self.average, self.vocabulary = list(models), average, sizes[0]

    def encode(self, inputs: Mapping[str, Tensor]) -> State:
        """Every model's memory of the same inputs."""
        memories = [model.encode(inputs) for model in self.models]
        return {"values": memories[0]["values"], "mask": memories[0]["mask"], **prefixed(memories)}

    def initial_state(self, memory: State) -> State:
        return prefixed([model.initial_state(part_of(memory, m)) for m, model in enumerate(self.models)])

    def step(self, tokens: Tensor, memory: State, state: State) -> tuple[Tensor, State, Tensor | None]:
        """Averaged log-probabilities [N,V], the states of all models, mean attention [N,S]."""
        mean, states, looked = torch.empty(0), [], []
        for m, model in enumerate(self.models):
            log_probabilities, new, attention = model.step(tokens, part_of(memory, m), part_of(state, m))  # [N,V]
            states.append(new)
            if attention is not None:
                looked.append(attention)
            if m == 0:
                mean = log_probabilities
            elif self.average == "probabilities":
                mean = torch.logaddexp(mean, log_probabilities)
            else:
                mean = mean + log_probabilities
        count = len(self.models)
        if count > 1:
            probabilities = self.average == "probabilities"
            mean = mean - math.log(count) if probabilities else (mean / count).log_softmax(-1)
        return mean, prefixed(states), _mean_attention(looked)


def prefixed(states: list[State]) -> State:
    """The tensors of all models under one roof."""
    return {f"{m}.{name}": value for m, state in enumerate(states) for name, value in state.items()}


def part_of(state: State, number: int) -> State:
    """The tensors of one model under its own names."""
    prefix = f"{number}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _mean_attention(attention: list[Tensor]) -> Tensor | None:
    if len({value.shape for value in attention}) != 1:
        return None
    return torch.stack(attention).mean(0)  # [N,S]
