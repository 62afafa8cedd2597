"""The plan decides what a model sees. If it misses or repeats a token, or depends on the number of workers, every
result made with it is wrong without anything failing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unroll.data.curriculum import Curriculum
from unroll.data.mixed import MixedPlan, StratifiedPlan
from unroll.data.plan import SamplePlan, StreamPlan, rank_rows
from unroll.errors import UserError

quick = settings(max_examples=60, deadline=None)


@quick
@given(st.integers(0, 200), st.integers(1, 8), st.integers(1, 5))
def test_ranks_and_passes_share_the_rows_without_gap_or_overlap(rows: int, world: int, accumulation: int) -> None:
    slices = [rank_rows(rows, r, world, m, accumulation) for r in range(world) for m in range(accumulation)]
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(rows))
    sizes = [part.stop - part.start for part in slices]
    assert max(sizes) - min(sizes) <= 1


@quick
@given(st.integers(2, 400), st.integers(1, 12), st.integers(1, 40), st.booleans(), st.integers(0, 3))
def test_stream_plan_covers_every_target_once_an_epoch(
    tokens: int, lanes: int, window: int, random_windows: bool, epoch: int
) -> None:
    lanes = min(lanes, tokens - 1)
    plan = StreamPlan(tokens, lanes, window, seed=3, random_windows=random_windows)
    targets = []
    for step in range(plan.steps(epoch)):
        offset, length = plan.window(epoch, step)
        for start, count in map(plan.lane, range(lanes)):
            targets += range(start + offset + 1, start + min(offset + length, count) + 1)
    assert sorted(targets) == list(range(1, tokens))


def test_windows_follow_each_other_and_a_resumed_plan_gives_the_same() -> None:
    plan, again = (StreamPlan(9000, 4, 70, seed=5, random_windows=True) for _ in range(2))
    place = 0
    for step in range(plan.steps(1)):
        offset, length = plan.window(1, step)
        assert offset == place
        place += length
    assert [again.window(1, step) for step in (7, 3)] == [plan.window(1, step) for step in (7, 3)]
    with pytest.raises(IndexError, match="step"):
        plan.window(1, plan.steps(1))


def test_random_windows_are_those_of_awd_lstm() -> None:
    """Normal around 70 (19 of 20) or 35 with deviation 5; another epoch draws other windows."""
    plan = StreamPlan(2_000_001, 20, 70, seed=1, random_windows=True)
    lengths = np.array([plan.window(0, step)[1] for step in range(plan.steps(0))][:-1])
    full, half = lengths[lengths > 52], lengths[lengths <= 52]
    assert 0.02 < len(half) / len(lengths) < 0.08
    assert abs(full.mean() - 69.5) < 0.6
    assert 4.3 < full.std() < 5.7
    assert abs(half.mean() - 34.5) < 3
    assert lengths.min() >= 5
    assert plan.window(0, 3) != plan.window(1, 3)


def test_a_text_shorter_than_the_batch_is_refused() -> None:
    with pytest.raises(UserError, match="a split of 4 tokens has 3 targets: too few for a batch of 8 rows"):
        StreamPlan(4, 8, 10, seed=1)


def sample_plan(counts: list[int], batch_tokens: int = 60, window_shards: int = 2, seed: int = 1) -> SamplePlan:
    generator = np.random.default_rng(9)
    lengths = [generator.integers(1, 30, count) for count in counts]
    return SamplePlan(counts, lambda shard, epoch: lengths[shard][:, None], batch_tokens, window_shards, seed)


def epoch_batches(plan: SamplePlan, epoch: int) -> list[list[tuple[int, int]]]:
    windows = range(epoch * plan.windows_per_epoch, (epoch + 1) * plan.windows_per_epoch)
    return [[tuple(row) for row in batch.tolist()] for window in windows for batch in plan.batches(window)]


@quick
@given(st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any), st.integers(1, 4), st.integers(30, 200))
def test_sample_plan_covers_every_sample_once_within_the_budget(
    counts: list[int], window_shards: int, budget: int
) -> None:
    plan = sample_plan(counts, budget, window_shards)
    for epoch in range(2):
        batches = epoch_batches(plan, epoch)
        seen = sorted(sample for batch in batches for sample in batch)
        assert seen == [(shard, index) for shard, count in enumerate(counts) for index in range(count)]
        for batch in batches:
            assert batch
            assert len(batch) * max(plan.lengths(shard, 0)[index, 0] for shard, index in batch) <= budget


def test_sample_plan_shuffles_every_epoch_anew_and_the_same_way_for_a_seed() -> None:
    plan, again, other = sample_plan([50] * 4), sample_plan([50] * 4), sample_plan([50] * 4, seed=2)
    assert epoch_batches(plan, 0) == epoch_batches(again, 0)
    assert epoch_batches(plan, 0) != epoch_batches(plan, 1)
    assert epoch_batches(plan, 0) != epoch_batches(other, 0)


def test_sorting_by_length_keeps_padding_small() -> None:
    plan = sample_plan([400, 400], batch_tokens=300)
    real = padded = 0
    for batch in epoch_batches(plan, 0):
        lengths = [int(plan.lengths(shard, 0)[index, 0]) for shard, index in batch]
        real, padded = real + sum(lengths), padded + len(lengths) * max(lengths)
    assert padded < 1.1 * real


def test_pairs_of_sequences_are_padded_little_on_both_sides() -> None:
    generator = np.random.default_rng(2)
    target = np.clip(generator.normal(14, 4, 20_000).astype(int), 3, 40)
    source = np.clip(target + generator.normal(0, 3, len(target)).astype(int), 2, 45)
    lengths = np.stack([target, source], axis=1)
    plan = SamplePlan([len(lengths)], lambda shard, epoch: lengths, 2048, 1, seed=1)
    batches = [lengths[batch[:, 1]] for batch in plan.batches(0)]
    assert sum(map(len, batches)) == len(lengths)
    assert all(len(batch) * batch.max() <= 2048 for batch in batches)
    padded = sum(len(batch) * int(batch.max(axis=0).sum()) for batch in batches)
    assert padded <= 1.08 * lengths.sum()


def test_a_sample_longer_than_a_batch_is_named() -> None:
    plan = SamplePlan([3], lambda shard, epoch: np.array([[4, 2], [9, 90], [5, 5]]), 50, 1, seed=1)
    with pytest.raises(UserError, match="sample 1 of shard 0 has 90 tokens, batch_tokens allows 50"):
        plan.batches(0)


def test_a_split_without_samples_is_refused() -> None:
    with pytest.raises(UserError, match="without samples"):
        sample_plan([0, 0])


def test_mixed_batches_are_of_one_size_and_hold_what_the_curriculum_lets_in() -> None:
    lengths = np.array([[5 + n % 7, 1 + n % 3] for n in range(90)])  # length, difficulty
    plan = MixedPlan(
        8, Curriculum(start=1, epochs=1), [50, 40], lambda shard, _: lengths[:50] if shard == 0 else lengths[50:], 8, 1
    )
    for window, (samples, hardest) in enumerate([(30, 1), (60, 2), (90, 3)]):
        batches = plan.batches(window)
        assert [len(batch) for batch in batches] == [8] * (samples // 8) + [samples % 8] * (samples % 8 > 0)
        taken = np.concatenate(batches)
        assert len({tuple(row) for row in taken.tolist()}) == samples
        assert lengths[taken @ [50, 1]][:, 1].max() == hardest
    assert len({length for length, _ in lengths[plan.batches(2)[0] @ [50, 1]].tolist()}) > 2


def test_stratified_batches_hold_every_kind_in_its_share() -> None:
    kinds = np.array([3] * 20 + [1] * 60 + [2] * 40)
    lengths = np.array([[1 + n % 5] for n in range(120)])
    plan = StratifiedPlan(13, lambda shard, epoch: kinds, [120], lambda shard, epoch: lengths, 8, 1)
    for window in range(2):
        batches = plan.batches(window)
        assert [len(batch) for batch in batches] == [12] * 10
        assert sorted(index for batch in batches for _, index in batch.tolist()) == list(range(120))
        for batch in batches:
            taken = kinds[batch[:, 1]]
            assert taken.tolist() == sorted(taken.tolist())  # 1 is the largest kind, 3 the smallest
            assert np.abs(np.bincount(taken, minlength=4) - [0, 6, 4, 2]).max() <= 1
            for kind in (1, 2, 3):
                assert (np.diff(lengths[batch[taken == kind, 1], 0]) >= 0).all()
    assert any((a != b).any() for a, b in zip(plan.batches(0), plan.batches(1), strict=True))
