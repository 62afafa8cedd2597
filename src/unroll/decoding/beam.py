"""Beam search over any `Decodable`, for all sources of a batch at once.

Graves 2012, arXiv:1211.3711; Sutskever et al. 2014, arXiv:1409.3215. Of all continuations of the hypotheses of a source
by one token, the `width` likeliest go on. Those among them that end with EOS are finished: they leave the beam, whose
places the others fill at the next step. Finished hypotheses Y of a source X are ranked by (Wu et al. 2016,
arXiv:1609.08144, equation 14)

    score(Y, X) = log P(Y | X) / lp(Y) + cp(X; Y)

with lp and cp of `conditional.py`: `length_penalty` is alpha, 0 for none, `coverage_penalty` is beta. |Y| counts EOS,
and coverage sums the attention of every step, that which chose EOS included. (The paper does not say; it also prunes by
score during the search, which is not done here.) Equal ones are ranked by time of ending, place in the beam, token id.

When a source is done: log-probabilities only fall, lp only grows with length, and cp is at most 0. So nothing that
comes of an active hypothesis can score above log P / lp(limit + 1), limit being the most tokens allowed. With `exact`
the source leaves the batch when that is no more than the worst of `n_best` kept scores, for all active hypotheses: a
beam wide enough finds what brute force finds. Otherwise it leaves as soon as no active hypothesis would score above that
worst if it ended at once and for nothing, log P / lp of one token more, as in other toolkits: where there is a length
penalty a third fewer rows, and now and then a longer translation that would have scored better is not found.

How it is made fast: the likeliest continuations are looked for in blocks of the vocabulary, of which all but the maxima
stay unread (`expand`); no tensor of the size [N,V] is made besides the model's own. What was generated is kept as one
column of parents a step, so histories are never reordered. Sources are handled one by one only after the search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from unroll.decoding.conditional import (
    Constraints,
    Decodable,
    Hypothesis,
    LengthOptions,
    check_finite,
    check_numbers,
    coverage_score,
    length_penalty,
    need_attention,
    select_rows,
    source_lengths,
)
from unroll.layers.generator import State, bos, eos

BLOCK = 64
"""Tokens whose maximum is taken at once; a multiple of 32, which PyTorch reduces with vector instructions."""


class BeamOptions(LengthOptions):
    """See the top of this file. `n_best` hypotheses are kept for each source, fewer if fewer have ended. `exact`: a source
    is searched until nothing can be better, which makes a difference with a length penalty."""

    width: int = Field(5, ge=1)
    n_best: int = Field(1, ge=1)
    length_penalty: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    coverage_penalty: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    exact: bool = False

    @model_validator(mode="after")
    def enough(self) -> Self:
        if self.n_best > self.width:
            raise ValueError(f"n_best: at most width ({self.width}) is allowed")
        return self


def beam_search(
    model: Decodable,
    memory: State,
    options: BeamOptions,
    prefix: Tensor | None = None,
    with_attention: bool = False,
) -> list[list[Hypothesis]]:
    """The `n_best` hypotheses of each source, best first.

    `memory`: from `model.encode`. `prefix` [B,P]: tokens that the hypotheses of a source start with, padded with -1.

    Raises:
        UserError: a prefix that cannot be generated; a coverage penalty or attention wanted of a model without
            attention; a model whose probabilities are not finite.
    """
    with torch.no_grad():
        search = _Search(model, memory, options, prefix, with_attention)
        while len(search.sources):
            search.step()
        return search.hypotheses()


# --- choosing continuations -------------------------------------------------------------------------------------------


def top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row and their indices [B,M] -> [B,count] twice; of equal ones the first come first.

    `torch.topk` does not say which of equal ones it takes, and sorting all of a row takes ten times as long. So its
    answer is taken where no two of it are equal, nor the worst of it and the best that it left.
    """
    length = values.shape[1]
    found, indices = values.topk(min(count + 1, length))  # [B,count+1]
    if not bool((found[:, 1:] == found[:, :-1]).any()):
        return found[:, :count], indices[:, :count]
    worst = found[:, count - 1 : count]  # [B,1]
    group = (values >= worst).int() + (values > worst)  # [B,M] 2: surely taken, 1: as good as the worst taken, 0: not
    keys = group.mul_(length).add_(torch.arange(length, 0, -1, dtype=torch.int32, device=values.device))
    indices = keys.topk(count).indices.sort(1).values  # [B,count] no two keys of a row are equal
    best, order = values.gather(1, indices).sort(dim=1, descending=True, stable=True)
    return best, indices.gather(1, order)


def expand(log_probabilities: Tensor, totals: Tensor, count: int, may_end: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best continuations of the hypotheses of each source, BOS (and EOS unless `may_end`) aside.

    `log_probabilities` [B*K,V], `totals` [B,K] float64 -> their totals, parents (0 .. K - 1) and tokens, each
    [B,count], best first; equal ones by parent, then by token. Fewer than `count` leave totals of -inf at the end.

    The best `count` tokens are all in the `count` blocks with the highest maxima. So one pass over [N,V] takes the
    maxima, and the rest happens on `count` blocks a source.
    """
    sources, width = totals.shape
    rows, vocabulary = log_probabilities.shape
    start, end = bos(vocabulary), eos(vocabulary)
    whole = start // BLOCK  # blocks without BOS and EOS
    blocks = -(-vocabulary // BLOCK)
    tail = F.pad(log_probabilities[:, whole * BLOCK :], (0, blocks * BLOCK - vocabulary), value=-torch.inf)
    tail[:, start - whole * BLOCK : (start if may_end else end) + 1 - whole * BLOCK] = -torch.inf
    body = log_probabilities[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).amax(-1)  # [N,whole]
    maxima = torch.cat([body, tail.unflatten(1, (-1, BLOCK)).amax(-1)], 1)  # [N,blocks]
    check_numbers(maxima)
    highest = (maxima.view(sources, width, blocks).double() + totals[:, :, None]).flatten(1)  # [B,K*blocks]

    picked = top(highest, min(count, highest.shape[1]))[1].sort(1).values  # [B,P] in order of parent and token
    parents, block = picked // blocks, picked % blocks
    tokens = block[:, :, None] * BLOCK + torch.arange(BLOCK, device=totals.device)  # [B,P,BLOCK]
    flat = (torch.arange(sources, device=totals.device)[:, None] * width + parents)[:, :, None] * vocabulary + tokens
    values = log_probabilities.flatten().take(flat.clamp(max=rows * vocabulary - 1)).double()  # [B,P,BLOCK]
    forbidden = (tokens == start) | (tokens > (end if may_end else start))
    values = (values + totals.gather(1, parents)[:, :, None]).masked_fill(forbidden, -torch.inf)

    best, places = top(values.flatten(1), count)  # [B,count]
    tokens = tokens.flatten(1).gather(1, places).clamp(max=end)
    return best, parents.gather(1, places // BLOCK), tokens


def force(
    chosen: tuple[Tensor, Tensor, Tensor], required: Tensor, log_probabilities: Tensor, totals: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `expand` chose, but for the sources with a `required` token [B] >= 0: their hypotheses go on with that."""
    (sources, width), count = totals.shape, chosen[0].shape[1]
    tokens = required.clamp(min=0)[:, None, None].expand(sources, width, 1)
    scores = log_probabilities.view(sources, width, -1).gather(2, tokens)[:, :, 0].double()  # [B,K]
    best, parents = top(scores + totals, width)  # [B,K]
    best = F.pad(best, (0, count - width), value=-torch.inf)  # [B,count]
    parents = F.pad(parents, (0, count - width))
    is_required = (required >= 0)[:, None]  # [B,1]
    replaced = zip((best, parents, required[:, None].expand_as(best)), chosen, strict=True)
    best, parents, tokens = (torch.where(is_required, new, old) for new, old in replaced)
    return best, parents, tokens


# --- the search -------------------------------------------------------------------------------------------------------


@dataclass
class _Column:
    """One step: the token that each row read, the row of the column before that it came from, where it looked."""

    tokens: Tensor
    parents: Tensor
    attention: Tensor | None = None


class _Search:
    """Everything that changes during a search. Rows of finished sources are dropped from all but `kept`."""

    def __init__(
        self,
        model: Decodable,
        memory: State,
        options: BeamOptions,
        prefix: Tensor | None,
        with_attention: bool,
    ) -> None:
        self.model, self.memory, self.options, self.with_attention = model, memory, options, with_attention
        self.constraints = Constraints.of(options, memory, prefix, model.vocabulary)
        self.lengths = source_lengths(memory)
        device = memory["mask"].device
        self.sources = torch.arange(len(self.lengths), device=device)  # [B] those still searched for
        self.state = model.initial_state(memory)
        self.totals = torch.zeros(len(self.lengths), 1, dtype=torch.float64, device=device)  # [B,K] -inf: no hypothesis
        self.columns = [_Column(torch.full_like(self.sources, bos(model.vocabulary)), self.sources)]
        self.coverage = torch.zeros(memory["mask"].shape, device=device) if options.coverage_penalty else None  # [N,S]
        # The best finished hypotheses of every source: score, log-probability, column and row that EOS followed.
        shape = (len(self.lengths), options.n_best, 4)
        self.kept = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)  # [B,n,4]

    def step(self) -> None:
        """Read the last tokens, choose the next ones, put away what has ended, drop the sources that are done."""
        position, column = len(self.columns) - 1, self.columns[-1]
        log_probabilities, self.state, attention = self.model.step(column.tokens, self.memory, self.state)  # [N,V]
        if self.with_attention:
            column.attention = need_attention(attention)
        if self.coverage is not None:
            self.coverage = self.coverage + need_attention(attention)  # [N,S]

        count = min(self.options.width, self.totals.shape[1] * self.model.vocabulary)
        chosen = expand(log_probabilities, self.totals, count, position >= self.options.shortest)
        required = self.constraints.required(position)
        if required is not None:
            chosen = force(chosen, required, log_probabilities, self.totals)
        totals, parents, tokens = chosen  # [B,K]
        rows = parents + torch.arange(len(parents), device=parents.device)[:, None] * self.totals.shape[1]
        ended = tokens == self.constraints.end
        if bool(ended.any()):
            self._keep(totals.masked_fill(~ended, -torch.inf), rows, position)
        self.totals = totals.masked_fill(ended | ~totals.isfinite(), -torch.inf)
        self._go_on(tokens, rows)

    def _keep(self, totals: Tensor, rows: Tensor, position: int) -> None:
        """Rank the hypotheses of this step that have ended among those kept; `totals` [B,K], -inf: has not ended."""
        scores = totals / length_penalty(position + 1, self.options.length_penalty)  # [B,K]
        if self.coverage is not None:
            mask = self.memory["mask"].repeat_interleave(self.totals.shape[1], 0)  # [N,S]
            scores = scores + coverage_score(self.coverage, mask, self.options.coverage_penalty)[rows]
        new = torch.stack([scores, totals, torch.full_like(totals, position), rows.double()], -1)  # [B,K,4]
        every = torch.cat([self.kept[self.sources], new], 1)  # [B,n+K,4]
        order = every[:, :, 0].sort(dim=1, descending=True, stable=True).indices[:, : self.options.n_best]  # [B,n]
        self.kept[self.sources] = every.gather(1, order[:, :, None].expand(-1, -1, 4))

    def _go_on(self, tokens: Tensor, rows: Tensor) -> None:
        """Put the rows in the order of their new hypotheses [B,K], without sources that can get no better."""
        length = self.constraints.limit + 1 if self.options.exact else len(self.columns) + 1
        bound = self.totals.amax(1) / length_penalty(length, self.options.length_penalty)  # [B]
        going = (bound > self.kept[self.sources, -1, 0]).nonzero()[:, 0]
        if len(going) < len(tokens):
            tokens, rows, self.totals = tokens[going], rows[going], self.totals[going]
            self.sources, self.constraints = self.sources[going], self.constraints.select(going)
            self.memory = select_rows(self.memory, going)
        rows = rows.flatten()  # [N]
        before = len(self.columns[-1].tokens)
        if len(rows) != before or not torch.equal(rows, torch.arange(before, device=rows.device)):
            self.state = select_rows(self.state, rows)
            if self.coverage is not None:
                self.coverage = self.coverage.index_select(0, rows)
        self.columns.append(_Column(tokens.flatten(), rows))

    def hypotheses(self) -> list[list[Hypothesis]]:
        """The kept ones, followed back through the columns."""
        check_finite(self.kept[:, 0, 0])
        tokens = [column.tokens.tolist() for column in self.columns]
        parents = [column.parents.tolist() for column in self.columns]
        attention = [c.attention.float().cpu().numpy() for c in self.columns if c.attention is not None]
        found: list[list[Hypothesis]] = []
        for source, length in zip(self.kept.tolist(), self.lengths, strict=True):
            found.append([])
            for score, total, column, row in source:
                if score == -torch.inf:
                    break
                path = [int(row)]
                for position in range(int(column), 0, -1):
                    path.append(parents[position][path[-1]])
                path.reverse()  # row in each column, 0 .. column
                words = [tokens[position][row] for position, row in enumerate(path)][1:]
                picture = None
                if self.with_attention:
                    looked = [attention[position][row, :length] for position, row in enumerate(path[:-1])]  # [S]
                    picture = np.stack(looked) if looked else np.empty((0, length), np.float32)
                found[-1].append(Hypothesis(words, score, total, picture))
        return found
