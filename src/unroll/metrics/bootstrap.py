"""Confidence intervals and paired tests over blocks of text.

A score is a ratio of sums over blocks (log-loss over tokens, bits over bytes). The blocks are what is resampled, so a
score is never recomputed from text: two sums per resample are enough.

Interval: percentile bootstrap (Efron 1979): blocks are drawn with replacement, the ratio of sums is taken, and the
2.5 % and 97.5 % order statistics of the transformed ratios are the bounds. No interpolation between order statistics:
an infinite loss in a block stays infinite instead of becoming "not a number".

Test: approximate randomisation (Noreen 1989; Riezler and Maxwell 2005), two-sided, not the paired bootstrap: under the
null hypothesis the two systems' losses in one block may be swapped, which needs no assumption on their spread.
p = (1 + swaps with a difference at least as large) / (1 + swaps drawn).

Both take blocks as independent; blocks should be long against the reach of the text's topics (hundreds of tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

Transform = Callable[[np.ndarray], np.ndarray]

_DRAWS_AT_ONCE = 2_000_000  # bounds the memory of one round of resampling, whatever the number of blocks
_ROUNDING = 1e-12  # two differences closer than this part of the total are a tie


def interval(
    numerator: np.ndarray,  # [n]
    denominator: np.ndarray,  # [n]
    transform: Transform,
    samples: int = 2000,
    seed: int = 1,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `transform(sum(numerator) / sum(denominator))` over n blocks.

    The bounds depend on the blocks and their order, the number of samples and the seed, and on nothing else.

    Raises:
        ValueError: the two differ in shape, are not one-dimensional, or hold no block.
    """
    if numerator.ndim != 1 or numerator.shape != denominator.shape or len(numerator) == 0:
        raise ValueError(f"one numerator and denominator per block, found {numerator.shape} and {denominator.shape}")
    generator = np.random.default_rng(seed)
    ratios = np.empty(samples)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for rows in _rounds(samples, len(numerator)):
            drawn = generator.integers(0, len(numerator), (rows.stop - rows.start, len(numerator)))
            ratios[rows] = numerator[drawn].sum(axis=1) / denominator[drawn].sum(axis=1)
        scores = transform(ratios)
    tail = (1 - level) / 2
    low = np.quantile(scores, tail, method="lower")
    high = np.quantile(scores, 1 - tail, method="higher")
    return float(low), float(high)


def paired_test(
    a: np.ndarray,  # [n,2] numerators and denominators of the first system
    b: np.ndarray,  # [n,2] the second system's, on the same blocks
    samples: int = 10_000,
    seed: int = 1,
) -> float:
    """Two-sided p-value of "both systems score the same on such text", by approximate randomisation.

    The statistic is the difference of the two ratios of sums. Identical systems give exactly 1. The least p-value is
    1 / (samples + 1). A block on which one system's loss is infinite outweighs all finite ones.

    Raises:
        ValueError: the systems were not scored on the same blocks (number of blocks or denominators differ).
    """
    if not same_blocks(a, b):
        raise ValueError(f"a paired test needs the same blocks, found {a.shape} and {b.shape} or unequal denominators")
    with np.errstate(invalid="ignore"):
        difference = np.nan_to_num(a[:, 0] - b[:, 0], nan=0.0, posinf=np.inf, neginf=-np.inf)
    infinite = np.isinf(difference)
    if infinite.any():
        difference = np.where(infinite, np.sign(difference), 0.0)
        if abs(difference.sum()) < infinite.sum():
            return 1.0  # both totals are infinite
    least = abs(difference.sum()) - _ROUNDING * np.abs(difference).sum()
    generator = np.random.default_rng(seed)
    reached = 0
    for rows in _rounds(samples, len(difference)):
        swapped = _coins(generator, rows.stop - rows.start, len(difference)) @ difference
        reached += int((np.abs(difference.sum() - 2 * swapped) >= least).sum())
    return (1 + reached) / (1 + samples)


def same_blocks(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two systems' statistics [n,2] are over the same blocks: as many, with equal denominators."""
    return a.shape == b.shape and bool(np.array_equal(a[:, 1], b[:, 1]))


def _coins(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Fair coins [rows,columns] of zeros and ones, cut from whole random words."""
    words = generator.integers(0, 2**32, (rows, -(-columns // 32)), dtype=np.uint32)
    return np.unpackbits(words.view(np.uint8), axis=1)[:, :columns].astype(np.float64)


def _rounds(samples: int, blocks: int) -> Iterator[slice]:
    """The samples in slices small enough for memory."""
    size = max(1, _DRAWS_AT_ONCE // blocks)
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))
