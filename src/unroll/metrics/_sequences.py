"""Reading of `sequences.jsonl`, and what the metrics of generated sequences share.

One line a sequence: `{"id": i, "split": its fixed set, "length": in the operation's measure, "steps": time steps,
"predictions": targets, "loss": sum in nats or squared, "errors": wrong targets or absolute errors, "difficulty", "ponder":
steps that were computed, of systems that decide it}`. The sequences of the first split named are those in question;
another split holds longer ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import check, hash_json
from unroll.errors import UserError
from unroll.metrics import Bootstrap, Score, ScoreOfSums, Statistics
from unroll.metrics._predictions import read_lines
from unroll.metrics.bootstrap import scored

SEQUENCES = "sequences.jsonl"
_NUMBERS = ("id", "length", "steps", "predictions", "loss", "errors", "difficulty")

Columns = Callable[[list[dict[str, Any]]], np.ndarray]  # lines -> [n,k]


def read_sequences(predictions: Path, longer: bool = False) -> list[dict[str, Any]]:
    """The lines of the first split, or of the other one, in the order of their ids.

    Raises:
        UserError: file missing, a line malformed (file:line), an id missing or twice there, no longer sequences.
    """
    path = predictions / SEQUENCES
    found: dict[int, dict[str, Any]] = {}
    first = None
    for number, line in read_lines(path):
        place = f"{path}:{number}"
        for key in (*_NUMBERS, "ponder"):
            value = line.get(key, 0.0 if key == "ponder" else None)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{place}: {key!r} is {value!r}, a finite number is expected")
        if line["id"] in found:
            raise UserError(f"{place}: id {line['id']} is there twice; every sequence stands on one line")
        found[line["id"]] = line
        first = line.get("split") if first is None else first
    if sorted(found) != list(range(len(found))) or not found:
        raise UserError(
            f"{path}: {len(found)} sequences whose ids are not 0, 1, 2, ...; the predictions are incomplete"
        )
    chosen = [found[i] for i in range(len(found)) if (found[i].get("split") == first) != longer]
    if not chosen:
        raise UserError(f"{path}: no longer sequences; name a split of them as predict.longer")
    return chosen


def sequence_ratio(
    numerator: str, denominator: str | None, unit: str, scale: float = 1.0, longer: bool = False
) -> tuple[Callable[..., Statistics], ScoreOfSums, Callable[..., Score]]:
    """The functions `statistics`, `score` and `compute` of a metric that is a ratio of two sums over sequences.

    Args:
        numerator: what is added up, "loss" or "errors" or "ponder".
        denominator: what it is divided by; None for the number of sequences.
        unit: of the score.
        scale: of the numerator.
        longer: score the longer sequences instead.
    """

    def values(predictions: Path) -> np.ndarray:
        lines = read_sequences(predictions, longer)
        if numerator not in lines[0]:
            raise UserError(
                f"{predictions / SEQUENCES}: no {numerator!r}; this system does not decide how long to compute"
            )
        below = [1.0 if denominator is None else line[denominator] for line in lines]
        return np.stack([np.array([scale * line[numerator] for line in lines]), np.array(below)], axis=1)  # [n,2]

    def statistics(predictions: Path, options: Mapping[str, Any]) -> Statistics:
        """Numerator and denominator of each sequence: [sequences,2]."""
        found = values(predictions)
        conditions = [[line[key] for key in ("split", "length", "difficulty", "predictions")]
                      for line in read_sequences(predictions, longer)]  # fmt: skip
        return Statistics(found, hash_json([numerator, denominator, conditions]))

    def score(sums: np.ndarray) -> np.ndarray:
        """The score of summed statistics: [...,2] -> [...]."""
        ratios: np.ndarray = sums[..., 0] / sums[..., 1]
        return ratios

    def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
        """The score over all sequences; `options` are `samples` and `seed` of the bootstrap."""
        bootstrap = check(Bootstrap, options, "evaluate options")
        found = values(predictions)
        return scored(found, score, unit, bootstrap, f"sequences:{len(found)}{'|longer' if longer else ''}")

    return statistics, score, compute
