"""CIDEr-D of token ids, fast enough to be a reward: many captions of many images at once, without a loop over them.

Paper: Vedantam et al. 2015, arXiv:1411.5726, in the form of `pycocoevalcap` (CIDEr-D: clipped counts, a penalty on the
difference in length). With tf-idf vectors g_n over the n-grams of hypothesis c and references s_1 .. s_m:

    weight(w) = count(w) (log N - log max(1, df(w)))         N documents, df(w) of them with w in a reference
    CIDEr = 10 / (4 m) sum_n sum_j exp(-(l_c - l_sj)^2 / 72) sum_w min(g_n^c(w), g_n^sj(w)) g_n^sj(w) / (|g_n^c| |g_n^sj|)

l counts the bigrams, as pycocoevalcap does. Words are token ids, so there is nothing to tokenise; an id that ends every
caption can be one of the words, which keeps a model from leaving its sentences unfinished (Rennie et al. 2017).

How it is made fast: an n-gram is one int64, its ids written as digits; counting, looking up and matching are sorts and
binary searches over all n-grams of all captions together. Equal to pycocoevalcap's to rounding (tested on 1,000 random
cases); speed: `benchmarks/cider.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from unroll.errors import UserError

ORDERS = 4
SIGMA = 6.0


class Cider:
    """How rare an n-gram is comes from `documents`: the references of each image, int64 [m,T], padded with -1."""

    def __init__(self, documents: Iterable[np.ndarray], vocabulary: int) -> None:
        self.base = vocabulary + 1
        if self.base**ORDERS >= 2**63:
            raise UserError(f"cider: {vocabulary} words; four of them do not fit into one number, 55,000 do")
        found = [np.unique(self._ngrams(references)[1]) for references in documents]
        self.keys, counts = np.unique(np.concatenate(found), return_counts=True)
        self.unseen = float(np.log(len(found)))
        self.rarity = self.unseen - np.log(counts)

    def scores(self, captions: np.ndarray, references: np.ndarray, images: int) -> np.ndarray:
        """CIDEr-D, 0 to 10.

        Args:
            captions: int64 [B*K,T] of B `images`, padded with -1; an empty one is none's reference and scores 0.
            references: int64 [B*K',T']; rows of -1 alone are no references.

        Returns:
            [B,K]
        """
        rows, keys = self._ngrams(captions)
        reference_rows, reference_keys = self._ngrams(references)
        known, numbers = np.unique(np.concatenate([keys, reference_keys]), return_inverse=True)  # [U]
        rarity = self._rarity(known)
        order = np.searchsorted(float(self.base) ** np.arange(1, ORDERS), known, side="right")  # [U] 0 .. 3
        row, ngram, weight = _vectors(rows, numbers[: len(keys)], rarity)
        their_row, their_ngram, their_weight = _vectors(reference_rows, numbers[len(keys) :], rarity)
        length = _lengths(row, order[ngram], weight, len(captions))  # [N,4]
        their_length = _lengths(their_row, order[their_ngram], their_weight, len(references))  # [M,4]

        # Both sides by (image, n-gram): for every n-gram of a caption the references of its image that have it, too.
        many, theirs_many = len(captions) // images, len(references) // images
        wanted = row // many * len(known) + ngram
        given = their_row // theirs_many * len(known) + their_ngram
        sort = np.argsort(given, kind="stable")
        first, last = np.searchsorted(given[sort], wanted), np.searchsorted(given[sort], wanted, side="right")
        shared = last - first
        mine = np.repeat(np.arange(len(wanted)), shared)
        theirs = sort[np.arange(len(mine)) - np.repeat(np.cumsum(shared) - shared, shared) + np.repeat(first, shared)]

        product = np.minimum(weight[mine], their_weight[theirs]) * their_weight[theirs]
        scale = length[row[mine], order[ngram[mine]]] * their_length[their_row[theirs], order[ngram[mine]]]
        gaps = (_bigrams(captions)[row[mine]] - _bigrams(references)[their_row[theirs]]) / SIGMA
        parts = np.divide(product, scale, out=np.zeros_like(product), where=scale > 0) * np.exp(-0.5 * gaps**2)
        sums = np.bincount(row[mine], parts, len(captions)).reshape(images, many)
        count = (references[:, :1] >= 0).reshape(images, -1).sum(1, keepdims=True)  # [B,1]
        return 10 / ORDERS * sums / np.maximum(1, count)

    def _ngrams(self, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row and the number of every n-gram, of all orders. [N,T] -> twice [n]"""
        digits = captions + 1  # [N,T] 0 is nothing
        keys, numbers = [], digits
        for n in range(ORDERS):
            if n:
                longer = np.zeros_like(digits)
                longer[:, : max(0, digits.shape[1] - n)] = digits[:, n:]
                numbers = np.where((numbers > 0) & (longer > 0), numbers * self.base + longer, 0)
            keys.append(numbers)
        every = np.stack(keys, 1).reshape(len(captions), -1)  # [N,4*T]
        rows, places = np.nonzero(every)
        return rows, every[rows, places]

    def _rarity(self, known: np.ndarray) -> np.ndarray:
        """log N - log df of each n-gram."""
        place = np.searchsorted(self.keys, known).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == known, self.rarity[place], self.unseen)


def _vectors(rows: np.ndarray, ngrams: np.ndarray, rarity: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tf-idf vectors of all rows, entry by entry: row, n-gram, weight."""
    codes, counts = np.unique(rows * len(rarity) + ngrams, return_counts=True)
    row, ngram = np.divmod(codes, len(rarity))
    return row, ngram, counts * rarity[ngram]


def _lengths(row: np.ndarray, order: np.ndarray, weight: np.ndarray, rows: int) -> np.ndarray:
    """Length of the vector of each row and order: [N,4]."""
    return np.sqrt(np.bincount(row * ORDERS + order, weight**2, rows * ORDERS)).reshape(rows, ORDERS)


def _bigrams(captions: np.ndarray) -> np.ndarray:
    """Number of bigrams in each row."""
    return np.maximum(0, (captions >= 0).sum(1) - 1)
