"""BLEU: brevity penalty * geometric mean of 1- to 4-gram precisions, 0 to 100 (Papineni et al. 2002, sacrebleu).

Corpus BLEU with sacrebleu's exponential smoothing. Compares at equal signatures: case and tokenizer change it by points.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from sacrebleu.metrics.bleu import BLEU

from unroll.metrics import Bootstrap
from unroll.metrics._sacrebleu import corpus_metric

lower_is_better = False


class Options(Bootstrap):
    """`lowercase`: case does not count. `tokenize`: sacrebleu's tokenizer; 13a is the one published scores use."""

    lowercase: bool = False
    tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"


def score(sums: np.ndarray) -> np.ndarray:
    """BLEU of summed statistics [...,10]: hypothesis length, reference length, 4 matches, 4 totals."""
    length, reference, matches, totals = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    absent = matches == 0
    smoothed = np.where(absent, 0.5 ** np.cumsum(absent, axis=-1), matches)  # the k-th absent order counts 1 / 2^k
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.log(smoothed / totals).mean(axis=-1))
        penalty = np.exp(np.minimum(0.0, 1 - reference / length))
        return np.where(absent.all(axis=-1) | (totals == 0).any(axis=-1), 0.0, 100 * penalty * precision)


def _metric(options: Options) -> BLEU:
    return BLEU(lowercase=options.lowercase, tokenize=options.tokenize)


statistics, compute = corpus_metric(Options, _metric, score)
