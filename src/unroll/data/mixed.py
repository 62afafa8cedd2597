"""A plan that mixes: every batch has as many samples, whatever their lengths.

Where samples of a kind are of a length, batches of like length are batches of a kind, and each step unlearns the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from unroll.data.curriculum import Curriculum
from unroll.data.plan import SamplePlan


class MixedPlan(SamplePlan):
    """Batches of `rows` samples drawn from those that the curriculum lets in, all of them without one. The last of a
    sample's lengths says how difficult it is."""

    def __init__(self, rows: int, curriculum: Curriculum | None, shard_counts: Any, lengths: Any, *plan: Any) -> None:
        super().__init__(shard_counts, lengths, rows, *plan)
        self.rows, self.curriculum = rows, curriculum

    def _batches(self, window: int) -> list[np.ndarray]:
        shards, epoch = self.shards(window), self.epoch(window)
        samples = np.concatenate([[(shard, index) for index in range(self.shard_counts[shard])] for shard in shards])
        if self.curriculum is not None:
            difficulty = np.concatenate([self.lengths(shard, epoch)[:, -1] for shard in shards])
            samples = samples[difficulty <= self.curriculum.hardest(epoch)]
        order = np.random.default_rng([self.seed, epoch, window]).permutation(len(samples))
        return [samples[order[start : start + self.rows]] for start in range(0, len(samples), self.rows)]
