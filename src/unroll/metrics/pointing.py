"""Pointing: named objects of generated scenes on which the attention lies when they are named, in %.

For every coloured shape that a caption names and that is in the picture: does the region that the model looked at most
for the word of the shape touch the object's box? Regions are the cells of the encoder's grid; chance is about the share
of the cells that a box touches, which the signature gives. What is named and not there counts in `attributes`, not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import check, hash_json
from unroll.errors import UserError
from unroll.metrics import Bootstrap, Score, Statistics
from unroll.metrics._scenes import mentions, object_of, read_scenes, terms
from unroll.metrics.bootstrap import scored

lower_is_better = False


def score(sums: np.ndarray) -> np.ndarray:
    """The share in % of summed statistics, 0 if nothing was named: [...,3] -> [...]."""
    hits, named = sums[..., 0], sums[..., 1]
    return 100 * np.divide(hits, named, out=np.zeros_like(hits, dtype=np.float64), where=named > 0)


def statistics(predictions: Path, options: Mapping[str, Any]) -> Statistics:
    """Of each caption the objects that are pointed at, those that are named, and the cells their boxes touch, as a
    share: [captions,3]."""
    lexicon, lines = read_scenes(predictions)
    rows = []
    for line in lines:
        if "looked" not in line:
            raise UserError(f"{predictions}: the model has no attention over an image; leave pointing out")
        rows.append(_pointed(line, lexicon))
    return Statistics(np.array(rows, dtype=np.float64), hash_json([__name__, [line["truth"] for line in lines]]))


def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
    """Objects in % that are looked at when they are named; `options` are `samples` and `seed` of the bootstrap.

    Raises:
        UserError: predictions missing or malformed, without attention, or of pictures of which nothing is known.
    """
    bootstrap = check(Bootstrap, options, "evaluate options")
    values = statistics(predictions, options).values
    named, chance = int(values[:, 1].sum()), 100 * values[:, 2].sum() / max(1, values[:, 1].sum())
    return scored(values, score, "% of named objects", bootstrap, f"objects:{named}|chance:{chance:.0f} %")


def _pointed(line: Mapping[str, Any], lexicon: Mapping[str, Sequence[str]]) -> list[float]:
    half, hits, named, touched = 0.5 / line["grid"], 0, 0, 0.0
    for mention in mentions(terms(line["words"], lexicon)):
        number = object_of(mention, line["truth"])
        if number is None:
            continue
        left, top, right, bottom = line["truth"]["objects"][number]["box"]
        x, y = line["looked"][mention.place]
        hits += left - half <= x <= right + half and top - half <= y <= bottom + half
        named += 1
        cells = (np.arange(line["grid"]) + 0.5) / line["grid"]
        across, down = (
            ((cells >= low - half) & (cells <= high + half)).mean() for low, high in ((left, right), (top, bottom))
        )
        touched += float(across * down)
    return [hits, named, touched]
