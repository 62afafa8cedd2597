"""Plans that mix: every batch has as many samples, whatever their lengths.

Where samples of a kind are of a length, batches of like length are batches of a kind, and each step unlearns the others.
"""

from __future__ import annotations

from collections.abc import Callable
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


class StratifiedPlan(SamplePlan):
    """Batches of at most `rows` samples, in each of which every kind has the share that it has of them all, to within a
    sample. The kinds of a batch stand one after the other, the largest first, each from short to long, so that the slices
    of a batch are of one kind as far as that is possible. `kinds(shard, epoch)`: int64 [samples]."""

    def __init__(
        self, rows: int, kinds: Callable[[int, int], np.ndarray], counts: Any, lengths: Any, *plan: Any
    ) -> None:
        super().__init__(counts, lengths, rows, *plan)
        self.rows, self.kinds = rows, kinds

    def _batches(self, window: int) -> list[np.ndarray]:
        shards, epoch = self.shards(window), self.epoch(window)
        samples = np.concatenate([[(shard, index) for index in range(self.shard_counts[shard])] for shard in shards])
        lengths = np.concatenate([self.lengths(shard, epoch)[:, 0] for shard in shards])
        kinds, sizes = np.unique(
            np.concatenate([self.kinds(shard, epoch) for shard in shards]), return_inverse=True, return_counts=True
        )[1:]
        order = np.random.default_rng([self.seed, epoch, window]).permutation(len(samples))
        place = np.empty(len(samples))  # [samples] in (0, 1): where in the epoch
        for kind, size in enumerate(sizes):
            place[order[kinds[order] == kind]] = (np.arange(size) + 0.5) / size
        order = order[place[order].argsort(kind="stable")]
        batches = np.array_split(order, -(-len(order) // self.rows))
        sort = [np.lexsort((lengths[batch], kinds[batch], -sizes[kinds[batch]])) for batch in batches]
        return [samples[batch[by]] for batch, by in zip(batches, sort, strict=True)]
