"""Perplexity: exp(total log-loss in nats / predicted tokens); the unit is "perplexity", 1 is the least.

A token is whatever the data set's tokenizer made: perplexities of different tokenizations do not compare (bits per byte
do). `<eos>` counts where it is predicted. The mean is over tokens, not over blocks or batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unroll.metrics import Score
from unroll.metrics._predictions import ratio, ratio_score

lower_is_better = True


def statistics(predictions: Path) -> np.ndarray:
    """Log-loss in nats and predicted tokens, per block: [blocks,2]."""
    return ratio(predictions, "tokens")


def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
    """exp(nats / tokens) over all blocks.

    Args:
        predictions: folder that holds `blocks.jsonl`.
        options: `samples` and `seed` of the bootstrap.

    Raises:
        UserError: predictions missing, malformed or incomplete; unknown option.
    """
    return ratio_score(statistics(predictions), "perplexity", options, np.exp)
