"""Confidence intervals and paired tests of any score that is a function of sums over blocks or sentences.

A ratio of sums (log-loss over tokens) is such a score, and so are BLEU, chrF and TER: n-gram matches, totals and lengths
add up over sentences. The rows of statistics are what is resampled or swapped, so no text is ever scored again.

Interval: percentile bootstrap (Efron 1979): rows are drawn with replacement, the score of their sums is taken, and the
2.5 % and 97.5 % order statistics are the bounds. No interpolation between order statistics: an infinite loss in a block
stays infinite instead of becoming "not a number".

Test: approximate randomisation (Noreen 1989; Riezler and Maxwell 2005), two-sided: under the null hypothesis the two
systems' outputs for one block or sentence may be swapped, which needs no assumption on their spread.
p = (1 + swaps with a difference at least as large) / (1 + swaps drawn).
`paired_bootstrap` is there beside it because machine translation reports it (Koehn 2004).

All take the rows as independent; blocks of text should be long against the reach of its topics (hundreds of tokens).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from unroll.metrics import Bootstrap, Score, ScoreOfSums

_DRAWS_AT_ONCE = 2_000_000  # bounds the memory of one round of resampling, whatever the number of rows
_ROUNDING = 1e-12  # two differences closer than this part of the scores are a tie


def total(values: np.ndarray) -> np.ndarray:
    """Exact column sums of statistics [n,k]: neither the order of the rows nor how a text is cut changes them."""
    return np.array([math.fsum(column) for column in values.T])  # [k]


def scored(
    values: np.ndarray,  # [n,k]
    score: ScoreOfSums,
    unit: str,
    options: Bootstrap,
    signature: str,
    value: float | None = None,
) -> Score:
    """A `Score` with its bootstrap interval (None of a single row).

    `value` is given where a library computed it; otherwise it is the score of the exact sums.
    """
    if value is None:
        with np.errstate(over="ignore"):
            value = float(score(total(values)))
    low, high = interval(values, score, options.samples, options.seed) if len(values) > 1 else (None, None)
    return Score(
        value, low, high, len(values), unit, f"{signature}|bootstrap:{options.samples}|seed:{options.seed}|v:1"
    )


def interval(
    values: np.ndarray,  # [n,k]
    score: ScoreOfSums,
    samples: int = 2000,
    seed: int = 1,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the score over n blocks or sentences.

    The bounds depend on the rows and their order, the number of samples and the seed, and on nothing else.

    Raises:
        ValueError: the statistics are not two-dimensional, or hold no row.
    """
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"statistics [n,k] with n > 0 are expected, found {values.shape}")
    generator = np.random.default_rng(seed)
    scores = np.empty(samples)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for rows in _rounds(samples, len(values)):
            drawn = generator.integers(0, len(values), (rows.stop - rows.start, len(values)))
            scores[rows] = score(np.stack([column[drawn].sum(axis=1) for column in values.T], axis=-1))
    tail = (1 - level) / 2
    low = np.quantile(scores, tail, method="lower")
    high = np.quantile(scores, 1 - tail, method="higher")
    return float(low), float(high)


def paired_test(
    a: np.ndarray,  # [n,k] statistics of the first system
    b: np.ndarray,  # [n,k] the second system's, on the same blocks or sentences
    score: ScoreOfSums,
    samples: int = 10_000,
    seed: int = 1,
) -> float:
    """Two-sided p-value of "both systems score the same on such text", by approximate randomisation.

    Systems with equal scores give exactly 1. The least p-value is 1 / (samples + 1). A block on which one system's loss
    is infinite outweighs all finite ones.

    Raises:
        ValueError: the two differ in shape, so they were not scored on the same blocks or sentences.
    """
    prepared = _prepare(a, b, score)
    if prepared is None:
        return 1.0
    a, b, observed, rounding = prepared
    sums, difference = np.stack([a.sum(axis=0), b.sum(axis=0)]), a - b  # [2,k], [n,k]
    generator = np.random.default_rng(seed)
    reached = 0
    for rows in _rounds(samples, len(a)):
        moved = _coins(generator, rows.stop - rows.start, len(a)) @ difference  # [rows,k]
        reached += int((_distance(score, sums[0] - moved, sums[1] + moved) >= observed - rounding).sum())
    return (1 + reached) / (1 + samples)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, score: ScoreOfSums, samples: int = 1000, seed: int = 1) -> float:
    """p-value of a pair [n,k] by the paired bootstrap, defined as sacrebleu and Moses do (Koehn 2004).

    The share of resamples whose absolute difference exceeds the mean of all resamples by more than the difference
    observed. For a clear difference this counts one tail only, so it is about half of what `paired_test` says; and it
    seldom rises above 0.5. Unlike there, systems with equal scores give 1.

    Raises:
        ValueError: the two differ in shape.
    """
    prepared = _prepare(a, b, score)
    if prepared is None:
        return 1.0
    a, b, observed, _ = prepared
    n = len(a)
    generator = np.random.default_rng(seed)
    distances = np.empty(samples)
    for rows in _rounds(samples, n):
        count = rows.stop - rows.start
        drawn = generator.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
        often = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n).astype(np.float64)
        distances[rows] = _distance(score, often @ a, often @ b)
    reached = int((distances - distances.mean() > observed).sum())
    return (1 + reached) / (1 + samples)


def _prepare(a: np.ndarray, b: np.ndarray, score: ScoreOfSums) -> tuple[np.ndarray, np.ndarray, float, float] | None:
    """The two systems' statistics without infinities, the difference of their scores, and what counts as a tie.

    None if the scores are equal, be it both infinite.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"a paired test needs statistics [n,k] over the same samples, found {a.shape} and {b.shape}")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        first, second = score(np.stack([a.sum(axis=0), b.sum(axis=0)]))
    if first == second:
        return None
    infinite = np.isinf(a) | np.isinf(b)
    if infinite.any():  # the number of infinite entries takes the column's place
        columns = infinite.any(axis=0)
        a, b = (np.where(columns, np.isinf(system).astype(np.float64), system) for system in (a, b))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            first, second = score(np.stack([a.sum(axis=0), b.sum(axis=0)]))
    observed = float(abs(first - second))
    return a, b, observed, 0.0 if math.isinf(observed) else _ROUNDING * float(abs(first) + abs(second))


def _distance(score: ScoreOfSums, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Absolute difference of the scores of two arrays of sums [rows,k]; two infinite scores are equal."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.nan_to_num(np.abs(score(first) - score(second)), nan=0.0, posinf=np.inf)


def _coins(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Fair coins [rows,columns] of zeros and ones, cut from whole random words."""
    words = generator.integers(0, 2**32, (rows, -(-columns // 32)), dtype=np.uint32)
    return np.unpackbits(words.view(np.uint8), axis=1)[:, :columns].astype(np.float64)


def _rounds(samples: int, rows: int) -> Iterator[slice]:
    """The samples in slices small enough for memory."""
    size = max(1, _DRAWS_AT_ONCE // rows)
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))
