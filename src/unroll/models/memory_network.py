"""End-to-end memory network (Sukhbaatar et al. 2015, arXiv:1503.08895).

With facts x_1 .. x_F, question q, hop k of K, all embeddings matrices over bags of words:

    m_i = sum_j l_j * A_k x_ij + T_k(age i)       what hop k compares the question with
    c_i = sum_j l_j * C_k x_ij + T'_k(age i)      what it reads
    u_1 = sum_j l_j * B q_j
    p_i = softmax(u_k . m_i)       o = sum_i p_i c_i       (linear start: without the softmax)
    u_{k+1} = u_k + o              adjacent:  A_{k+1} = C_k, B = A_1
    u_{k+1} = H u_k + o            layer-wise (as in an RNN):  the same A and C in every hop
    scores = W u_{K+1}

Position encoding: l_kj = (1 - j/J) - (k/D)(1 - 2j/J) for word j of J and component k of D, both from 1. This is
a_j + (k/D) b_j, so that a fact is two weighted bags of words, a matrix product with all embeddings at once. Facts that
say the same are embedded once: u . m_i = u . (words of i) + u . T_k(age i), and what is read is summed in the same way.
Temporal encoding: a learnt vector for each age; what is older than `memory` facts is not read.

With `matrix` H stands in adjacent tying too, u_{k+1} = H u_k + o, and begins as 1: without it a question keeps to the
direction that it came in, and paths and places (tasks 17 to 19) are hardly learnt.

Deliberate differences: the answers of bAbI are no words (`apple,milk` is one of them), so W is a matrix of its own and
not C_K transposed; `gate` puts a nonlinearity between hops, u + ReLU(...) as in the language model of the paper, where
half of the units are rectified; weights start normal with deviation `start` (0.1 in the paper).

`per_task`: a model for each task, as in most columns of the paper's tables, all of them trained in one run: the part of a
batch that is of a task goes through that task's model alone.

Number to reach on bAbI 10k: mean error 4.2 % (best of ten runs per task, as reported by Henaff et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.dropout import Dropout
from unroll.layers.stories import (
    Answer,
    AnswerLayer,
    StoryModel,
    ages,
    at_least_float32,
    distinct,
    facts_told,
    weighted_words,
)


class Config(Strict):
    """hops K, width D, tying of the embeddings over hops, matrix: H in adjacent tying too; memory: facts that are read at
    most; positions: whether the order of words counts; rectified: share of the units of u that a ReLU acts on between
    hops; dropout of u. per_task: every task has weights of its own."""

    hops: int = Field(3, ge=1)
    width: int = Field(50, ge=1)
    tying: Literal["adjacent", "layer_wise"] = "adjacent"
    matrix: bool = False
    positions: bool = True
    memory: int = Field(50, ge=1)
    rectified: float = Field(0.0, ge=0.0, le=1.0)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    start: float = Field(0.1, gt=0.0)
    per_task: bool = False

    @model_validator(mode="after")
    def known(self) -> Self:
        if self.matrix and self.tying != "adjacent":
            raise ValueError("matrix: is for adjacent tying, layer-wise tying has it anyway")
        if self.per_task and self.dropout:
            raise ValueError("per_task: knows no dropout, whose masks go by the place of a row in the whole batch")
        return self


TINY = [
    {"hops": 2, "width": 6, "memory": 8},
    {"hops": 3, "width": 5, "tying": "layer_wise", "positions": False, "memory": 8},
    {"hops": 2, "width": 6, "memory": 3, "rectified": 0.5, "dropout": 0.1},
    {"hops": 2, "width": 6, "memory": 8, "matrix": True},
    {"hops": 2, "width": 6, "memory": 8, "per_task": True},
]
"""Small configurations, at least one for each option: what the contract tests build."""


class Model(StoryModel):
    """See the head of this file."""

    def __init__(self, config: Config, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.config, self.words = config, vocabulary["words"]
        if config.per_task:
            alone = config.model_copy(update={"per_task": False})
            self.of_task = nn.ModuleList(Model(alone, vocabulary) for _ in range(vocabulary["tasks"]))
            return
        adjacent, width = config.tying == "adjacent", config.width
        self.tables = config.hops + 1 if adjacent else 2
        # Adjacent: hop k compares with table k and reads table k + 1. Layer-wise: with table 0 and table 1 always.
        self.embedding = nn.Parameter(torch.randn(self.words, self.tables, width) * config.start)  # [V,tables,D]
        self.times = nn.Parameter(torch.randn(config.memory, self.tables, width) * config.start)
        self.embed_question = None if adjacent else nn.Parameter(torch.randn(self.words, width) * config.start)
        self.between = None if adjacent and not config.matrix else nn.Linear(width, width, bias=False)  # H
        if adjacent and self.between is not None:
            nn.init.eye_(self.between.weight)
        self.dropout = Dropout(config.dropout)
        self.output = AnswerLayer(width, vocabulary, width)

    def forward(self, inputs: Mapping[str, Tensor], linear: bool = False) -> Answer:
        """`linear`: attention without its softmax."""
        if self.config.per_task:
            return self._each_by_its_own(inputs, linear)
        facts, question = inputs["facts"], inputs["question"]  # [B,F,W] [B,Q]
        age = ages(facts)  # [B,F]
        told = facts_told(facts) & (age < self.config.memory)
        age = age.clamp_max(self.config.memory - 1)
        sentences, number = distinct(facts.flatten(0, 1), self.words)  # [U,W] [B*F]
        number = number.view(facts.shape[:2])  # [B,F]
        embedded = self._embedded(sentences, self.embedding.flatten(1)).unflatten(-1, (self.tables, -1))  # [U,tables,D]
        first = self.embedding[:, 0] if self.embed_question is None else self.embed_question
        state = self._embedded(question, first)  # [B,D]
        attention = []
        for hop in range(self.config.hops):
            table = hop if self.embed_question is None else 0
            said, when = state @ embedded[:, table].T, state @ self.times[:, table].T  # [B,U] [B,memory]
            scores = said.gather(1, number) + when.gather(1, age)  # [B,F]
            if linear:
                weights = scores.masked_fill(~told, 0.0)
            else:
                weights = at_least_float32(scores).masked_fill(~told, -math.inf).softmax(-1).to(scores.dtype)
            attention.append(at_least_float32(weights))
            said = torch.zeros_like(said).scatter_add(1, number, weights)
            when = torch.zeros_like(when).scatter_add(1, age, weights)
            found = said @ embedded[:, table + 1] + when @ self.times[:, table + 1]  # [B,D]
            state = self._rectified(found + (state if self.between is None else self.between(state)))
        return Answer(self.output(self.dropout(state), self.embedding[:, -1]), torch.stack(attention, 1))

    def _each_by_its_own(self, inputs: Mapping[str, Tensor], linear: bool) -> Answer:
        """The answers of each row's own model; a batch without rows goes through the first one."""
        task = inputs["task"]  # [B]
        answers = [
            self.of_task[number]({name: values[task == number] for name, values in inputs.items()}, linear)
            for number in task.unique().tolist() or [0]
        ]
        place = task.argsort(
            stable=True
        ).argsort()  # [B] of each row among those of all tasks, one task after the other
        return Answer(
            torch.cat([answer.scores for answer in answers])[place],
            torch.cat([answer.attention for answer in answers])[place],
        )

    @property
    def flops_per_token(self) -> int:
        """Of the model that a fact goes through."""
        if not self.config.per_task:
            return super().flops_per_token
        first = self.of_task[0]
        assert isinstance(first, Model)
        return first.flops_per_token

    def _rectified(self, state: Tensor) -> Tensor:
        count = round(self.config.rectified * self.config.width)
        return torch.cat([state[:, :count].relu(), state[:, count:]], -1) if count else state

    def _embedded(self, sentences: Tensor, table: Tensor) -> Tensor:
        """sum_j l_j * (table of word j): ids [...,W], table [V,n D] -> [...,n D]."""
        if not self.config.positions:
            return weighted_words(sentences, torch.ones_like(sentences, dtype=table.dtype), len(table)) @ table
        width = self.config.width
        places = torch.arange(1, sentences.shape[-1] + 1, device=sentences.device, dtype=table.dtype)
        share = places / (sentences > 0).sum(-1, keepdim=True).clamp_min(1)  # j/J, [...,W]
        plain = weighted_words(sentences, 1 - share, len(table)) @ table
        by_component = weighted_words(sentences, 2 * share - 1, len(table)) @ table
        component = torch.arange(1, width + 1, device=table.device, dtype=table.dtype).div(width)  # k/D
        return plain + by_component * component.repeat(table.shape[-1] // width)
