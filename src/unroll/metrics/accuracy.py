"""Accuracy: 100 * questions answered rightly / questions, in %.

Of several answers all must be given, and no other one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import check
from unroll.metrics import Bootstrap, Score, Statistics
from unroll.metrics._answers import read_answers
from unroll.metrics.bootstrap import scored

lower_is_better = False


def statistics(predictions: Path, options: Mapping[str, Any]) -> Statistics:
    """Right answers and questions, 1 for each: [questions,2]."""
    answered = read_answers(predictions)
    return Statistics(np.stack([answered.right, np.ones(len(answered.right))], 1), answered.conditions)


def score(sums: np.ndarray) -> np.ndarray:
    """The score of summed statistics: [...,2] -> [...]."""
    return 100 * sums[..., 0] / sums[..., 1]


def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
    """The score over all questions; `options` are `samples` and `seed` of the bootstrap."""
    bootstrap = check(Bootstrap, options, "evaluate options")
    values = statistics(predictions, options).values
    return scored(values, score, "% right", bootstrap, f"questions:{len(values)}")
