"""What the metrics computed by sacrebleu share: BLEU, chrF and TER of `translations.jsonl`.

sacrebleu tokenises, counts and scores; its signature stands first in ours. Only the score of summed counts is written
here a second time, over arrays, because intervals and tests need it for thousands of resamples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu.metrics.base import Metric

from unroll.config import check
from unroll.metrics import Bootstrap, Score, ScoreOfSums, Statistics
from unroll.metrics._predictions import Sentence, conditions, read_sentences
from unroll.metrics.bootstrap import scored


def corpus_metric(
    kind: type[Bootstrap], make: Callable[[Any], Metric], score: ScoreOfSums
) -> tuple[Callable[..., Statistics], Callable[..., Score]]:
    """The functions `statistics` and `compute` of a metric of sacrebleu.

    Args:
        kind: class of its options.
        make: the sacrebleu metric with these options.
        score: the score of summed statistics, equal to sacrebleu's up to rounding.

    The functions raise a UserError for predictions that are missing, malformed or incomplete, and unknown options.
    """

    def statistics(predictions: Path, options: Mapping[str, Any]) -> Statistics:
        """sacrebleu's counts of each sentence: [sentences,k]."""
        sentences = read_sentences(predictions)
        checked = check(kind, options, "evaluate options")
        _, found = _counted(make, checked, tuple(sentences))
        how = checked.model_dump(mode="json", exclude={"samples", "seed"})
        return Statistics(np.array(found, dtype=np.float64), conditions(sentences, {"metric": kind.__module__, **how}))

    def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
        """The corpus score as sacrebleu computes it, with a bootstrap interval over sentences."""
        checked = check(kind, options, "evaluate options")
        metric, found = _counted(make, checked, tuple(read_sentences(predictions)))
        result = metric._aggregate_and_compute(found)
        values = np.array(found, dtype=np.float64)
        return scored(values, score, result.name, checked, str(metric.get_signature()), float(result.score))

    return statistics, compute


@functools.lru_cache(maxsize=4)
def _counted(
    make: Callable[[Any], Metric], options: Any, sentences: tuple[Sentence, ...]
) -> tuple[Metric, list[list[float]]]:
    """Kept for the next call: `compute` and `statistics` need the same counts, and those of TER take seconds."""
    metric = make(options)
    return metric, counts(metric, sentences)


def counts(metric: Metric, sentences: Sequence[Sentence]) -> list[list[float]]:
    """What sacrebleu counts in each sentence; sentences may have different numbers of references."""
    streams = list(zip_longest(*(sentence.references for sentence in sentences)))
    hypotheses = [sentence.hypothesis for sentence in sentences]
    found: list[list[float]] = metric._extract_corpus_statistics(hypotheses, streams)
    return found
