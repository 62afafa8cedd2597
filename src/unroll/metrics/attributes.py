"""Captions of generated scenes with every stated colour, shape, relation and motion right, in %.

A caption that names no coloured shape is wrong; one that leaves something out is not (CIDEr sees that).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import check, hash_json
from unroll.metrics import Bootstrap, Score, Statistics
from unroll.metrics._captions import with_ones
from unroll.metrics._scenes import all_right, read_scenes
from unroll.metrics.bootstrap import scored

lower_is_better = False


def score(sums: np.ndarray) -> np.ndarray:
    """The share in % of summed statistics: [...,2] -> [...]."""
    return 100 * sums[..., 0] / sums[..., 1]


def statistics(predictions: Path, options: Mapping[str, Any]) -> Statistics:
    """Whether each caption is right, and 1: [captions,2]."""
    lexicon, lines = read_scenes(predictions)
    right = [all_right(line["hypothesis"].lower().split(), lexicon, line["truth"]) for line in lines]
    return Statistics(with_ones(right), hash_json([__name__, [line["truth"] for line in lines]]))


def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
    """Right captions in %; `options` are `samples` and `seed` of the bootstrap.

    Raises:
        UserError: predictions missing or malformed, or of pictures of which nothing is known; unknown option.
    """
    bootstrap = check(Bootstrap, options, "evaluate options")
    values = statistics(predictions, options).values
    return scored(values, score, "% of captions", bootstrap, f"captions:{len(values)}|every stated attribute")
