"""Scores of predictions files: one file per metric, whose name is the name in a recipe.

Every metric file holds

    lower_is_better                        bool
    statistics(predictions, options)       Statistics [n,k] that add up over blocks or sentences, or None
    score(sums [...,k]) -> [...]           the score of added-up statistics, over any leading dimensions
    compute(predictions, options)          the Score: value, interval, n, unit, signature

A metric whose `statistics` is None has no `score` and takes part in no test (`distinct_n`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from pydantic import Field

from unroll.config import Strict
from unroll.errors import UserError

ScoreOfSums = Callable[[np.ndarray], np.ndarray]  # sums [...,k] -> scores [...]


class Unavailable(UserError):
    """This score cannot be computed on this machine; the others are, and the line says what is missing."""


@dataclass(frozen=True)
class Score:
    """One metric of one system. `low` and `high` bound the 95 % interval; None where none can be given.

    `n` counts what the score was computed from (blocks or samples); `signature` says how, so that two scores with the
    same signature compare.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    unit: str
    signature: str

    def to_json(self) -> dict[str, object]:
        """The score with infinities written as "inf", which JSON has no number for."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {key: "inf" if isinstance(v, float) and math.isinf(v) else v for key, v in values}


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a score is computed from: numbers that add up over the n blocks or sentences of a test set.

    `conditions` is a hash of what was scored and how (the references and the options; the denominators of a ratio).
    """

    values: np.ndarray  # [n,k]
    conditions: str

    def comparable(self, other: Statistics) -> bool:
        """Whether a paired test of the two makes sense: the same n samples, scored in the same way."""
        return self.conditions == other.conditions and self.values.shape == other.values.shape


class Bootstrap(Strict):
    """Options of metrics with an interval: how many bootstrap samples, drawn from which seed."""

    samples: int = Field(2000, ge=1)
    seed: int = 1
