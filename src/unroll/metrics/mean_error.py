"""Mean error: 100 * questions answered wrongly / questions of a task, averaged over tasks, in %.

The score of bAbI (Weston et al. 2015); every task counts the same. The error of each task is in the report's picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import check
from unroll.metrics import Bootstrap, Score, Statistics
from unroll.metrics._answers import errors, read_answers
from unroll.metrics.bootstrap import scored

lower_is_better = True


def statistics(predictions: Path, options: Mapping[str, Any]) -> Statistics:
    """For each task wrong answers, then questions, 0 or 1 each: [questions,2T]."""
    answered = read_answers(predictions)
    return Statistics(answered.by_task, answered.conditions)


def score(sums: np.ndarray) -> np.ndarray:
    """The score of summed statistics: [...,2T] -> [...]."""
    return errors(sums).mean(-1)


def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
    """The score over all questions; `options` are `samples` and `seed` of the bootstrap."""
    bootstrap = check(Bootstrap, options, "evaluate options")
    values = statistics(predictions, options).values
    return scored(values, score, "% wrong", bootstrap, f"tasks:{values.shape[1] // 2}|questions:{len(values)}")
