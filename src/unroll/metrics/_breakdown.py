"""Where a system is good and where it is not: scores by length of the source, and example sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.chrf import CHRF

from unroll.metrics import ScoreOfSums, Statistics
from unroll.metrics._predictions import Sentence
from unroll.metrics._sacrebleu import counts
from unroll.metrics.chrf import score as chrf_score

LONGEST = (8, 12, 16, 24)  # words of the longest source in each bucket; what is longer shares the last one
EXAMPLES = 3  # of the best, of the middle and of the worst


def by_length(
    sentences: Sequence[Sentence], metrics: Mapping[str, tuple[Statistics, ScoreOfSums]]
) -> list[dict[str, Any]]:
    """Scores over the sentences of like length, shortest first; buckets without a sentence are left out.

    Words are what white space separates in the raw source: with the tokens of one system's vocabulary the same sentence
    would fall into another bucket for the next system, and the buckets would not compare.

    Returns:
        For each bucket `{"low", "high" (None of the last), "n", "scores": {metric: score}}`.
    """
    words = np.array([len(sentence.source.split()) for sentence in sentences])
    bucket_of = np.searchsorted(LONGEST, words)  # [sentences]
    buckets = []
    for number, (low, high) in enumerate(zip((0, *LONGEST), (*LONGEST, None), strict=True)):
        chosen = bucket_of == number
        if chosen.any():
            scores = {
                name: float(score(statistics.values[chosen].sum(axis=0)))
                for name, (statistics, score) in metrics.items()
            }
            buckets.append({"low": low + 1 if low else 0, "high": high, "n": int(chosen.sum()), "scores": scores})
    return buckets


def examples(sentences: Sequence[Sentence]) -> list[dict[str, Any]]:
    """The best, middle and worst sentences by their own chrF, none twice; of equals the longer source is better.

    Returns:
        For each `{"rank": "best", "middle" or "worst", "id", "chrf", "source", "references", "hypothesis"}`.
    """
    chrf = chrf_score(np.array(counts(CHRF(), sentences), dtype=np.float64))  # [sentences]
    order = sorted(range(len(sentences)), key=lambda i: (chrf[i], len(sentences[i].source.split()), -i))
    middle = max(0, (len(order) - EXAMPLES) // 2)
    ranks = {
        "best": order[::-1][:EXAMPLES],
        "middle": order[middle : middle + EXAMPLES][::-1],
        "worst": order[:EXAMPLES],
    }
    shown: dict[int, str] = {}
    for rank, chosen in ranks.items():
        for number in chosen:
            shown.setdefault(number, rank)
    return [
        {
            "rank": rank,
            "id": number,
            "chrf": float(chrf[number]),
            "source": sentences[number].source,
            "references": list(sentences[number].references),
            "hypothesis": sentences[number].hypothesis,
        }
        for number, rank in shown.items()
    ]
