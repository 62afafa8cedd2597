"""Spearman's rank correlation of ponder steps with difficulty: does a system compute longer where there is more to do?

Over sequences, or with `levels: true` over the mean ponder steps of each difficulty. Ranks are those of the whole test
set: resampling draws sequences (or levels) with the ranks that they have in it, which makes the score a function of sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import check, hash_json
from unroll.errors import UserError
from unroll.metrics import Bootstrap, Score, Statistics
from unroll.metrics._sequences import SEQUENCES, read_sequences
from unroll.metrics.bootstrap import scored

lower_is_better = False


class Options(Bootstrap):
    """`levels`: correlate the means of each difficulty."""

    levels: bool = False


def statistics(predictions: Path, options: Mapping[str, Any]) -> Statistics:
    """What Pearson's correlation of the ranks adds up: 1, x, y, x^2, y^2, x y of each sequence, [n,6]."""
    values = _values(predictions, check(Options, options, "evaluate options").levels)
    return Statistics(values, hash_json([__name__, values[:, 1].tolist()]))


def score(sums: np.ndarray) -> np.ndarray:
    """The correlation of summed statistics: [...,6] -> [...]; 0 where one side does not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (xy - x * y / n) / np.sqrt((xx - x * x / n) * (yy - y * y / n))
    return np.clip(np.nan_to_num(found), -1.0, 1.0)


def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
    """Spearman's correlation with its interval.

    Raises:
        UserError: predictions missing or malformed, or a system without ponder steps; unknown option.
    """
    checked: Options = check(Options, options, "evaluate options")
    values = _values(predictions, checked.levels)
    over = "levels" if checked.levels else "sequences"
    return scored(values, score, "Spearman", checked, f"{over}:{len(values)}")


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 on, equal values sharing the mean of theirs: [n] -> [n]."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: np.ndarray = (np.cumsum(counts) - (counts + 1) / 2)[place]
    return means


def _values(predictions: Path, levels: bool) -> np.ndarray:
    lines = read_sequences(predictions)
    if "ponder" not in lines[0]:
        raise UserError(f"{predictions / SEQUENCES}: no 'ponder'; this system does not decide how long to compute")
    difficulty, ponder = (np.array([line[key] for line in lines]) for key in ("difficulty", "ponder"))
    if levels:
        each = np.unique(difficulty)
        difficulty, ponder = each, np.array([ponder[difficulty == level].mean() for level in each])
    x, y = ranks(difficulty), ranks(ponder)
    return np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1)
