"""Bits per token: total log-loss in bits / predicted tokens; the logarithm to base 2 of the perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unroll.metrics import Score
from unroll.metrics._predictions import ratio, ratio_score

lower_is_better = True


def statistics(predictions: Path) -> np.ndarray:
    """Log-loss in bits and predicted tokens, per block: [blocks,2]."""
    return ratio(predictions, "tokens", scale=1 / math.log(2))


def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
    """Bits per predicted token over all blocks.

    Args:
        predictions: folder that holds `blocks.jsonl`.
        options: `samples` and `seed` of the bootstrap.

    Raises:
        UserError: predictions missing, malformed or incomplete; unknown option.
    """
    return ratio_score(statistics(predictions), "bits/token", options)
