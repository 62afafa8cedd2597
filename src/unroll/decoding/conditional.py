"""Decoding a sequence that depends on a source, the parts that every method needs, and the plain methods: greedy,
drawing, and scoring what is given. Beam search is in `beam.py`.

Models are `layers/generator.py`'s, or anything else that is `Decodable`: memory of B rows, state of N = B*K. BOS is
never generated; every hypothesis ends with EOS, which counts in its log-probability, also where the length limit left nothing
else to choose.

Sums of log-probabilities are kept in float64. No result depends on which other sources are in the batch, but for what
rounding in the model does to exact ties; drawing depends on it through the order in which random numbers are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Protocol, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unroll.config import Strict
from unroll.decoding.sampling import filter_logits
from unroll.errors import UserError
from unroll.layers.generator import State, bos, eos


class Decodable(Protocol):
    """What decoding asks of a model: the interface of `layers.generator.ConditionalGenerator`, which see."""

    @property
    def vocabulary(self) -> int:
        """V, with BOS and EOS."""

    def encode(self, inputs: Mapping[str, Tensor]) -> State:
        """Sources -> memory of B rows."""

    def initial_state(self, memory: State) -> State:
        """State before BOS, B rows."""

    def step(self, tokens: Tensor, memory: State, state: State) -> tuple[Tensor, State, Tensor | None]:
        """`tokens` [N], memory of B rows, state of N -> log-probabilities [N,V], state, attention [N,S] or none."""


class Longest(Strict):
    """Most tokens of a hypothesis, EOS aside: `per_source` times the tokens of its source, rounded down, and `plus`."""

    per_source: float = Field(2.0, ge=0.0, allow_inf_nan=False)
    plus: int = Field(10, ge=0)


class LengthOptions(Strict):
    """`longest`: a number of tokens, or a number for each token of the source (`Longest`); `shortest` and the length of
    a prefix raise it where they are above it. No EOS before `shortest` tokens."""

    longest: Annotated[int, Field(ge=0)] | Longest = Longest()
    shortest: int = Field(0, ge=0)


class SampleOptions(LengthOptions):
    """`count` samples for each source; the rest as in `sampling.py`."""

    count: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0.0, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0.0, le=1.0)


@dataclass(frozen=True)
class Hypothesis:
    """`tokens` without BOS and EOS; `log_probability` sums over tokens and EOS; `score` is what hypotheses were ranked
    by. `attention` [T,S], if asked for: what the model looked at when it chose each token, without the padding of S."""

    tokens: list[int]
    score: float
    log_probability: float
    attention: np.ndarray | None = None


@dataclass(frozen=True)
class Samples:
    """`tokens` [B*K,T] with EOS, -1 after it; `log_probabilities` [B*K] float64, under the model as it is: before
    temperature, top-k and top-p."""

    tokens: Tensor
    log_probabilities: Tensor


# --- what every method needs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constraints:
    """What a source's hypotheses must be like: at most `limit` [B] tokens, the first ones those of `prefix` [B,P]."""

    limit: Tensor
    prefix: Tensor
    end: int

    @classmethod
    def of(cls, options: LengthOptions, memory: State, prefix: Tensor | None, vocabulary: int) -> Self:
        """Raises UserError if a prefix holds BOS, EOS or a number that is no token, or has padding in its middle."""
        mask = memory["mask"]  # [B,S]
        if prefix is None:
            prefix = mask.new_empty((len(mask), 0), dtype=torch.int64)
        check_prefix(prefix, len(mask), vocabulary)
        if isinstance(options.longest, int):
            limit = torch.full_like(mask[:, :1].sum(1), options.longest)
        else:
            limit = (mask.sum(1) * options.longest.per_source).long() + options.longest.plus  # [B]
        limit = limit.clamp(min=options.shortest).maximum((prefix >= 0).sum(1))
        return cls(limit, prefix.to(mask.device, torch.int64), eos(vocabulary))

    def required(self, position: int) -> Tensor | None:
        """The only token allowed at a position, -1 where any is [B]; none if there is no such source."""
        tokens = torch.where(self.limit == position, self.end, -1)  # [B]
        if position < self.prefix.shape[1]:
            tokens = torch.where(self.prefix[:, position] >= 0, self.prefix[:, position], tokens)
        return tokens if bool((tokens >= 0).any()) else None

    def select(self, rows: Tensor) -> Constraints:
        """The same for some of the sources."""
        return replace(self, limit=self.limit[rows], prefix=self.prefix[rows])


def check_prefix(prefix: Tensor, sources: int, vocabulary: int) -> None:
    """Refuse a prefix that cannot be generated.

    Raises:
        UserError: not one row for each source, a token that cannot be generated, padding before a token.
    """
    if prefix.dim() != 2 or len(prefix) != sources:
        raise UserError(f"prefix: found shape {tuple(prefix.shape)}, needed is one row for each of {sources} sources")
    for row, tokens in enumerate(prefix.tolist()):
        length = tokens.index(-1) if -1 in tokens else len(tokens)
        wrong = [token for token in tokens[:length] if not 0 <= token < bos(vocabulary)]
        wrong += [token for token in tokens[length:] if token != -1]
        if wrong:
            raise UserError(
                f"prefix of source {row}: found {wrong[0]}, allowed are tokens 0 to {bos(vocabulary) - 1}, then -1 alone"
            )


def length_penalty(length: Tensor | int, alpha: float) -> Tensor | float:
    """lp(Y) = ((5 + |Y|) / 6)^alpha, |Y| tokens with EOS (Wu et al. 2016, equation 14)."""
    return ((5 + length) / 6) ** alpha


def coverage_score(coverage: Tensor, mask: Tensor, beta: float) -> Tensor:
    """cp(X; Y) = beta sum_s log min(1, attention that token s of the source has had) (Wu et al. 2016, equation 14).

    `coverage` and `mask` [...,S] -> [...]. A token that got nothing counts as one that got 1e-10: a finite penalty.
    """
    logarithms = coverage.double().clamp(1e-10, 1.0).log()  # [...,S]
    return beta * logarithms.masked_fill(~mask, 0.0).sum(-1)


def select_rows(state: State, rows: Tensor) -> State:
    """The rows of a memory or a state, in the order given."""
    return {name: value.index_select(0, rows) for name, value in state.items()}


def expand_rows(state: State, count: int) -> State:
    """B rows -> B `count` rows: those of a hypothesis for each of a source."""
    return {name: value.repeat_interleave(count, 0) for name, value in state.items()} if count > 1 else state


def need_attention(attention: Tensor | None) -> Tensor:
    if attention is None:
        raise UserError("coverage_penalty, attention: the model has no attention; allowed are 0 and none")
    return attention


def source_lengths(memory: State) -> list[int]:
    """Positions up to the last token of each source: what of S is not padding."""
    mask = memory["mask"]  # [B,S]
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)  # [S]
    return (mask * positions).amax(1).tolist() if mask.shape[1] else [0] * len(mask)


def check_numbers(log_probabilities: Tensor) -> None:
    """Refuse NaN at once: it compares with nothing, so it would silently fall out of a beam.

    Raises:
        UserError: there is one.
    """
    if bool(log_probabilities.isnan().any()):
        raise UserError("decoding: the model gives log-probabilities that are not numbers (NaN)")


def check_finite(log_probabilities: Tensor) -> None:
    """Refuse what came of a model without usable probabilities.

    Raises:
        UserError: a value of `log_probabilities` [N] is not finite.
    """
    wrong = int((~log_probabilities.isfinite()).sum())
    if wrong:
        raise UserError(
            f"decoding: the model gives {wrong} of {len(log_probabilities)} rows no token of finite log-probability"
        )


# --- greedy -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(
    model: Decodable,
    memory: State,
    options: LengthOptions,
    prefix: Tensor | None = None,
    with_attention: bool = False,
) -> list[Hypothesis]:
    """The likeliest token at each step, for each source. `score` is the log-probability.

    `prefix` [B,P]: tokens to start with, padded with -1. Of equally likely tokens the lower id is taken.

    Raises:
        UserError: a prefix that cannot be generated, a model whose probabilities are not finite or, if attention is
            asked for, without attention.
    """
    start, end = bos(model.vocabulary), eos(model.vocabulary)
    limits = Constraints.of(options, memory, prefix, model.vocabulary)
    sources = torch.arange(len(limits.limit), device=limits.limit.device)  # [B] those still going on
    whole, state, tokens = memory, model.initial_state(memory), torch.full_like(sources, start)
    totals = torch.zeros(len(sources), dtype=torch.float64, device=sources.device)  # [B]
    steps: list[tuple[Tensor, Tensor, Tensor | None]] = []
    while len(sources):
        log_probabilities, state, attention = model.step(tokens, memory, state)  # [B,V]
        best, tokens = log_probabilities[:, :start].max(-1)  # [B] BOS and EOS aside
        if len(steps) >= options.shortest:
            tokens = torch.where(log_probabilities[:, end] > best, end, tokens)
        required = limits.required(len(steps))
        if required is not None:
            tokens = torch.where(required >= 0, required, tokens)
        totals[sources] += log_probabilities.gather(1, tokens[:, None])[:, 0].double()
        steps.append((sources, tokens, need_attention(attention) if with_attention else None))
        going = (tokens != end).nonzero()[:, 0]  # [B] rows
        if len(going) < len(tokens):
            sources, tokens, limits = sources[going], tokens[going], limits.select(going)
            memory, state = select_rows(memory, going), select_rows(state, going)
    check_finite(totals)
    return _greedy_hypotheses(steps, totals, whole, end)


def _greedy_hypotheses(
    steps: list[tuple[Tensor, Tensor, Tensor | None]], totals: Tensor, memory: State, end: int
) -> list[Hypothesis]:
    """What was generated, from (sources, tokens, attention) of each step."""
    chosen = torch.full((len(totals), len(steps)), end)  # [B,T]
    looked = torch.zeros(len(totals), len(steps), memory["mask"].shape[1])  # [B,T,S]
    for position, (sources, tokens, attention) in enumerate(steps):
        chosen[sources.cpu(), position] = tokens.cpu()
        if attention is not None:
            looked[sources.cpu(), position] = attention.float().cpu()
    with_attention = bool(steps) and steps[0][2] is not None
    hypotheses = []
    for source, (length, total) in enumerate(zip(source_lengths(memory), totals.tolist(), strict=True)):
        tokens = chosen[source, : int((chosen[source] != end).sum())]  # [T]
        picture = looked[source, : len(tokens), :length].numpy().copy() if with_attention else None
        hypotheses.append(Hypothesis(tokens.tolist(), total, total, picture))
    return hypotheses


# --- drawing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: Decodable,
    memory: State,
    options: SampleOptions,
    generator: torch.Generator,
    prefix: Tensor | None = None,
) -> Samples:
    """`options.count` samples for each source; the same generator state and batch give the same samples.

    A source leaves the batch when all its samples have ended.

    Raises:
        UserError: a prefix that cannot be generated, or a model whose probabilities are not finite.
    """
    start, end, count = bos(model.vocabulary), eos(model.vocabulary), options.count
    limits = Constraints.of(options, memory, prefix, model.vocabulary)
    samples = torch.arange(len(limits.limit) * count, device=limits.limit.device)  # [N] those of sources going on
    state = expand_rows(model.initial_state(memory), count)
    tokens, ended = torch.full_like(samples, start), torch.zeros_like(samples, dtype=torch.bool)
    totals = torch.zeros(len(samples), dtype=torch.float64, device=samples.device)  # [N]
    steps: list[tuple[Tensor, Tensor]] = []
    while len(samples):
        log_probabilities, state, _ = model.step(tokens, memory, state)  # [N,V]
        tokens = _draw(log_probabilities, options, len(steps) >= options.shortest, generator)
        required = limits.required(len(steps))
        if required is not None:
            required = required.repeat_interleave(count)  # [N]
            tokens = torch.where(required >= 0, required, tokens)
        drawn = log_probabilities.gather(1, tokens[:, None])[:, 0].double()  # [N]
        totals[samples] += drawn.masked_fill(ended, 0.0)
        steps.append((samples, tokens.masked_fill(ended, -1)))
        ended = ended | (tokens == end)
        going = (~ended.view(-1, count).all(1)).nonzero()[:, 0]  # [B] sources
        if len(going) * count < len(samples):
            rows = (going[:, None] * count + torch.arange(count, device=going.device)).flatten()  # [N]
            samples, tokens, ended, limits = samples[rows], tokens[rows], ended[rows], limits.select(going)
            memory, state = select_rows(memory, going), select_rows(state, rows)
    check_finite(totals.view(-1, count).sum(1))
    targets = torch.full((len(totals), len(steps)), -1, device=totals.device)  # [N,T]
    for position, (rows, tokens) in enumerate(steps):
        targets[rows, position] = tokens
    return Samples(targets, totals)


def _draw(log_probabilities: Tensor, options: SampleOptions, may_end: bool, generator: torch.Generator) -> Tensor:
    """One token for each row, never BOS. [N,V] -> [N]"""
    vocabulary = log_probabilities.shape[1]
    forbidden = torch.tensor([bos(vocabulary)] if may_end else [bos(vocabulary), eos(vocabulary)])
    logits = log_probabilities.index_fill(1, forbidden.to(log_probabilities.device), -torch.inf)  # [N,V]
    check_finite(logits.amax(1))
    probabilities = filter_logits(logits, options.temperature, options.top_k, options.top_p).exp()  # [N,V]
    drawn = torch.multinomial(probabilities.to(generator.device), 1, generator=generator)  # [N,1]
    return drawn[:, 0].to(log_probabilities.device)


# --- scoring ----------------------------------------------------------------------------------------------------------


def forced_scores(model: Decodable, memory: State, targets: Tensor) -> Tensor:
    """Log-probability of each row of `targets` [N,T], K = N / B rows a source, padded with -1. -> [N], float64.

    A row is scored as it stands: with EOS as its last token it is a hypothesis, without it the beginning of one.
    Through `step`, token by token: the reference for what decoding and losses say. Gradients flow.
    """
    state = expand_rows(model.initial_state(memory), len(targets) // max(1, len(memory["mask"])))
    totals = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)  # [N]
    tokens = torch.full_like(targets[:, :1], bos(model.vocabulary))[:, 0]  # [N]
    for column in targets.unbind(1):
        log_probabilities, state, _ = model.step(tokens, memory, state)  # [N,V]
        tokens = column.clamp(min=0)
        scores = log_probabilities.gather(1, tokens[:, None])[:, 0].double()  # [N]
        totals = totals + torch.where(column >= 0, scores, 0.0)
    return totals


def as_targets(hypotheses: Iterable[Sequence[int]], end: int) -> Tensor:
    """Tokens of hypotheses as `forced_scores` reads them: [N,T], each with `end` (EOS), padded with -1."""
    rows = [torch.tensor([*tokens, end]) for tokens in hypotheses]
    return pad_sequence(rows, batch_first=True, padding_value=-1)
