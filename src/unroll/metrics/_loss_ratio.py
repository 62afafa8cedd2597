"""What the metrics of language models share: log-loss over blocks divided by what was predicted in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import check, hash_json
from unroll.metrics import Bootstrap, Score, ScoreOfSums, Statistics
from unroll.metrics._predictions import ratio
from unroll.metrics.bootstrap import scored


def loss_ratio(
    denominator: str, unit: str, scale: float = 1.0, change: ScoreOfSums | None = None
) -> tuple[Callable[..., Statistics], ScoreOfSums, Callable[..., Score]]:
    """The functions `statistics`, `score` and `compute` of a metric that is a ratio of sums over `blocks.jsonl`.

    Args:
        denominator: what the log-loss is divided by: "tokens", "bytes" or "characters".
        unit: of the score.
        scale: 1 for nats, 1 / ln 2 for bits.
        change: a rising function of the ratio, such as exp.

    The functions raise a UserError for predictions that are missing, malformed or incomplete, and unknown options.
    """

    def statistics(predictions: Path, options: Mapping[str, Any]) -> Statistics:
        """Log-loss and denominator of each block: [blocks,2]."""
        values = ratio(predictions, denominator, scale)
        return Statistics(values, hash_json([denominator, values[:, 1].tolist()]))

    def score(sums: np.ndarray) -> np.ndarray:
        """The score of summed statistics: [...,2] -> [...]."""
        ratios = sums[..., 0] / sums[..., 1]
        return ratios if change is None else change(ratios)

    def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
        """The score over all blocks; `options` are `samples` and `seed` of the bootstrap."""
        bootstrap = check(Bootstrap, options, "evaluate options")
        values = ratio(predictions, denominator, scale)
        return scored(values, score, unit, bootstrap, f"blocks:{len(values)}")

    return statistics, score, compute
