"""chrF: F2 of the means over orders of character n-gram precision and recall, 0 to 100; 1- to 6-grams / all n-grams.

Popovic 2015, computed by sacrebleu. With word n-grams up to order 2 it is chrF++ (Popovic 2017). Of several references
the best one of each sentence counts.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field
from sacrebleu.metrics.chrf import CHRF

from unroll.metrics import Bootstrap
from unroll.metrics._sacrebleu import corpus_metric

lower_is_better = False


class Options(Bootstrap):
    """`lowercase`: case does not count. `word_order`: longest word n-grams counted too; 2 makes it chrF++."""

    lowercase: bool = False
    word_order: int = Field(0, ge=0, le=2)


def score(sums: np.ndarray) -> np.ndarray:
    """chrF of summed statistics [...,3*orders]: n-grams of hypothesis, of reference and matches, order by order."""
    counts = sums.reshape(*sums.shape[:-1], -1, 3)  # [...,orders,3]
    hypothesis, reference, matches = counts[..., 0], counts[..., 1], counts[..., 2]
    counted = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(1, counted.sum(axis=-1))
    precision = np.where(counted, matches / np.maximum(1, hypothesis), 0.0).sum(axis=-1) / orders
    recall = np.where(counted, matches / np.maximum(1, reference), 0.0).sum(axis=-1) / orders
    squared = CHRF.BETA**2
    with np.errstate(invalid="ignore"):
        f = 100 * (1 + squared) * precision * recall / (squared * precision + recall)
    return np.where(precision + recall > 0, f, 0.0)


def _metric(options: Options) -> CHRF:
    return CHRF(lowercase=options.lowercase, word_order=options.word_order)


statistics, compute = corpus_metric(Options, _metric, score)
