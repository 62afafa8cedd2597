"""A reader of stories: facts and question attend to each other, hop by hop; the latest fact that matters wins.

Every fact is one vector, and so is the question; there are F + 1 nodes, the question's after all facts:

    f_i = ReLU(sum_j W_j e(w_ij) + b)      q likewise, with matrices of its own
    x_i = M [f_i; q; f_i * q] + sum of w_jk over the places where word j of the fact is word k of the question
    x_q = q + b_question                   so facts are read with the question in mind
    hop:   x <- x + O [heads of attention over LayerNorm(x)]
           x <- x + W_2 ReLU(W_1 LayerNorm(x))
    scores = W LayerNorm(x_q)

The logits of a head are z_ti = k_i . q_t / sqrt(D_h) + sum_r u_r sum_w g_rw n_tw n_iw: n_tw is 1 if word w stands in
sentence t, g_rw says how much word w is of kind r (of `kinds`; names are all alike), and u_r how much the head cares for
words of that kind. So "about the same thing" need not be found out anew for every name and every place in a sentence.
Heads differ in how logits become weights:

    recent   stick-breaking over the nodes before t, from the nearest on:  a_ti = s(z_ti) prod_{i<j<t} (1 - s(z_tj))
    next     the same over the nodes after t
    any      softmax over all nodes

with s the sigmoid. A recent head answers "the last time that ..." without any encoding of time: the nearest match takes
the weight, what is left goes further back, and nothing need be read at all. This is the update gate of query-reduction
networks (Seo et al. 2017, arXiv:1606.04582) for each pair of nodes, and the attention of Tan et al. (2025,
arXiv:2410.17980) beside that of Vaswani et al. 2017, 1706.03762. Softmax heads serve facts without order (paths,
positions, kinds of animals). The last hop is computed for the question alone.

The attention that is reported is the question's, each hop, as the mean over its recent and any heads; it may sum
to less than one. Number to reach on bAbI 10k: mean error 0.5 % and no failed task (Henaff et al. 2017, a model per task).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.dropout import Dropout
from unroll.layers.stories import (
    ENTITIES,
    Answer,
    AnswerLayer,
    SentenceEncoder,
    StoryModel,
    at_least_float32,
    facts_told,
)

NEVER = -1e9


class Config(Strict):
    """hops; width D; embedding E of a word; places: words of a sentence that have a matrix of their own; heads of each
    kind; inner width of the feed-forward part; kinds of words; shared: the same weights in every hop; dropout."""

    hops: int = Field(4, ge=1)
    width: int = Field(128, ge=1)
    embedding: int = Field(32, ge=1)
    places: int = Field(12, ge=1)
    recent: int = Field(4, ge=0)
    next: int = Field(2, ge=0)
    any: int = Field(2, ge=0)
    inner: int = Field(256, ge=1)
    kinds: int = Field(4, ge=1)
    shared: bool = False
    dropout: float = Field(0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def heads_fit(self) -> Config:
        heads = self.recent + self.next + self.any
        if heads == 0 or self.width % heads:
            raise ValueError(f"width {self.width} is no multiple of {heads} heads")
        if self.recent + self.any == 0:
            raise ValueError("the question comes last: heads of kind recent or any are needed to read facts")
        return self


TINY = [
    {"hops": 2, "width": 6, "embedding": 4, "recent": 1, "next": 1, "any": 1, "inner": 8},
    {"hops": 3, "width": 6, "embedding": 4, "places": 3, "recent": 2, "next": 0, "any": 0, "inner": 8, "shared": True},
    {"hops": 1, "width": 4, "embedding": 3, "recent": 0, "next": 0, "any": 2, "inner": 8, "dropout": 0.1},
]
"""Small configurations, at least one for each option: what the contract tests build."""


class Hop(nn.Module):
    """One round of attention and a feed-forward part."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.config, self.heads = config, config.recent + config.next + config.any
        self.attention_norm, self.inner_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.combine = nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, config.inner), nn.Linear(config.inner, width)
        self.dropout = Dropout(config.dropout)
        self.match = nn.Parameter(torch.rand(self.heads, config.kinds) * 2 / config.kinds)

    def forward(self, nodes: Tensor, told: Tensor, common: Tensor, last: bool = False) -> tuple[Tensor, Tensor]:
        """nodes [B,N,D], told [B,N], words in common [B,kinds,N,N] -> nodes [B,N,D] and weights [B,H,N,N]; with `last` of
        the last node alone."""
        normed = self.attention_norm(nodes)
        asking = normed[:, -1:] if last else normed  # [B,T,D]
        query = self._split(self.query(asking))  # [B,H,T,D/H]
        key, value = (self._split(part) for part in self.key_value(normed).chunk(2, -1))
        logits = at_least_float32(query @ key.transpose(-1, -2)) / math.sqrt(query.shape[-1])  # [B,H,T,N]
        logits = logits + torch.einsum("hr,brtn->bhtn", self.match, common[:, :, -1:] if last else common)
        weights = self.weights(logits, told)
        read = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)  # [B,T,D]
        nodes = nodes[:, -1:] if last else nodes
        nodes = nodes + self.dropout(self.combine(read))
        inner = torch.relu(self.inner(self.inner_norm(nodes)))
        return nodes + self.dropout(self.outer(inner)), weights

    def weights(self, logits: Tensor, told: Tensor) -> Tensor:
        """Logits [B,H,T,N] of the last T nodes to weights, head by head."""
        asking, nodes = logits.shape[-2:]
        recent, following, free = logits.split([self.config.recent, self.config.next, self.config.any], 1)
        told = told[:, None, None]  # [B,1,1,N]
        before = torch.ones(asking, nodes, dtype=torch.bool, device=logits.device).tril(nodes - asking - 1)
        after = torch.ones(asking, nodes, dtype=torch.bool, device=logits.device).triu(nodes - asking + 1)
        parts = []
        if self.config.recent:
            parts.append(stick_breaking(recent, before & told))
        if self.config.next:
            parts.append(stick_breaking(following.flip(-1), (after & told).flip(-1)).flip(-1))
        if self.config.any:
            parts.append(free.masked_fill(~told, NEVER).softmax(-1))
        return torch.cat(parts, 1)

    def _split(self, inputs: Tensor) -> Tensor:
        """[B,T,D] -> [B,H,T,D/H]."""
        return inputs.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def stick_breaking(logits: Tensor, allowed: Tensor) -> Tensor:
    """a_i = s(z_i) prod_{j>i} (1 - s(z_j)) over the allowed places of the last dimension; 0 elsewhere.

    Computed as exp(log s(z_i) + sum_{j>i} log(1 - s(z_j))). Worked example, z = (0, 0, 0): a = (1/8, 1/4, 1/2).
    """
    passed_on = F.logsigmoid(-logits).masked_fill(~allowed, 0.0)
    after = passed_on.sum(-1, keepdim=True) - passed_on.cumsum(-1)
    return (F.logsigmoid(logits) + after).masked_fill(~allowed, NEVER).exp()


class Model(StoryModel):
    """See the head of this file."""

    def __init__(self, config: Config, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.embedding = nn.Embedding(vocabulary["words"], config.embedding, padding_idx=0)
        self.encode_fact = SentenceEncoder(self.embedding, config.places, width)
        self.encode_question = SentenceEncoder(self.embedding, config.places, width)
        self.mix = nn.Linear(3 * width, width)
        self.meet = nn.Linear(config.places**2, width, bias=False)
        self.listed_words = vocabulary["words"] - ENTITIES - vocabulary["entities"]
        self.kinds = nn.Parameter(
            torch.rand(config.kinds, ENTITIES + min(vocabulary["entities"], 1) + self.listed_words)
        )
        self.question_bias = nn.Parameter(torch.zeros(width))
        self.hops = nn.ModuleList(Hop(config) for _ in range(1 if config.shared else config.hops))
        self.norm, self.dropout = nn.LayerNorm(width), Dropout(config.dropout)
        self.output = AnswerLayer(width, vocabulary, config.embedding)

    def forward(self, inputs: Mapping[str, Tensor]) -> Answer:
        facts = torch.relu(self.encode_fact(inputs["facts"]))  # [B,F,D]
        question = torch.relu(self.encode_question(inputs["question"]))[:, None]  # [B,1,D]
        mixed = self.mix(torch.cat([facts, question.expand_as(facts), facts * question], -1))
        mixed = mixed + self.meet(self._meetings(inputs["facts"], inputs["question"]))
        nodes = self.dropout(torch.cat([mixed, question + self.question_bias], 1))  # [B,F+1,D]
        told = F.pad(facts_told(inputs["facts"]), (0, 1), value=True)  # [B,F+1]
        common = self._common(inputs["facts"], inputs["question"])
        attention = []
        for number in range(self.config.hops):
            hop = self.hops[number % len(self.hops)]
            nodes, weights = hop(nodes, told, common, last=number + 1 == self.config.hops)
            attention.append(self._reported(weights[:, :, -1, :-1]))
        return Answer(self.output(self.norm(nodes[:, -1]), self.embedding.weight), torch.stack(attention, 1))

    def _meetings(self, facts: Tensor, question: Tensor) -> Tensor:
        """1 where word j of a fact is word k of the question: [B,F,W], [B,Q] -> [B,F,places * places]."""
        places = self.config.places
        facts, question = facts[..., :places], question[:, :places]
        same = (facts[..., None] == question[:, None, None]) & (facts > 0)[..., None]  # [B,F,W,Q]
        room = (0, places - question.shape[-1], 0, places - facts.shape[-1])
        return F.pad(same, room).flatten(2).to(self.norm.weight.dtype)

    def _reported(self, weights: Tensor) -> Tensor:
        """The mean over heads, [B,H,F] -> [B,F], without those that look after the question, where nothing is."""
        first, second = self.config.recent, self.config.recent + self.config.next
        return torch.cat([weights[:, :first], weights[:, second:]], 1).mean(1)

    def _common(self, facts: Tensor, question: Tensor) -> Tensor:
        """sum_w g_rw n_tw n_iw: how many words of each kind two sentences have in common, [B,kinds,N,N]."""
        words = torch.cat([self._present(facts), self._present(question)[:, None]], 1)  # [B,N,V]
        names = self.kinds[:, ENTITIES : ENTITIES + 1].expand(-1, self.output.entities)
        kinds = torch.cat([self.kinds[:, :ENTITIES], names, self.kinds[:, -self.listed_words :]], 1)  # [kinds,V]
        weighted = words[:, None] * kinds[:, None]  # [B,kinds,N,V]
        return (weighted.flatten(1, 2) @ words.transpose(1, 2)).unflatten(1, (len(kinds), -1))

    def _present(self, sentences: Tensor) -> Tensor:
        """1 for every word that stands in a sentence: ids [...,W] -> [...,V]."""
        weight = self.norm.weight
        bags = torch.zeros(
            *sentences.shape[:-1], self.embedding.num_embeddings, dtype=weight.dtype, device=weight.device
        )
        bags.scatter_(-1, sentences, 1.0)
        bags[..., 0] = 0.0
        return bags
