"""Attention of a decoder over a memory: which parts of the source does each query read?

Papers: Bahdanau et al. 2015, arXiv:1409.0473 (additive); Luong et al. 2015, 1508.04025 (dot, general); Vaswani et al.
2017, 1706.03762 (scaled dot product, several heads); Tu et al. 2016, 1601.04811 (coverage, the linguistic form with one
number a source position).

With query q_t [H], memory m_s [D], weights a_ts = softmax_s(score(q_t, m_s)), context c_t = sum_s a_ts m_s:

    dot         q_t . m_s                      needs H = D
    general     q_t . W m_s
    additive    v . tanh(W m_s + U q_t)        with coverage: + w sum_{t' < t} a_t's inside the tanh
    multi_head  (U_h q_t . W_h m_s) / sqrt(D_h) for each head, contexts V_h m_s side by side, then W_o; the weights
                given back are the mean over heads

The queries of one memory row are many: the time steps of one sequence in training, the hypotheses of a beam in
decoding. So a memory row is never copied. Softmax in float32; masked positions get weight 0, exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from unroll.errors import UserError


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """softmax over the last dimension of `scores` [B,Q,S] in float32, 0 where `mask` [B,S] is false."""
    scores = scores.float().masked_fill(~mask[:, None], -math.inf)  # [B,Q,S]
    return scores.softmax(-1)


class Attention(nn.Module):
    """Base: `keys(values)` once for each memory, then `forward` as often as there are queries."""

    def __init__(self, query_width: int, memory_width: int) -> None:
        super().__init__()
        self.query_width, self.memory_width = query_width, memory_width

    def keys(self, values: Tensor) -> Tensor:
        """What the scores read of the memory [B,S,D]: [B,S,A]."""
        raise NotImplementedError

    def scores(self, queries: Tensor, keys: Tensor, coverage: Tensor | None) -> Tensor:
        """[B,Q,H], [B,S,A] -> [B,Q,S]."""
        raise NotImplementedError

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, coverage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read a memory.

        Args:
            queries: [B,Q,H].
            keys: [B,S,A] as `keys(values)` gave them.
            values: [B,S,D].
            mask: [B,S], true where there is something to read, at least once a row.
            coverage: [B,Q,S], the weights that each query's predecessors have spent.

        Returns:
            Contexts [B,Q,D] and weights [B,Q,S] in float32, which sum to 1.
        """
        weights = masked_softmax(self.scores(queries, keys, coverage), mask)  # [B,Q,S]
        return weights.to(values.dtype) @ values, weights


class DotAttention(Attention):
    """Scores are plain products of query and memory."""

    def __init__(self, query_width: int, memory_width: int) -> None:
        super().__init__(query_width, memory_width)
        if query_width != memory_width:
            raise UserError(f"attention dot: the query has width {query_width}, the memory {memory_width}; use general")

    def keys(self, values: Tensor) -> Tensor:
        return values

    def scores(self, queries: Tensor, keys: Tensor, coverage: Tensor | None) -> Tensor:
        return queries.to(keys.dtype) @ keys.transpose(1, 2)  # [B,Q,S]


class GeneralAttention(DotAttention):
    """Scores through a matrix between query and memory."""

    def __init__(self, query_width: int, memory_width: int) -> None:
        Attention.__init__(self, query_width, memory_width)
        self.project = nn.Linear(memory_width, query_width, bias=False)

    def keys(self, values: Tensor) -> Tensor:
        return self.project(values)  # [B,S,H]


class AdditiveAttention(Attention):
    """Scores of a network with one hidden layer as wide as the query, optionally told what was read before."""

    def __init__(self, query_width: int, memory_width: int, coverage: bool = False) -> None:
        super().__init__(query_width, memory_width)
        self.project_memory = nn.Linear(memory_width, query_width)
        self.project_query = nn.Linear(query_width, query_width, bias=False)
        self.combine = nn.Linear(query_width, 1, bias=False)
        self.coverage = nn.Parameter(torch.zeros(query_width)) if coverage else None

    def keys(self, values: Tensor) -> Tensor:
        return self.project_memory(values)  # [B,S,A]

    def scores(self, queries: Tensor, keys: Tensor, coverage: Tensor | None) -> Tensor:
        inner = self.project_query(queries)[:, :, None] + keys[:, None]  # [B,Q,S,A]
        if self.coverage is not None and coverage is not None:
            inner = inner + coverage[..., None] * self.coverage
        return self.combine(torch.tanh(inner)).squeeze(-1)  # [B,Q,S]


class MultiHeadAttention(Attention):
    """Scaled dot products in several heads."""

    def __init__(self, query_width: int, memory_width: int, heads: int) -> None:
        super().__init__(query_width, memory_width)
        if query_width % heads:
            raise UserError(f"attention multi_head: width {query_width} cannot be shared by {heads} heads")
        self.heads = heads
        self.project_query = nn.Linear(query_width, query_width)
        self.project_memory = nn.Linear(memory_width, 2 * query_width)
        self.combine = nn.Linear(query_width, memory_width)

    def keys(self, values: Tensor) -> Tensor:
        return self.project_memory(values)  # [B,S,2H] keys and values of all heads

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, coverage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        queries = self._heads(self.project_query(queries))  # [B,H,Q,E]
        read, content = (self._heads(part) for part in keys.chunk(2, -1))  # [B,H,S,E] each
        scores = queries.to(read.dtype) @ read.transpose(2, 3) / math.sqrt(queries.shape[-1])  # [B,H,Q,S]
        weights = masked_softmax(scores.flatten(1, 2), mask).view_as(scores)  # [B,H,Q,S]
        contexts = weights.to(content.dtype) @ content  # [B,H,Q,E]
        return self.combine(contexts.transpose(1, 2).flatten(2)), weights.mean(1)

    def _heads(self, wide: Tensor) -> Tensor:
        return wide.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def attention_layer(
    kind: str, query_width: int, memory_width: int, heads: int = 1, coverage: bool = False
) -> Attention:
    """The attention of this name: "dot", "general", "additive" (the only one with `coverage`) or "multi_head".

    Raises:
        UserError: unknown name, or widths that do not fit it.
    """
    if coverage and kind != "additive":
        raise UserError(f"attention {kind}: coverage belongs to additive attention")
    if kind == "dot":
        return DotAttention(query_width, memory_width)
    if kind == "general":
        return GeneralAttention(query_width, memory_width)
    if kind == "additive":
        return AdditiveAttention(query_width, memory_width, coverage)
    if kind == "multi_head":
        return MultiHeadAttention(query_width, memory_width, heads)
    raise UserError(f"attention: found {kind!r}, allowed: dot, general, additive, multi_head")


def spread(states: Tensor, rows: int) -> Tensor:
    """The rows [N,...] of several hypotheses for each of `rows` memories side by side: [B,N/B,...]."""
    return states.unflatten(0, (rows, -1))
