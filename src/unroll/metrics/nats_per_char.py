"""Nats per character: total log-loss in nats / characters (Unicode code points) of the predicted text.

Compares models of any tokenization on one text; of character models it is the nats per token.
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
    """Log-loss in nats and characters of the text, per block: [blocks,2]."""
    return ratio(predictions, "characters")


def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
    """Nats per character over all blocks.

    Args:
        predictions: folder that holds `blocks.jsonl`.
        options: `samples` and `seed` of the bootstrap.

    Raises:
        UserError: predictions missing, malformed or incomplete; unknown option.
    """
    return ratio_score(statistics(predictions), "nats/char", options)
