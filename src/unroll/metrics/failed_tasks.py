"""Failed tasks: number of tasks with more than 5 % of the questions answered wrongly.

The threshold is that of bAbI (Weston et al. 2015).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import check
from unroll.metrics import Bootstrap, Score, Statistics
from unroll.metrics._answers import errors
from unroll.metrics.bootstrap import scored
from unroll.metrics.mean_error import statistics as by_task

lower_is_better = True
FAILED = 5.0


def statistics(predictions: Path, options: Mapping[str, Any]) -> Statistics:
    """For each task wrong answers, then questions, 0 or 1 each: [questions,2T]."""
    return by_task(predictions, options)


def score(sums: np.ndarray) -> np.ndarray:
    """The score of summed statistics: [...,2T] -> [...]."""
    return (errors(sums) > FAILED).sum(-1).astype(np.float64)


def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
    """The score over all questions; `options` are `samples` and `seed` of the bootstrap."""
    bootstrap = check(Bootstrap, options, "evaluate options")
    values = statistics(predictions, options).values
    return scored(values, score, "tasks", bootstrap, f"tasks:{values.shape[1] // 2}|above:{FAILED}")
