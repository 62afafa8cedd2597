"""Intervals and p-values must mean what they say: otherwise the leaderboard calls luck a difference."""

import numpy as np
import pytest

from unroll.metrics.bootstrap import interval, paired_bootstrap, paired_test


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def exp_ratio(sums: np.ndarray) -> np.ndarray:
    return np.exp(ratio(sums))


def pairs(numerators: list[float], denominators: list[float]) -> np.ndarray:
    return np.array([numerators, denominators], dtype=np.float64).T  # [n,2]


def blocks(generator: np.random.Generator, count: int, mean: float = 1.5, spread: float = 0.15) -> np.ndarray:
    """Statistics [count,2] of a made-up system: skewed losses around `mean` per token, blocks of unequal length."""
    tokens = generator.integers(400, 1000, count)
    losses = mean * np.exp(generator.normal(-(spread**2) / 2, spread, count))
    return np.stack([losses * tokens, tokens], axis=1).astype(np.float64)


def coverage(simulations: int, count: int, samples: int) -> float:
    """Part of the simulated data sets whose 95 % interval holds the true ratio."""
    generator = np.random.default_rng(3)
    held = 0
    for simulation in range(simulations):
        statistics = blocks(generator, count)
        low, high = interval(statistics, ratio, samples, seed=simulation)
        held += low <= 1.5 <= high
    return held / simulations


def null_p_values(simulations: int, samples: int) -> np.ndarray:
    """p-values [simulations] of pairs of systems that differ by noise alone."""
    generator = np.random.default_rng(4)
    p_values = []
    for simulation in range(simulations):
        a = blocks(generator, 60)
        b = a.copy()
        b[:, 0] += generator.normal(0, 20, 60)
        p_values.append(paired_test(a, b, ratio, samples, seed=simulation))
    return np.array(p_values)


def test_interval_holds_the_true_score_about_as_often_as_it_claims() -> None:
    assert 0.90 <= coverage(200, count=113, samples=400) <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("count", [50, 113])
def test_interval_covers_in_93_to_97_percent_of_1000_simulations(count: int) -> None:
    assert 0.93 <= coverage(1000, count, samples=2000) <= 0.97


def test_interval_of_equal_blocks_is_a_point() -> None:
    assert interval(pairs([30.0] * 8, [10.0] * 8), exp_ratio) == pytest.approx((np.exp(3.0), np.exp(3.0)))


def test_interval_of_two_blocks_is_what_resampling_them_gives() -> None:
    """Two blocks of ratios 1 and 3 give the resamples 1, 2, 2, 3: the bounds are 1 and 3."""
    assert interval(pairs([10.0, 30.0], [10.0, 10.0]), ratio) == (1.0, 3.0)


def test_interval_weighs_blocks_by_length_and_not_alike() -> None:
    """With one long block of ratio 1 and many short ones of ratio 9, a mean of ratios would lie above 8."""
    low, high = interval(pairs([1e6] + [9.0] * 5, [1e6] + [1.0] * 5), ratio)
    assert low < 1.001
    assert high == 9.0  # a resample without the long block


def test_interval_is_the_same_for_the_same_seed_and_moves_with_it() -> None:
    statistics = blocks(np.random.default_rng(0), 40)
    bounds = [interval(statistics, ratio, 300, seed) for seed in (1, 1, 2)]
    assert bounds[0] == bounds[1] != bounds[2]


def test_interval_does_not_depend_on_how_many_draws_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = blocks(np.random.default_rng(0), 41), blocks(np.random.default_rng(0), 41)
    b[:, 0] += np.random.default_rng(1).normal(0, 20, 41)

    def everything() -> list[object]:
        return [interval(a, ratio, 300, 1), paired_test(a, b, ratio, 300), paired_bootstrap(a, b, ratio, 300)]

    whole = everything()
    monkeypatch.setattr("unroll.metrics.bootstrap._DRAWS_AT_ONCE", 41)
    assert whole == everything()


def test_interval_with_an_infinite_block_reaches_infinity_and_is_never_nan() -> None:
    low, high = interval(pairs([np.inf] + [10.0] * 30, [10.0] * 31), exp_ratio)
    assert low == pytest.approx(np.e)  # about a third of the resamples miss the infinite block
    assert high == np.inf


def test_interval_refuses_statistics_without_rows() -> None:
    with pytest.raises(ValueError, match=r"statistics \[n,k\] with n > 0 are expected"):
        interval(np.ones(3), ratio)
    with pytest.raises(ValueError, match=r"statistics \[n,k\] with n > 0 are expected"):
        interval(np.ones((0, 2)), ratio)


def test_identical_systems_are_never_significant() -> None:
    statistics = blocks(np.random.default_rng(0), 113)
    assert paired_test(statistics, statistics.copy(), ratio, 500) == 1.0


def test_p_value_of_three_blocks_is_what_all_swaps_give() -> None:
    """Differences 3, 2, 1: of the eight sign patterns two reach a total of 6, so p is near 1/4."""
    a = np.array([[13.0, 5.0], [12.0, 5.0], [11.0, 5.0]])
    b = np.array([[10.0, 5.0], [10.0, 5.0], [10.0, 5.0]])
    assert paired_test(a, b, ratio, 20_000) == pytest.approx(0.25, abs=0.01)


def test_p_value_is_the_same_both_ways_round() -> None:
    generator = np.random.default_rng(0)
    a = blocks(generator, 30)
    b = a + np.stack([generator.normal(3, 20, 30), np.zeros(30)], axis=1)
    assert paired_test(a, b, ratio, 999) == paired_test(b, a, ratio, 999)


def test_one_differing_block_proves_nothing() -> None:
    a = blocks(np.random.default_rng(0), 50)
    b = a.copy()
    b[7, 0] += 1000.0
    assert paired_test(a, b, ratio, 999) == 1.0


def test_p_values_of_equal_systems_are_small_no_more_often_than_they_say() -> None:
    p_values = null_p_values(200, 300)
    assert (p_values < 0.05).mean() < 0.11
    assert 0.35 < (p_values < 0.5).mean() < 0.65


@pytest.mark.slow
def test_p_values_of_equal_systems_are_uniform() -> None:
    """Kolmogorov-Smirnov at 1 %: the largest gap to the uniform distribution is below 1.63 / sqrt(n)."""
    p_values = np.sort(null_p_values(1000, 2000))
    ranks = np.arange(1, 1001) / 1000
    gap = np.maximum(np.abs(p_values - ranks), np.abs(p_values - (ranks - 1 / 1000))).max()
    assert gap * np.sqrt(1000) < 1.63


def test_a_real_difference_is_found_though_it_is_smaller_than_the_intervals() -> None:
    """Pairing removes the difficulty of the text: 1 % better, noise of 2 % a block, blocks that differ by 15 %."""
    found = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        a = blocks(generator, 113)
        b = a.copy()
        b[:, 0] *= 0.99 + generator.normal(0, 0.02, 113)
        found += paired_test(a, b, ratio, 500, seed) < 0.01
    assert found >= 19


def test_paired_tests_refuse_another_number_of_blocks() -> None:
    a = np.array([[5.0, 2.0], [6.0, 3.0]])
    for test in (paired_test, paired_bootstrap):
        with pytest.raises(ValueError, match="over the same samples"):
            test(a, a[:1], ratio)


def test_a_rising_function_of_the_ratio_changes_no_p_value() -> None:
    """Perplexity and nats per token must not disagree on which difference is real."""
    a = blocks(np.random.default_rng(0), 40)
    b = a + np.stack([np.random.default_rng(1).normal(3, 20, 40), np.zeros(40)], axis=1)
    assert paired_test(a, b, ratio, 999) == paired_test(a, b, exp_ratio, 999)


def test_randomisation_of_a_score_of_several_sums_is_what_all_swaps_give() -> None:
    """Eight swaps of three rows by brute force, with denominators that differ between the systems."""
    a = np.array([[5.0, 7.0], [1.0, 9.0], [4.0, 4.0]])
    b = np.array([[3.0, 9.0], [2.0, 5.0], [1.0, 8.0]])
    observed = abs(ratio(a.sum(0)) - ratio(b.sum(0)))
    reached = 0
    for code in range(8):
        swap = np.array([[code >> row & 1] for row in range(3)], dtype=bool)
        reached += abs(ratio(np.where(swap, b, a).sum(0)) - ratio(np.where(swap, a, b).sum(0))) >= observed - 1e-12
    assert paired_test(a, b, ratio, 20_000) == pytest.approx(reached / 8, abs=0.01)


def test_paired_bootstrap_finds_a_real_difference_and_no_false_one() -> None:
    generator = np.random.default_rng(0)
    a = blocks(generator, 113)
    better, equal = a.copy(), a.copy()
    better[:, 0] *= 0.99 + generator.normal(0, 0.02, 113)
    noise = generator.normal(0, 20, 113)
    equal[:, 0] += noise - noise.mean() + 0.1
    assert paired_bootstrap(a, better, ratio) < 0.01
    assert paired_bootstrap(a, equal, ratio) > 0.3
    assert paired_bootstrap(a, a.copy(), ratio) == 1.0
    assert paired_bootstrap(a, better, ratio) == paired_bootstrap(better, a, ratio)


def test_infinite_losses_decide_by_the_number_of_blocks_they_stand_in() -> None:
    a = blocks(np.random.default_rng(0), 50)
    one, many, both = a.copy(), a.copy(), a.copy()
    one[3, 0] = np.inf
    many[:12, 0] = np.inf
    both[:, 0] = np.inf
    assert paired_test(one, a, ratio, 999) == 1.0  # a single block proves nothing
    assert paired_test(many, a, ratio, 999) < 0.01
    assert paired_test(both, many, ratio, 999) == 1.0  # both scores are infinite
    assert paired_bootstrap(one, a, ratio) > 0.1
    assert paired_bootstrap(many, a, ratio) < 0.01
