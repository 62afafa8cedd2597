"""METEOR 1.5 of captions, 0 to 1, by pycocoevalcap: words aligned by form, stem and synonym (Denkowski & Lavie 2014).

Needs a Java runtime. The score of a corpus is computed from summed counts and is not the mean over pictures; interval
and tests are of that mean, and the interval is moved by the difference of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unroll.metrics import Score, Unavailable
from unroll.metrics._captions import Scored, Texts, caption_metric, mean, need_java, with_ones

lower_is_better = False
score = mean


def count(references: Texts, hypotheses: Texts) -> Scored:
    """METEOR of each picture and of all."""
    need_java("meteor", "leave it out")
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        value, each = scorer.compute_score(references, hypotheses)
    except (OSError, ValueError) as error:
        raise Unavailable(f"meteor: its program stopped: {error}") from None
    return Scored(with_ones(each), float(value))


statistics, _compute = caption_metric("meteor-1.5", "METEOR (0 to 1)", count, score)


def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
    """METEOR of all pictures; see the top of this file for the interval."""
    found = _compute(predictions, options)
    values = statistics(predictions, options).values
    moved = found.value - float(score(values.sum(0)))
    low, high = (None if bound is None else bound + moved for bound in (found.low, found.high))
    return replace(found, low=low, high=high, signature=found.signature + "|interval:of the mean, moved")
