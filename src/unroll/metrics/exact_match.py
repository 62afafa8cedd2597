"""Exact match: 100 * hypotheses equal to one of their references / hypotheses, in %.

White space at both ends does not count; everything else does, case and punctuation too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import check
from unroll.metrics import Bootstrap, Score, Statistics
from unroll.metrics._predictions import Sentence, conditions, read_sentences
from unroll.metrics.bootstrap import scored

lower_is_better = False


def statistics(predictions: Path, options: Mapping[str, Any]) -> Statistics:
    """Whether each hypothesis is one of its references, and 1: [sentences,2]."""
    sentences = read_sentences(predictions)
    return Statistics(_matches(sentences), conditions(sentences, {"metric": __name__}))


def score(sums: np.ndarray) -> np.ndarray:
    """The share in % of summed statistics: [...,2] -> [...]."""
    return 100 * sums[..., 0] / sums[..., 1]


def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
    """Exact matches in % over all sentences; `options` are `samples` and `seed` of the bootstrap.

    Raises:
        UserError: predictions missing, malformed or incomplete; unknown option.
    """
    bootstrap = check(Bootstrap, options, "evaluate options")
    sentences = read_sentences(predictions)
    return scored(_matches(sentences), score, "% exact", bootstrap, f"sentences:{len(sentences)}")


def _matches(sentences: list[Sentence]) -> np.ndarray:
    equal = [s.hypothesis.strip() in {reference.strip() for reference in s.references} for s in sentences]
    return np.stack([np.array(equal, dtype=np.float64), np.ones(len(equal))], axis=1)  # [sentences,2]
