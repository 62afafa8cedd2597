"""Scores of predictions files: one file per metric, whose name is the name in a recipe.

Every metric file holds `lower_is_better`, `compute(predictions, options) -> Score` and
`statistics(predictions) -> [blocks,2] or None` (numerators and denominators, for paired tests).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from pydantic import Field

from unroll.config import Strict


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


class Bootstrap(Strict):
    """Options of metrics over blocks: how many bootstrap samples, drawn from which seed."""

    samples: int = Field(2000, ge=1)
    seed: int = 1
