"""BLEU of captions as pycocoevalcap computes it: 1- to n-gram precisions of the corpus, the closest reference length.

    BLEU-n = min(1, exp(1 - r / c)) (prod_k matches_k / totals_k)^(1/n)            0 to 1

Not sacrebleu's: other tokens, no smoothing but for an epsilon against 0 / 0.
"""

from __future__ import annotations

import numpy as np

from unroll.metrics import ScoreOfSums
from unroll.metrics._captions import Scored, Texts, caption_metric

SMALL, TINY = 1e-9, 1e-15


def coco_bleu(order: int) -> tuple[object, ScoreOfSums, object]:
    """The functions `statistics`, `score` and `compute` of BLEU-n."""

    def count(references: Texts, hypotheses: Texts) -> Scored:
        """Lengths of hypothesis and closest reference, matches and totals of each order: [pictures,2+2n]."""
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer

        scorer = BleuScorer(n=order)
        for number, texts in references.items():
            scorer += (hypotheses[number][0], texts)
        value = scorer.compute_score(option="closest", verbose=0)[0][-1]
        rows = [
            [each["testlen"], min((abs(length - each["testlen"]), length) for length in each["reflen"])[1],
             *each["correct"][:order], *each["guess"][:order]]
            for each in scorer.ctest
        ]  # fmt: skip
        return Scored(np.array(rows, dtype=np.float64), float(value))

    def score(sums: np.ndarray) -> np.ndarray:
        """BLEU-n of summed numbers, over any leading dimensions."""
        length, reference = sums[..., 0], sums[..., 1]
        matches, totals = sums[..., 2 : 2 + order], sums[..., 2 + order :]
        precision = np.prod((matches + TINY) / (totals + SMALL), axis=-1) ** (1 / order)
        ratio = (length + TINY) / (reference + SMALL)
        bleu: np.ndarray = precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))
        return bleu

    statistics, compute = caption_metric(f"bleu-{order}", f"BLEU-{order} (0 to 1)", count, score)
    return statistics, score, compute
