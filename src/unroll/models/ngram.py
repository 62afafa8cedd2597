"""n-gram language model: the Markov chain of order n - 1, fitted by counting.

Papers: Shannon, "A mathematical theory of communication", 1948 (maximum likelihood; n = 2 is the Markov chain of the
course); Kneser and Ney, "Improved backing-off for m-gram language modeling", ICASSP 1995; Chen and Goodman, "An
empirical study of smoothing techniques for language modeling", TR-10-98, Harvard 1998 (both interpolated forms).

Equations, for order k = 1..n, a context h of k - 1 symbols, h' = h without its first symbol, and V symbols:

    c_n(hw) = occurrences of hw in the text                          (the order of the model)
    c_k(hw) = number of different symbols seen before hw, k < n      (Kneser-Ney: continuation counts)
    p_k(w|h) = max(c_k(hw) - D_k(c), 0) / c_k(h.) + b_k(h) p_{k-1}(w|h'),    p_0(w) = 1/V
    b_k(h)   = sum over w of D_k(c_k(hw)) / c_k(h.);  p_k(w|h) = p_{k-1}(w|h') where c_k(h.) = 0

`kneser_ney`: D_k(c) = `discount` at every order, or, with `discount: null`, n1 / (n1 + 2 n2), where n_i is the number
of k-grams whose count c_k is i (Ney, Essen and Kneser 1994).
`modified_kneser_ney`: with Y = n1 / (n1 + 2 n2), D_k(i) = i - (i + 1) Y n_{i+1} / n_i for i = 1, 2 and 3 (3 or more).
`maximum_likelihood`: D = 0 and c_k counts occurrences at every order. A context never seen gives way to the next
shorter one. A symbol never seen after a context that was seen has probability 0: its loss is infinite, and so is the
perplexity of a text that holds it. `floor` > 0 mixes in the uniform distribution, (1 - floor) p + floor / V.

Deliberate differences: the text is one stream, without marks for the beginning and end of sentences, so symbols at
the very beginning are predicted from the shorter context there is. Where the discounts of an order cannot be
estimated or leave nothing to unseen symbols (n_i = 0 or D_i <= 0, as with 65 unigrams), they are 0.75 for
`kneser_ney`, and 0.5, 1 and 1.5 for the modified form (the values of KenLM's `--discount_fallback`).

Numbers to reach: tiny-shakespeare, characters, first 90 % to count and the last 10 % read after it, interpolated
Kneser-Ney with D = 0.75, nats per character for n = 1..8: 3.3473, 2.4839, 2.0413, 1.7223, 1.5663, 1.5385, 1.5469,
1.5679. WikiText-2 words, 33,278 types, n = 5, test read after training text: perplexity 244.08 (modified: 217.79).

Tables: the k-grams of the text are numbered in the order of their keys, key(hw) = number(h) V + w with number() = 0 for
the empty context. `grams_k` holds the sorted keys and `counts_k` the occurrences, so the children of a context lie
side by side and a k-gram is found by k binary searches. All else is worked out from these two whenever they change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unroll.config import Strict
from unroll.errors import UserError

State = dict[str, Tensor]

MERGE_TOKENS = 1 << 20  # fewest tokens worth a merge into the tables


class Config(Strict):
    """`order` is n, `base` is p_0. Only `kneser_ney` reads `discount` (null: estimated)."""

    order: int = Field(ge=1, le=8)
    smoothing: Literal["maximum_likelihood", "kneser_ney", "modified_kneser_ney"] = "kneser_ney"
    discount: float | None = Field(default=0.75, gt=0.0, le=1.0)
    floor: float = Field(default=0.0, ge=0.0, lt=1.0)
    base: Literal["uniform"] = "uniform"

    @model_validator(mode="after")
    def floor_fits(self) -> Self:
        if self.floor > 0.0 and self.smoothing != "maximum_likelihood":
            raise ValueError(f"floor is for maximum_likelihood; {self.smoothing} leaves no symbol without probability")
        return self


TINY: list[dict[str, Any]] = [
    {"order": 1, "discount": None},
    {"order": 3},
    {"order": 3, "smoothing": "modified_kneser_ney"},
    {"order": 2, "smoothing": "maximum_likelihood", "floor": 0.01},
]
"""Small configurations, at least one for each option: what the contract tests build."""


class Model(nn.Module):
    """Count tables and the probabilities they give. `fit` replaces training; there are no gradients."""

    shape: Tensor

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.register_buffer("shape", torch.tensor([config.order, vocabulary]))
        for k in range(1, config.order + 1):
            for name in ("grams", "counts"):
                self.register_buffer(f"{name}_{k}", torch.empty(0, dtype=torch.int64))
            for name in ("starts", "weights", "backoffs"):
                self.register_buffer(f"{name}_{k}", torch.empty(0), persistent=False)

    @property
    def parameter_count(self) -> int:
        """Number of n-grams counted, of all orders together."""
        return sum(len(self._table("counts", k)) for k in range(1, self.config.order + 1))

    def fit(self, chunks: Iterable[np.ndarray], progress: Callable[[int], None] | None = None) -> None:
        """Counts a text; memory grows with the number of different n-grams, not with the length of the text.

        Args:
            chunks: the token ids of one text, in order, cut anywhere; the cuts do not change the tables.
            progress: called with the number of tokens read so far.

        Raises:
            UserError: no tokens, or an id outside the vocabulary.
        """
        counter = _Counter(self.config.order, self.vocabulary)
        for chunk in chunks:
            counter.add(np.array(chunk, dtype=np.int64))  # a copy: readers may use one buffer for every chunk
            if progress is not None:
                progress(counter.seen)
        counter.merge()
        if not counter.seen:
            raise UserError("ngram: the text to count is empty; at least one token is needed")
        for k, (grams, counts) in enumerate(counter.tables, start=1):
            setattr(self, f"grams_{k}", torch.from_numpy(grams).to(self.shape.device))
            setattr(self, f"counts_{k}", torch.from_numpy(counts).to(self.shape.device))
        self._derive()

    def initial_state(self, batch: int) -> State:
        """`history` [B, n-1]: the last tokens read, oldest first; -1 = nothing yet."""
        shape = (batch, self.config.order - 1)
        return {"history": torch.full(shape, -1, dtype=torch.int64, device=self.shape.device)}

    def log_loss(self, tokens: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State]:
        """Loss of `targets` [B,T], each read after the token of the same place in `tokens` [B,T] and all before it.

        Returns:
            [B,T] nats in float64, 0 where the target is -1, `inf` where the probability is 0; and the state after.

        Raises:
            UserError: nothing counted yet, or an id outside the vocabulary.
        """
        self._check_range(targets)
        contexts, state = self._contexts(tokens, state)
        probability = torch.full(targets.shape, 1.0 / self.vocabulary, dtype=torch.float64, device=targets.device)
        for k, context in enumerate(contexts, start=1):
            gram = _find(self._table("grams", k), self._key(context, targets))  # [B,T]
            probability *= self._table("backoffs", k)[context]
            probability += self._table("weights", k)[gram]
        return torch.where(targets < 0, 0.0, -self._floored(probability).log()), state

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Reads `tokens` [B]; returns the log-probabilities of what comes next, [B,V] in float64, and the state."""
        contexts, state = self._contexts(tokens[:, None], state)
        shape = (len(tokens), self.vocabulary)
        probability = torch.full(shape, 1.0 / self.vocabulary, dtype=torch.float64, device=tokens.device)
        for k, context in enumerate(contexts, start=1):
            probability *= self._table("backoffs", k)[context]  # [B,V] x [B,1]
            rows, grams = self._children(k, context[:, 0])
            probability[rows, self._table("grams", k)[grams] % self.vocabulary] += self._table("weights", k)[grams]
        return self._floored(probability).log(), state

    def _contexts(self, tokens: Tensor, state: State) -> tuple[list[Tensor], State]:
        """Numbers of the contexts of length 0..n-1 that end at each of `tokens` [B,T]: n tensors [B,T], -1 = unseen."""
        if not len(self._table("grams", 1)):
            raise UserError("ngram: nothing is counted yet; fit the model or load its tables")
        self._check_range(tokens)
        text = torch.cat([state["history"], tokens], dim=1)  # [B,n-1+T]
        number = text.new_zeros(text.shape[0], text.shape[1] + 1)
        contexts = [torch.zeros_like(tokens)]
        for k in range(1, self.config.order):
            number = _find(self._table("grams", k), self._key(number[:, :-1], text[:, k - 1 :]))
            contexts.append(number[:, number.shape[1] - tokens.shape[1] :])
        return contexts, {"history": text[:, tokens.shape[1] :]}

    def _children(self, k: int, context: Tensor) -> tuple[Tensor, Tensor]:
        """The k-grams that begin with one of the contexts [B]: for each the row of its context, and its own number."""
        starts = self._table("starts", k)
        first = torch.where(context < 0, 0, starts[context])
        length = torch.where(context < 0, 0, starts[context + 1] - first)
        rows = torch.repeat_interleave(torch.arange(len(context), device=context.device), length)
        before = torch.cumsum(length, 0) - length
        return rows, torch.arange(len(rows), device=context.device) - before[rows] + first[rows]

    def _floored(self, probability: Tensor) -> Tensor:
        return (1.0 - self.config.floor) * probability + self.config.floor / self.vocabulary

    def _key(self, context: Tensor, symbol: Tensor) -> Tensor:
        return torch.where(symbol < 0, -1, context * self.vocabulary + symbol)  # context -1: below every key too

    def _table(self, name: str, k: int) -> Tensor:
        return self.get_buffer(f"{name}_{k}")

    def _check_range(self, ids: Tensor) -> None:
        if ids.numel():
            low, high = torch.aminmax(ids)
            _check_ids(int(low), int(high), -1, self.vocabulary)

    def _derive(self) -> None:
        """Everything that follows from the counts and the configuration.

        `weights_k` [k-grams + 1] and `backoffs_k` [contexts + 1] are the two terms of the equation; their last entries,
        0 and 1, are what the number -1 of an unseen k-gram or context reaches. `starts_k` [contexts + 1] is where the
        children of each context begin in `grams_k`.
        """
        contexts = 1
        for k, counts in enumerate(self._smoothed_counts(), start=1):
            grams = self._table("grams", k)
            bounds = torch.arange(contexts + 1, device=grams.device) * self.vocabulary
            starts = torch.searchsorted(grams, bounds)
            discounts = torch.tensor(self._discounts(counts), dtype=torch.float64, device=grams.device)
            total = _sums(counts, starts).double()
            parents = grams // self.vocabulary
            weights = (counts - discounts[counts.clamp(max=3)]) / total[parents]
            taken = sum(_sums(counts.clamp(max=3) == i, starts) * discounts[i] for i in (1, 2, 3))
            backoffs = torch.where(total > 0, taken / total, 1.0)
            setattr(self, f"starts_{k}", starts)
            setattr(self, f"weights_{k}", nn.functional.pad(weights.nan_to_num_(), (0, 1), value=0.0))
            setattr(self, f"backoffs_{k}", nn.functional.pad(backoffs, (0, 1), value=1.0))
            contexts = len(grams)

    def _smoothed_counts(self) -> Iterator[Tensor]:
        """c_k for k = 1..n."""
        order, suffix = self.config.order, torch.zeros_like(self._table("grams", 1))
        for k in range(1, order):
            if self.config.smoothing == "maximum_likelihood":
                yield self._table("counts", k)
                continue
            longer = self._table("grams", k + 1)
            key = self._key(suffix[longer // self.vocabulary], longer % self.vocabulary)
            suffix = _find(self._table("grams", k), key)  # [(k+1)-grams]: the k-gram each of them ends with
            yield torch.bincount(suffix, minlength=len(self._table("grams", k)))
        yield self._table("counts", order)

    def _discounts(self, counts: Tensor) -> tuple[float, float, float, float]:
        """What is taken from a count of 0, 1, 2, and 3 or more."""
        if self.config.smoothing == "maximum_likelihood":
            return 0.0, 0.0, 0.0, 0.0
        n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
        if self.config.smoothing == "modified_kneser_ney":
            if min(n1, n2, n3) == 0:
                return 0.0, 0.5, 1.0, 1.5
            y = n1 / (n1 + 2 * n2)
            d1, d2, d3 = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
            return (0.0, d1, d2, d3) if min(d1, d2, d3) > 0 else (0.0, 0.5, 1.0, 1.5)
        discount = self.config.discount or (n1 / (n1 + 2 * n2) if n1 else 0.75)
        return 0.0, discount, discount, discount

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes tables of any length, which `nn.Module` refuses, once they are seen to be tables of this model."""
        tables = {name: state_dict[prefix + name] for name in self.state_dict() if prefix + name in state_dict}
        _check_tables(tables, self.config.order, self.vocabulary)
        for name, table in tables.items():
            setattr(self, name, torch.empty_like(table, device=self.shape.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._derive()


class _Counter:
    """Counts the n-grams of a text that comes in pieces, into one table (sorted keys, counts) for each order."""

    def __init__(self, order: int, vocabulary: int) -> None:
        self.order = order
        self.vocabulary = vocabulary
        self.tables = [(np.empty(0, np.int64), np.empty(0, np.int64)) for _ in range(order)]
        self.seen = 0
        self._tail = np.empty(0, np.int64)
        self._waiting: list[np.ndarray] = []
        self._waiting_tokens = 0

    def add(self, chunk: np.ndarray) -> None:
        """Takes the next tokens [T] of the text.

        A merge costs as much as the tables are long, so what waits for one grows with them: the whole then takes time
        in proportion to the text, and memory in proportion to the tables.
        """
        if not len(chunk):
            return
        _check_ids(int(chunk.min()), int(chunk.max()), 0, self.vocabulary)
        self._waiting.append(chunk)
        self._waiting_tokens += len(chunk)
        self.seen += len(chunk)
        if self._waiting_tokens >= max(MERGE_TOKENS, len(self.tables[-1][0]) // 4):
            self.merge()

    def merge(self) -> None:
        """Counts what has waited."""
        if not self._waiting:
            return
        text = np.concatenate([self._tail, *self._waiting])
        number = np.zeros(len(text) + 1, np.int64)  # of the (k-1)-gram that begins at each place
        renumber = np.zeros(1, np.int64)  # new number of each (k-1)-gram of the table
        for k, (grams, counts) in enumerate(self.tables, start=1):
            symbols = text[k - 1 :]
            found, place = np.unique(number[: len(symbols)] * self.vocabulary + symbols, return_inverse=True)
            # Renumbered contexts stay in order, so these keys are still sorted.
            grams = renumber[grams // self.vocabulary] * self.vocabulary + grams % self.vocabulary
            union = np.sort(np.concatenate([grams, found]))
            union = union[np.diff(union, prepend=-1) > 0]  # np.union1d hashes: ten times slower
            renumber, places = np.searchsorted(union, grams), np.searchsorted(union, found)
            total = np.zeros(len(union), np.int64)
            total[renumber] = counts
            counted = max(0, len(self._tail) - k + 1)  # k-grams that end in the tail: in the tables already
            total[places] += np.bincount(place[counted:], minlength=len(found))
            number = places[place]
            self.tables[k - 1] = (union, total)
        self._tail = text[max(0, len(text) - self.order + 1) :]
        self._waiting, self._waiting_tokens = [], 0


def _find(grams: Tensor, keys: Tensor) -> Tensor:
    """Where each of `keys` stands in the sorted `grams`; -1 where it does not."""
    if not len(grams):
        return torch.full_like(keys, -1)
    place = torch.searchsorted(grams, keys.contiguous()).clamp_(max=len(grams) - 1)
    return torch.where(grams[place] == keys, place, -1)


def _sums(values: Tensor, starts: Tensor) -> Tensor:
    """Sum of `values` over each part [starts[i], starts[i + 1]), in whole numbers."""
    return nn.functional.pad(values.cumsum(0, dtype=torch.int64), (1, 0))[starts].diff()


def _check_ids(low: int, high: int, least: int, vocabulary: int) -> None:
    if low < least or high >= vocabulary:
        raise UserError(f"ngram: token id {low if low < least else high}; ids from 0 to {vocabulary - 1} are allowed")


def _check_tables(tables: dict[str, Tensor], order: int, vocabulary: int) -> None:
    """UserError unless the tables belong to a model of this order and vocabulary and can have come from counting."""
    if "shape" not in tables or tables["shape"].shape != (2,):
        raise UserError("ngram: the weights are not the tables of an n-gram model: no `shape` [order, vocabulary]")
    found = tables["shape"].tolist()
    if found[0] != order:
        raise UserError(f"ngram: the tables were counted for order {found[0]}, the recipe says {order}")
    if found[1] != vocabulary:
        raise UserError(f"ngram: the tables were counted with {found[1]} symbols, the vocabulary has {vocabulary}")
    contexts = 1
    for k in range(1, order + 1):
        grams, counts = (tables.get(f"{name}_{k}", torch.empty(0)) for name in ("grams", "counts"))
        whole = grams.dtype == counts.dtype == torch.int64 and grams.shape == counts.shape and grams.dim() == 1
        if not whole or (grams.diff() <= 0).any() or (counts < 1).any():
            raise UserError(f"ngram: table {k} is damaged: sorted whole keys with counts of 1 or more are needed")
        if len(grams) and (grams[0] < 0 or grams[-1] >= contexts * vocabulary):
            raise UserError(f"ngram: table {k} is damaged: a key outside 0..{contexts * vocabulary - 1}")
        contexts = len(grams)
