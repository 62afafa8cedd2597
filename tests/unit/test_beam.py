"""Every translation, caption and transcript comes out of these searches: each is held against its definition."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_generator import State, ToyGenerator, random_sources

from unroll.config import check
from unroll.decoding.beam import BeamOptions, beam_search, expand, top
from unroll.decoding.conditional import (
    Hypothesis,
    LengthOptions,
    Longest,
    SampleOptions,
    as_targets,
    forced_scores,
    greedy,
    sample,
)
from unroll.errors import UserError


def memory_of(model: ToyGenerator, tokens: Tensor) -> State:
    return model.encode({"tokens": tokens})


def same(found: Hypothesis, expected: Hypothesis) -> bool:
    return found.tokens == expected.tokens and math.isclose(found.score, expected.score, abs_tol=1e-9)


def ranked_by_force(model: ToyGenerator, source: Tensor, options: BeamOptions, longest: int) -> list[Hypothesis]:
    """Every sequence up to the limit, scored through `step` and ranked by equation 14, written out here once more."""
    memory = memory_of(model, source[None])
    words = range(model.vocabulary - 2)
    sequences = [s for n in range(options.shortest, longest + 1) for s in itertools.product(words, repeat=n)]
    totals = forced_scores(model, memory, as_targets(sequences, model.vocabulary - 1)).tolist()
    hypotheses = []
    for tokens, total in zip(sequences, totals, strict=True):
        score = total / ((5 + len(tokens) + 1) / 6) ** options.length_penalty
        if options.coverage_penalty:
            state, looked = model.initial_state(memory), torch.zeros(len(source), dtype=torch.float64)
            for token in [model.vocabulary - 2, *tokens]:
                _, state, attention = model.step(torch.tensor([token]), memory, state)
                looked += attention[0]
            seen = [min(1.0, float(value)) for value, word in zip(looked, source, strict=True) if word >= 0]
            score += options.coverage_penalty * sum(math.log(value) for value in seen)
        hypotheses.append(Hypothesis(list(tokens), score, total))
    return sorted(hypotheses, key=lambda h: -h.score)


# --- beam search against its definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [{}, {"length_penalty": 1.0}, {"length_penalty": 3.0}, {"coverage_penalty": 0.4},
     {"length_penalty": 0.8, "coverage_penalty": 1.5, "shortest": 2}],
    ids=str,
)  # fmt: skip
def test_a_beam_wide_enough_finds_what_brute_force_finds(seed: int, options: dict[str, float]) -> None:
    model, longest = ToyGenerator(vocabulary=5, seed=seed, sharpness=2.0), 4
    wide = BeamOptions(width=3**longest * 2, n_best=12, longest=longest, exact=True, **options)  # type: ignore[arg-type]
    sources = random_sources(3, seed=seed)
    for source, found in zip(sources, beam_search(model, memory_of(model, sources), wide), strict=True):
        expected = ranked_by_force(model, source, wide, longest)[:12]
        assert len(found) == 12
        assert all(same(*pair) for pair in zip(found, expected, strict=True))


def test_a_source_stops_before_the_limit_but_never_too_early() -> None:
    """With n_best = width nothing is cut short, and the best must be the same."""
    early = late = 0
    for seed in range(10):
        model = ToyGenerator(seed=seed, end=1.0)
        memory = memory_of(model, random_sources(4, seed=seed))
        first = beam_search(model, memory, BeamOptions(width=4, n_best=1, length_penalty=1.0, longest=30, exact=True))
        early, model.rows = early + model.rows, 0
        every = beam_search(model, memory, BeamOptions(width=4, n_best=4, length_penalty=1.0, longest=30, exact=True))
        late += model.rows
        assert all(same(one[0], several[0]) for one, several in zip(first, every, strict=True))
    assert early < 0.9 * late


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_search_that_is_not_exact_takes_fewer_steps_and_finds_nothing_better(penalty: float) -> None:
    """Where length counts nothing both rules are the same one."""
    rows, equal = {True: 0, False: 0}, 0
    for seed in range(10):
        model = ToyGenerator(seed=seed, end=1.0)
        memory = memory_of(model, random_sources(4, seed=seed))
        found = {}
        for exact in rows:
            model.rows = 0
            options = BeamOptions(width=4, length_penalty=penalty, longest=30, exact=exact)
            found[exact] = beam_search(model, memory, options)
            rows[exact] += model.rows
        for [one], [other] in zip(found[True], found[False], strict=True):
            assert other.score <= one.score
            equal += same(one, other)
    assert equal == 40 if penalty == 0 else equal > 20
    assert rows[False] == rows[True] if penalty == 0 else rows[False] < 0.8 * rows[True]


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_of_one_is_greedy(seed: int) -> None:
    model = ToyGenerator(seed=seed, sharpness=1.0 + seed)
    memory = memory_of(model, random_sources(9, seed=seed))
    prefix = torch.tensor([[1, 2]] + [[0, -1]] * 4 + [[-1, -1]] * 4)
    for options in ({}, {"shortest": 5}, {"longest": 3}):
        beam = BeamOptions(width=1, **options)
        for given in (None, prefix):
            expected = greedy(model, memory, beam, given, with_attention=True)
            found = beam_search(model, memory, beam, given, with_attention=True)
            for (one,), other in zip(found, expected, strict=True):
                assert same(one, other)
                np.testing.assert_allclose(one.attention, other.attention, rtol=1e-6)  # type: ignore[arg-type]


def test_a_wider_beam_finds_likelier_hypotheses() -> None:
    model = ToyGenerator(vocabulary=12)
    memory = memory_of(model, random_sources(40))
    means = [
        np.mean([found[0].log_probability for found in beam_search(model, memory, BeamOptions(width=width, longest=8))])
        for width in (1, 2, 8)
    ]
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("penalties", [{}, {"length_penalty": 0.6, "coverage_penalty": 0.2}])
def test_scores_are_forced_scores_and_hypotheses_are_sorted_and_distinct(penalties: dict[str, float]) -> None:
    model = ToyGenerator(vocabulary=70)  # more than one block of the vocabulary
    memory = memory_of(model, random_sources(8))
    found = beam_search(model, memory, BeamOptions(width=6, n_best=6, longest=9, **penalties))  # type: ignore[arg-type]
    for source, hypotheses in enumerate(found):
        row = {name: value[source : source + 1] for name, value in memory.items()}
        targets = as_targets([h.tokens for h in hypotheses], model.vocabulary - 1)
        forced = forced_scores(model, row, targets)
        np.testing.assert_allclose([h.log_probability for h in hypotheses], forced, atol=1e-9)
        scores = [h.score for h in hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(h.tokens) for h in hypotheses}) == len(hypotheses) == 6
        if not penalties:
            assert scores == [h.log_probability for h in hypotheses]


@pytest.mark.parametrize("seed", range(3))
def test_results_do_not_depend_on_the_batch(seed: int) -> None:
    model, sources = ToyGenerator(vocabulary=9, seed=seed), random_sources(12, seed=seed)
    options = BeamOptions(width=4, n_best=3, length_penalty=0.7, coverage_penalty=0.1)
    prefix = torch.tensor([[2, 0, 1]] + [[-1, -1, -1]] * 10 + [[4, -1, -1]])
    together = beam_search(model, memory_of(model, sources), options, prefix, with_attention=True)
    for row, found in enumerate(together):
        length = int((sources[row] >= 0).sum())
        alone = memory_of(model, sources[row : row + 1, :length])
        (expected,) = beam_search(model, alone, options, prefix[row : row + 1], with_attention=True)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert same(one, other)
            np.testing.assert_allclose(one.attention, other.attention, atol=1e-9)  # type: ignore[arg-type]
        assert greedy(model, alone, options)[0].tokens == greedy(model, memory_of(model, sources), options)[row].tokens


# --- what a user asks for ---------------------------------------------------------------------------------------------


def test_a_prefix_is_kept_and_costs_what_it_costs() -> None:
    model = ToyGenerator()
    memory = memory_of(model, random_sources(4))
    prefix = torch.tensor([[3, 1, 4], [0, -1, -1], [-1, -1, -1], [2, 2, -1]])
    found = beam_search(model, memory, BeamOptions(width=4, n_best=2, longest=2), prefix)
    plain = beam_search(model, memory, BeamOptions(width=4, n_best=2, longest=2))
    for row, hypotheses in enumerate(found):
        wanted = [token for token in prefix[row].tolist() if token >= 0]
        assert len(hypotheses) == (1 if row in (0, 3) else 2)  # as long as the limit or longer: prefix and EOS
        source = {name: value[row : row + 1] for name, value in memory.items()}
        for hypothesis in hypotheses:
            assert hypothesis.tokens[: len(wanted)] == wanted
            forced = forced_scores(model, source, as_targets([hypothesis.tokens], 6))
            assert hypothesis.log_probability == pytest.approx(forced.item(), abs=1e-9)
    assert all(same(*pair) for pair in zip(found[2], plain[2], strict=True))


def test_lengths_stay_within_bounds_and_bos_never_comes() -> None:
    for seed in range(6):
        model = ToyGenerator(seed=seed, end=2.0)
        model.output[-2] += 3  # a model that likes BOS and EOS
        sources = random_sources(10, seed=seed)
        memory = memory_of(model, sources)
        options = BeamOptions(width=3, n_best=3, shortest=3, longest=Longest(per_source=1.5, plus=1))
        samples = sample(model, memory, SampleOptions(count=3, **options.model_dump(include={"shortest", "longest"})),
                         torch.Generator().manual_seed(seed)).tokens  # fmt: skip
        for row, found in enumerate(beam_search(model, memory, options)):
            limit = max(3, math.floor(1.5 * int((sources[row] >= 0).sum())) + 1)
            tokens = [h.tokens for h in found] + [greedy(model, memory, options)[row].tokens]
            tokens += [[t for t in s if t not in (-1, 6)] for s in samples[3 * row : 3 * row + 3].tolist()]
            assert all(3 <= len(t) <= limit for t in tokens)
            assert all(0 <= token < 5 for t in tokens for token in t)


def test_attention_has_a_row_a_token_and_no_padding() -> None:
    model, sources = ToyGenerator(), random_sources(5)
    for row, found in enumerate(beam_search(model, memory_of(model, sources), BeamOptions(), with_attention=True)):
        picture = found[0].attention
        assert picture is not None
        assert picture.shape == (len(found[0].tokens), int((sources[row] >= 0).sum()))
        np.testing.assert_allclose(picture.sum(1), 1.0, atol=1e-6)
    empty = BeamOptions(longest=0)
    assert beam_search(model, memory_of(model, sources), empty, with_attention=True)[0][0].attention.shape[0] == 0  # type: ignore[union-attr]
    assert greedy(model, memory_of(model, sources), empty, with_attention=True)[0].attention.shape[0] == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ([[5], [1]], "prefix of source 0: found 5, allowed are tokens 0 to 4"),
        ([[1, 2], [-1, 3]], "prefix of source 1: found 3"),
        ([[1], [-2]], "prefix of source 1: found -2"),
        ([[1]], r"prefix: found shape \(1, 1\), needed is one row for each of 2 sources"),
    ],
)
def test_prefixes_that_cannot_be_generated_are_refused(prefix: list[list[int]], words: str) -> None:
    model = ToyGenerator()
    memory = memory_of(model, random_sources(2))
    with pytest.raises(UserError, match=words):
        beam_search(model, memory, BeamOptions(), torch.tensor(prefix))
    with pytest.raises(UserError, match=words):
        greedy(model, memory, LengthOptions(), torch.tensor(prefix))


@pytest.mark.parametrize(
    "wrong", [{"width": 0}, {"n_best": 6}, {"length_penalty": -1.0}, {"longest": -1}, {"longest": {"plus": -1}}]
)
def test_options_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        check(BeamOptions, wrong, "predict")


class Broken(ToyGenerator):
    """A model that is sure of nothing, with some value in place of its log-probabilities, and without attention."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def step(self, tokens: Tensor, memory: State, state: State) -> tuple[Tensor, State, Tensor | None]:
        log_probabilities, state, _ = super().step(tokens, memory, state)
        return torch.full_like(log_probabilities, self.value), state, None


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_model_without_probabilities_is_named(value: float) -> None:
    model = Broken(value)
    memory = memory_of(model, random_sources(3))
    with pytest.raises(UserError, match="decoding: the model gives"):
        beam_search(model, memory, BeamOptions())
    with pytest.raises(UserError, match="decoding: the model gives"):
        greedy(model, memory, BeamOptions(longest=4))
    with pytest.raises(UserError, match="decoding: the model gives"):
        sample(model, memory, SampleOptions(), torch.Generator())


def test_coverage_needs_attention() -> None:
    model = Broken(-1.0)
    with pytest.raises(UserError, match="no attention"):
        beam_search(model, memory_of(model, random_sources(2)), BeamOptions(coverage_penalty=0.1))
    with pytest.raises(UserError, match="no attention"):
        greedy(model, memory_of(model, random_sources(2)), BeamOptions(), with_attention=True)


def test_equally_likely_hypotheses_come_in_order_of_their_tokens() -> None:
    model = Broken(-1.0)
    (found,) = beam_search(
        model, memory_of(model, random_sources(1)), BeamOptions(width=4, n_best=4, shortest=2, longest=2)
    )
    assert [h.tokens for h in found] == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert greedy(model, memory_of(model, random_sources(1)), BeamOptions(shortest=2, longest=2))[0].tokens == [0, 0]


# --- choosing continuations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [3, 5, 63, 64, 65, 66, 67, 128, 129, 130, 200])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("may_end", [True, False])
def test_continuations_against_sorting_everything(vocabulary: int, width: int, may_end: bool) -> None:
    scores = torch.randint(-9, 0, (3 * width, vocabulary)).float()  # many ties
    scores[:, -2:] += 5
    totals = torch.randint(-3, 0, (3, width)).double()
    totals[1, 1:] = -torch.inf
    count = min(5, width * vocabulary)
    best, parents, tokens = expand(scores, totals, count, may_end)
    for source in range(3):
        every = [
            (-(float(totals[source, k]) + float(scores[source * width + k, v])), k, v)
            for k in range(width)
            for v in range(vocabulary)
            if v != vocabulary - 2 and (may_end or v != vocabulary - 1)
        ]
        expected = [entry for entry in sorted(every)[:count] if entry[0] < math.inf]
        found = list(zip((-best[source]).tolist(), parents[source].tolist(), tokens[source].tolist(), strict=True))
        assert found[: len(expected)] == expected
        assert (best[source, len(expected) :] == -torch.inf).all()
        assert bool(((tokens >= 0) & (tokens < vocabulary)).all())


@pytest.mark.parametrize("equal", [True, False])
def test_top_takes_the_first_of_equal_values(equal: bool) -> None:
    values = torch.randint(0, 4, (50, 30)).double() if equal else torch.randn(50, 30).double()
    values[:, ::7] = -torch.inf
    for count in (1, 5, 30):
        best, indices = top(values, count)
        expected = values.sort(dim=1, descending=True, stable=True)
        assert torch.equal(best, expected.values[:, :count])
        assert torch.equal(indices, expected.indices[:, :count])


# --- drawing and scoring ----------------------------------------------------------------------------------------------


def test_samples_are_reproducible_and_scored_as_the_model_scores_them() -> None:
    model = ToyGenerator(end=1.0)
    memory = memory_of(model, random_sources(6))
    for options in (SampleOptions(count=4), SampleOptions(count=4, temperature=0.6, top_k=3), SampleOptions(top_p=0.8)):
        first, again, other = (
            sample(model, memory, options, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
        )
        assert torch.equal(first.tokens, again.tokens)
        assert not torch.equal(first.tokens, other.tokens)
        forced = forced_scores(model, memory, first.tokens)
        torch.testing.assert_close(first.log_probabilities, forced, atol=1e-9, rtol=0)
        for row in first.tokens.tolist():
            end = row.index(6)
            assert all(0 <= token < 5 for token in row[:end])
            assert set(row[end + 1 :]) <= {-1}


def test_samples_are_as_frequent_as_they_are_likely() -> None:
    model, count = ToyGenerator(vocabulary=4, sharpness=1.0), 20_000
    memory = memory_of(model, random_sources(1))
    options = SampleOptions(count=count, longest=2)
    drawn = sample(model, memory, options, torch.Generator().manual_seed(0)).tokens
    sequences = [list(s) for n in range(3) for s in itertools.product(range(2), repeat=n)]
    counts = [int((drawn[:, : len(s)] == torch.tensor(s)).all(1).logical_and(drawn[:, len(s)] == 3).sum())
              for s in sequences]  # fmt: skip
    assert sum(counts) == count
    # the probability of a sequence without BOS; the EOS that the limit forces is certain
    for tokens, seen in zip(sequences, counts, strict=True):
        state, probability = model.initial_state(memory), 1.0
        for step, (last, token) in enumerate(zip([2, *tokens], [*tokens, 3], strict=True)):
            log_probabilities, state, _ = model.step(torch.tensor([last]), memory, state)
            allowed = log_probabilities[0].exp() * torch.tensor([1, 1, 0, 1])
            probability *= 1.0 if step == 2 else float(allowed[token] / allowed.sum())
        assert seen == pytest.approx(count * probability, abs=5 * math.sqrt(count * probability))


def test_drawing_at_temperature_zero_is_greedy_and_keeps_the_prefix() -> None:
    model = ToyGenerator()
    memory = memory_of(model, random_sources(5))
    prefix = torch.tensor([[1, 2]] + [[3, -1]] * 4)
    cold = sample(model, memory, SampleOptions(count=2, temperature=0.0), torch.Generator(), prefix)
    expected = greedy(model, memory, LengthOptions(), prefix)
    for row, tokens in enumerate(cold.tokens.tolist()):
        assert tokens[: tokens.index(6)] == expected[row // 2].tokens
    warm = sample(model, memory, SampleOptions(count=2), torch.Generator(), prefix)
    assert warm.tokens[:2, :2].tolist() == [[1, 2]] * 2
    assert warm.tokens[2:, 0].tolist() == [3] * 8


def test_forced_scores_carry_gradients_and_skip_padding() -> None:
    model = ToyGenerator()
    memory = memory_of(model, random_sources(2))
    targets = torch.tensor([[1, 2, 6], [1, 6, -1], [0, 0, 0], [6, -1, -1]])
    scores = forced_scores(model, memory, targets)
    longer = forced_scores(model, memory, torch.nn.functional.pad(targets, (0, 2), value=-1))
    assert torch.equal(scores, longer)
    one = forced_scores(model, {name: value[1:] for name, value in memory.items()}, torch.tensor([[6]]))
    assert scores[3] == pytest.approx(float(one))
    model.output.requires_grad_()
    forced_scores(model, memory, targets).sum().backward()
    assert model.output.grad is not None
    assert float(model.output.grad.abs().sum()) > 0
