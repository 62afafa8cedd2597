"""Which tokens or samples form which step: pure functions of (seed, epoch, step), without any input or output.

Both plans describe the *global* batch. Ranks and accumulation take contiguous rows of it (`rank_rows`), so the order is
the same for any number of workers, every token or sample is seen once an epoch, and two integers say where to resume.

Streams (`StreamPlan`): the corpus of N tokens has N - 1 targets (the first token has nothing before it). Lane i, one
row of the global batch, owns a contiguous part of the targets and walks through it window by window, carrying state.
    corpus   t0 t1 t2 t3 t4 t5 t6 t7          two lanes, window 2
    lane 0   step 0: t0 t1 -> t1 t2           step 1: t2 t3 -> t3 t4
    lane 1   step 0: t4 t5 -> t5 t6           step 1: t6 -  -> t7 -    (one target fewer: masked)

Random windows follow AWD-LSTM (Merity et al. 2018, section 5): the base is the window with probability 0.95, else half
of it; the length is normal around the base with deviation 5, at least 5. The learning rate is to be scaled by
length / window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from unroll.errors import UserError

SHORTEST_WINDOW = 5


def rank_rows(total_rows: int, rank: int, world: int, micro: int = 0, accumulation: int = 1) -> slice:
    """Rows of a global batch for pass `micro` of `accumulation` on `rank` of `world`; empty when rows are fewer."""
    part, parts = rank * accumulation + micro, world * accumulation
    return slice(part * total_rows // parts, (part + 1) * total_rows // parts)


class StreamPlan:
    """Windows over a corpus of `tokens` tokens cut into `lanes` contiguous parts."""

    def __init__(self, tokens: int, lanes: int, window: int, seed: int, random_windows: bool = False) -> None:
        """Raises UserError when there is not one target token for each lane."""
        if tokens - 1 < lanes:
            raise UserError(f"a split of {tokens} tokens has {tokens - 1} targets: too few for a batch of {lanes} rows")
        self.tokens, self.lanes, self.window_tokens, self.seed = tokens, lanes, window, seed
        self.random_windows = random_windows
        self.longest_lane = -(-(tokens - 1) // lanes)
        self._random_starts = lru_cache(maxsize=2)(self._draw_starts)

    def lane(self, lane: int) -> tuple[int, int]:
        """(place of the lane's first input token, number of its targets)."""
        short, longer = divmod(self.tokens - 1, self.lanes)
        return lane * short + min(lane, longer), short + (lane < longer)

    def steps(self, epoch: int) -> int:
        """Number of windows in this epoch."""
        if self.random_windows:
            return len(self._random_starts(epoch)) - 1
        return -(-self.longest_lane // self.window_tokens)

    def window(self, epoch: int, step: int) -> tuple[int, int]:
        """(offset within every lane, length) of a step; the last window of an epoch may be shorter."""
        if not 0 <= step < self.steps(epoch):
            raise IndexError(f"step {step} of {self.steps(epoch)} in epoch {epoch}")
        if self.random_windows:
            start, end = self._random_starts(epoch)[step : step + 2].tolist()
            return start, end - start
        offset = step * self.window_tokens
        return offset, min(self.window_tokens, self.longest_lane - offset)

    def _draw_starts(self, epoch: int) -> np.ndarray:
        """Starts of the windows of an epoch and the lane's end: int64 [steps + 1]; 8 bytes a step."""
        generator = np.random.default_rng([self.seed, epoch])
        pieces, total = [np.zeros(1, np.int64)], 0
        while total < self.longest_lane:
            draws = (self.longest_lane - total) // self.window_tokens + 16
            bases = np.where(generator.random(draws) < 0.95, self.window_tokens, self.window_tokens / 2)
            lengths = np.maximum(generator.normal(bases, 5.0).astype(np.int64), SHORTEST_WINDOW)
            pieces.append(total + np.cumsum(lengths))
            total = int(pieces[-1][-1])
        starts = np.concatenate(pieces)
        return np.append(starts[starts < self.longest_lane], self.longest_lane)


class SamplePlan:
    """Global batches of about `batch_tokens` tokens out of shards of samples.

    The shards of an epoch are permuted and taken `window_shards` at a time. The samples of such a window are shuffled,
    sorted by length so that a batch is padded little, cut where rows x longest would pass `batch_tokens`, and the
    batches shuffled. Windows are numbered through all epochs; memory is the lengths of one window.

    `lengths(shard, epoch)` gives the lengths of each sample of a shard, one for each sequence that it holds (target and
    source, say): int64 [samples, sequences]. The first decides the order, the second orders samples of equal first
    length, up and down in turn, so that neighbours are alike in both; the longest of all counts for the cut.
    """

    def __init__(
        self,
        shard_counts: Sequence[int],
        lengths: Callable[[int, int], np.ndarray],
        batch_tokens: int,
        window_shards: int,
        seed: int,
    ) -> None:
        if sum(shard_counts) == 0:
            raise UserError("a split without samples cannot be planned")
        self.shard_counts, self.lengths = list(shard_counts), lengths
        self.batch_tokens, self.window_shards, self.seed = batch_tokens, window_shards, seed
        self.windows_per_epoch = -(-len(self.shard_counts) // window_shards)
        self.batches = lru_cache(maxsize=2)(self._batches)

    def epoch(self, window: int) -> int:
        """The epoch that a window lies in."""
        return window // self.windows_per_epoch

    def shards(self, window: int) -> list[int]:
        """The shards of a window, in their order of this epoch."""
        epoch, place = divmod(window, self.windows_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shard_counts))
        return order[place * self.window_shards : (place + 1) * self.window_shards].tolist()

    def _batches(self, window: int) -> list[np.ndarray]:
        """The global batches of a window in order, each int64 [rows, 2] of (shard, index in it).

        Raises:
            UserError: a sample that alone is longer than `batch_tokens`.
        """
        shards = self.shards(window)
        counts = [self.shard_counts[shard] for shard in shards]
        samples = np.stack([np.repeat(shards, counts), np.concatenate([np.arange(count) for count in counts])], axis=1)
        lengths = np.concatenate([self.lengths(shard, self.epoch(window)) for shard in shards])  # [samples, sequences]
        generator = np.random.default_rng([self.seed, self.epoch(window), window])
        order = generator.permutation(len(samples))
        order = order[_by_length(lengths[order])]
        samples, lengths = samples[order], lengths[order]
        longest = lengths.max(axis=1)
        if len(longest) and longest.max() > self.batch_tokens:
            shard, index = samples[longest.argmax()].tolist()
            raise UserError(
                f"sample {index} of shard {shard} has {longest.max()} tokens, batch_tokens allows {self.batch_tokens}"
            )
        batches = np.split(samples, self._cuts(longest))
        return [batches[i] for i in generator.permutation(len(batches))] if len(samples) else []

    def _cuts(self, lengths: np.ndarray) -> list[int]:
        """Where to cut samples in order so that rows x longest stays within `batch_tokens`."""
        cuts, start, longest = [], 0, 0
        for i, length in enumerate(lengths.tolist()):
            longest = max(longest, length)
            if (i - start + 1) * longest > self.batch_tokens:
                cuts.append(i)
                start, longest = i, length
        return cuts


def sample_key(epoch: int, shard: int, index: int) -> int:
    """A number for each sample of each epoch: seeds whatever is random in it."""
    return (epoch << 48) + (shard << 24) + index


def _by_length(lengths: np.ndarray) -> np.ndarray:
    """The order of samples by the first length, those of equal first length by the second, rising and falling in turn.

    lengths: [samples, sequences]. Equal ones stay in the order they are in.
    """
    first = lengths[:, 0]
    if lengths.shape[1] == 1:
        return np.argsort(first, kind="stable")
    return np.lexsort((np.where(first % 2, lengths[:, 1], -lengths[:, 1]), first))
