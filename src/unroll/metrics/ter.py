"""TER: 100 * edits (insertions, deletions, substitutions, shifts of words) / words of the reference.

Translation edit rate (Snover et al. 2006), computed by sacrebleu; 0 is a perfect translation, and there is no upper
limit. Of several references the one with the fewest edits counts, over the mean length of all.
"""

from __future__ import annotations

import numpy as np
from sacrebleu.metrics.ter import TER

from unroll.metrics import Bootstrap
from unroll.metrics._sacrebleu import corpus_metric

lower_is_better = True


class Options(Bootstrap):
    """`case_sensitive`: case counts. `normalized`: punctuation is split off first. `no_punct`: it is left out."""

    case_sensitive: bool = False
    normalized: bool = False
    no_punct: bool = False


def score(sums: np.ndarray) -> np.ndarray:
    """TER of summed statistics [...,2]: edits and reference length; edits of empty references alone score 100."""
    edits, length = sums[..., 0], sums[..., 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * np.where(length > 0, edits / length, np.where(edits > 0, 1.0, 0.0))


def _metric(options: Options) -> TER:
    return TER(
        case_sensitive=options.case_sensitive,
        normalized=options.normalized,
        no_punct=options.no_punct,
    )


statistics, compute = corpus_metric(Options, _metric, score)
