"""Bits per byte: total log-loss in bits / UTF-8 bytes of the predicted text.

Compares models of any tokenization on one text; 8 is what a model that knows nothing needs.
"""

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
    """Log-loss in bits and bytes of the text, per block: [blocks,2]."""
    return ratio(predictions, "bytes", scale=1 / math.log(2))


def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
    """Bits per byte over all blocks.

    Args:
        predictions: folder that holds `blocks.jsonl`.
        options: `samples` and `seed` of the bootstrap.

    Raises:
        UserError: predictions missing, malformed or incomplete; unknown option.
    """
    return ratio_score(statistics(predictions), "bits/byte", options)
