"""A curriculum: a plan that begins with the easy samples and lets in harder ones, epoch by epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from unroll.config import Strict
from unroll.data.plan import SamplePlan
from unroll.errors import UserError


class Curriculum(Strict):
    """Samples of at most difficulty `start` in the first `epochs` epochs, of one more in as many after them, and so on."""

    start: int = Field(1, ge=0)
    epochs: int = Field(1, ge=1)

    def hardest(self, epoch: int) -> int:
        """The greatest difficulty of an epoch."""
        return self.start + epoch // self.epochs


class CurriculumPlan(SamplePlan):
    """The last of a sample's lengths says how difficult it is; an epoch leaves out what is still too difficult."""

    def __init__(self, curriculum: Curriculum, *plan: Any) -> None:
        super().__init__(*plan)
        self.curriculum = curriculum
        easiest = min(int(self.lengths(shard, 0)[:, -1].min()) for shard in range(len(self.shard_counts)))
        if curriculum.start < easiest:
            raise UserError(f"curriculum.start: found {curriculum.start}, the easiest sample has difficulty {easiest}")

    def _batches(self, window: int) -> list[np.ndarray]:
        hardest = self.curriculum.hardest(self.epoch(window))
        difficulty = {shard: self.lengths(shard, 0)[:, -1] for shard in self.shards(window)}
        kept = []
        for batch in super()._batches(window):
            easy = np.array([difficulty[shard][index] <= hardest for shard, index in batch.tolist()])
            if easy.any():
                kept.append(batch[easy])
        return kept
