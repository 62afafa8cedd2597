"""Distinct-n: different word n-grams / all word n-grams of the generated samples, between 0 and 1 (Li et al. 2016).

Words are what white space separates, as they stand (case and punctuation kept); an n-gram does not cross from one
sample into the next. It falls as more text is sampled, so it compares only at equal numbers and lengths of samples.

Interval: delete-one jackknife over samples with normal bounds. The bootstrap is no choice here: a sample drawn twice
adds words but no new n-gram, which would bias every resample downwards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from unroll.config import check
from unroll.errors import UserError
from unroll.metrics import Bootstrap, Score
from unroll.metrics._predictions import read_lines

lower_is_better = False


class Options(Bootstrap):
    """`n`: length of the n-grams in words. The bootstrap's options are taken but not used: there is none."""

    n: int = Field(2, ge=1, le=3)


def statistics(predictions: Path, options: Mapping[str, Any]) -> None:
    """None: what is distinct depends on all samples together, so there is no sum over blocks to test with."""


def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
    """Different n-grams over all n-grams of every sample in `samples.jsonl`.

    Args:
        predictions: folder that holds `samples.jsonl`.
        options: `n` (1, 2 or 3; 2 unless told).

    Raises:
        UserError: samples missing or malformed; unknown option.
    """
    n = check(Options, options, "evaluate options").n
    path = predictions / "samples.jsonl"
    samples = [_ngrams(_text(entry, f"{path}:{number}"), n) for number, entry in read_lines(path)]
    counts: Counter[tuple[str, ...]] = Counter()
    for sample in samples:
        counts.update(sample)
    value = len(counts) / counts.total() if counts else 0.0
    low, high = _jackknife(samples, counts, value) if counts else (None, None)
    interval = "none" if low is None else "jackknife"
    return Score(
        value, low, high, len(samples), f"distinct-{n}", f"samples:{len(samples)}|n:{n}|interval:{interval}|v:1"
    )


def _text(entry: Mapping[str, Any], place: str) -> str:
    text = entry.get("text")
    if not isinstance(text, str):
        raise UserError(f"{place}: 'text' is {text!r}, a string is expected")
    return text


def _ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _jackknife(
    samples: list[Counter[tuple[str, ...]]], counts: Counter[tuple[str, ...]], value: float
) -> tuple[float | None, float | None]:
    """95 % bounds from the spread of the score when one sample is left out; none of fewer than two samples."""
    without = []
    for sample in samples:
        gone = sum(counts[ngram] == count for ngram, count in sample.items())
        total = counts.total() - sample.total()
        if total:
            without.append((len(counts) - gone) / total)
    if len(without) < 2:
        return None, None
    error = math.sqrt((len(without) - 1) * float(np.var(without)))
    return max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error)
