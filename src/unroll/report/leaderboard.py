"""The leaderboard: systems scored on the same test set, ranked, with a test of every pair.

Significance: approximate randomisation over the blocks or sentences (`metrics/bootstrap.py`) for every pair of systems
scored on the same ones in the same way, corrected for the number of pairs by Holm's step-down method; the paired
bootstrap stands beside it uncorrected. The tests speak of this text and these trained weights, not of the luck of the seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unroll.config import load_part
from unroll.metrics.bootstrap import paired_bootstrap, paired_test
from unroll.report.inputs import MetricValue, Result, System, read_results, read_system

LEVEL = 0.05  # pairs with a smaller corrected p-value differ
Pair = tuple[str, str]  # two recipes, in the order of the ranking


@dataclass(frozen=True)
class Group:
    """Systems on one test set by one metric, best first. `p_values` are corrected for all its pairs; those of the
    paired bootstrap are as they came out, to stand beside what sacrebleu prints."""

    dataset: str
    split: str
    metric: str
    lower_is_better: bool
    definition: str
    systems: list[System]
    p_values: dict[Pair, float]
    bootstrap_p_values: dict[Pair, float]

    @property
    def unit(self) -> str:
        return next((score.unit for score in self.scores if score), self.metric)

    @property
    def scores(self) -> list[MetricValue | None]:
        return [system.result.score for system in self.systems]

    @property
    def ranked(self) -> list[System]:
        """The systems that have a score."""
        return [system for system in self.systems if system.result.score]

    def p_value(self, a: System, b: System) -> float | None:
        """Corrected p-value of a pair in either order; None where the pair was not tested."""
        return _of_pair(self.p_values, a, b)

    def bootstrap_p_value(self, a: System, b: System) -> float | None:
        """p-value of a pair by the paired bootstrap, not corrected."""
        return _of_pair(self.bootstrap_p_values, a, b)

    def standing(self, system: System) -> str:
        """Against the best: "best", "tied" (not significantly different), "worse", or "untested"."""
        if system is self.systems[0]:
            return "best" if system.result.score else "untested"
        p_value = self.p_value(self.systems[0], system)
        if p_value is None:
            return "untested"
        return "worse" if p_value < LEVEL else "tied"


@dataclass(frozen=True)
class Leaderboard:
    """All groups of a suite; `unscored` are systems without results or without a score, with the reason."""

    suite: str
    groups: list[Group]
    unscored: dict[str, str]

    @property
    def systems(self) -> list[System]:
        return [system for group in self.groups for system in group.systems]


def load(suite: str, results: Path, evaluations: Path, expected: Sequence[str] = ()) -> Leaderboard:
    """Read and rank one suite.

    Args:
        suite: its name.
        results: the suite's folder of results.
        evaluations: the suite's folder of evaluation files.
        expected: recipes that the suite should hold; those without results are listed as unscored.

    Raises:
        UserError: the suite is unknown or empty, or a file is damaged.
    """
    systems = [read_system(result, evaluations / result.recipe) for result in read_results(results)]
    unscored = {system.result.recipe: system.missing[0] for system in systems if system.result.score is None}
    there = {system.result.recipe for system in systems}
    folders = [path.name for path in evaluations.glob("*/") if not path.name.startswith(".")]
    for recipe in sorted({*expected, *folders} - there):
        unscored[recipe] = "No results yet. Train, predict and evaluate it."
    return Leaderboard(suite, _groups(systems), unscored)


def rank(results: Sequence[Result], lower_is_better: bool) -> list[Result]:
    """Best first; without a score last; equal scores by name."""

    def key(result: Result) -> tuple[bool, float, str]:
        score = result.score
        if score is None or math.isnan(score.value):
            return True, 0.0, result.recipe
        return False, score.value if lower_is_better else -score.value, result.recipe

    return sorted(results, key=key)


def direction(metric: str) -> tuple[bool, str]:
    """Whether a lower value of the metric is better, and its definition: the first line of its file."""
    module = load_part("metrics", metric, "results")
    return module.lower_is_better, module.__doc__.splitlines()[0].rstrip(".")


def holm(p_values: Mapping[Pair, float]) -> dict[Pair, float]:
    """Holm's step-down correction: the k-th smallest of m is multiplied by m - k + 1, kept rising and at most 1."""
    corrected: dict[Pair, float] = {}
    largest = 0.0
    for position, pair in enumerate(sorted(p_values, key=lambda pair: (p_values[pair], pair))):
        largest = max(largest, min(1.0, p_values[pair] * (len(p_values) - position)))
        corrected[pair] = largest
    return corrected


def group_by_test_set(results: Sequence[Result]) -> dict[tuple[str, str, str], list[Result]]:
    """Results that compare: one test set (name, split), one primary metric; in the order of these names."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((*result.tested_on, result.primary), []).append(result)
    return dict(sorted(groups.items()))


def signatures(results: Sequence[Result]) -> dict[str, list[Result]]:
    """How the primary scores were computed, each way with its results; where there are several they hardly compare."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.score:
            found.setdefault(result.score.signature.partition("|bootstrap:")[0], []).append(result)
    return found


def _groups(systems: Sequence[System]) -> list[Group]:
    by_recipe = {system.result.recipe: system for system in systems}
    groups = []
    for (dataset, split, metric), results in group_by_test_set([system.result for system in systems]).items():
        lower_is_better, definition = direction(metric)
        ranked = [by_recipe[result.recipe] for result in rank(results, lower_is_better)]
        tested, resampled = _pairs(ranked, metric)
        groups.append(Group(dataset, split, metric, lower_is_better, definition, ranked, holm(tested), resampled))
    return groups


def _of_pair(p_values: Mapping[Pair, float], a: System, b: System) -> float | None:
    names = (a.result.recipe, b.result.recipe)
    return p_values.get(names, p_values.get((names[1], names[0])))


def _pairs(ranked: Sequence[System], metric: str) -> tuple[dict[Pair, float], dict[Pair, float]]:
    """p-values by randomisation and by bootstrap of all pairs whose statistics compare."""
    tested, resampled = {}, {}
    for a, b in itertools.combinations(ranked, 2):
        if not (a.result.score and b.result.score and metric in a.statistics and metric in b.statistics):
            continue
        first, second = a.statistics[metric], b.statistics[metric]
        if first.comparable(second):
            score = load_part("metrics", metric, "results").score
            pair = (a.result.recipe, b.result.recipe)
            tested[pair] = paired_test(first.values, second.values, score)
            resampled[pair] = paired_bootstrap(first.values, second.values, score)
    return tested, resampled
