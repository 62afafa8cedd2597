"""Sampling decides every text a user sees: wrong filtering shows as babble or as endless repetition."""

import math

import pytest
import torch
from torch import Tensor

from unroll.decoding.sampling import filter_logits, sample
from unroll.errors import UserError


def markov(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A bigram model whose state counts the steps. tokens [B] -> ([B,V], state)."""
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    return table[tokens], state + 1


def draw(temperature: float = 1.0, seed: int = 0, **options: float) -> Tensor:
    start = torch.tensor([0, 3, 5])
    generator = torch.Generator().manual_seed(seed)
    return sample(markov, torch.zeros(3), start, 20, generator, temperature, **options)  # type: ignore[arg-type]


def test_temperature_zero_follows_the_likeliest_token() -> None:
    tokens, expected = torch.tensor([0, 3, 5]), []
    for _ in range(20):
        tokens = markov(tokens, torch.zeros(3))[0].argmax(-1)
        expected.append(tokens)
    assert torch.equal(draw(0.0), torch.stack(expected, 1))
    assert torch.equal(draw(0.7, top_k=1), draw(0.0))
    assert torch.equal(draw(0.7, top_p=1e-6), draw(0.0))
    assert torch.equal(draw(1e-4), draw(0.0))


def test_the_same_generator_gives_the_same_text() -> None:
    assert torch.equal(draw(seed=4), draw(seed=4))
    assert not torch.equal(draw(seed=4), draw(seed=5))


def test_shape_and_type_of_what_is_drawn() -> None:
    drawn = draw()
    assert drawn.shape == (3, 20)
    assert drawn.dtype == torch.int64
    assert sample(markov, torch.zeros(1), torch.tensor([1]), 0, torch.Generator()).shape == (1, 0)


def test_drawn_frequencies_are_those_of_the_model() -> None:
    log_probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    draws = 20_000
    for temperature, top_k, top_p in ((1.0, None, None), (0.5, None, None), (2.0, 3, None), (1.0, None, 0.65)):
        drawn = sample(
            lambda tokens, state: (log_probabilities.expand(draws, -1), state),
            None,
            torch.zeros(draws, dtype=torch.int64),
            1,
            torch.Generator().manual_seed(1),
            temperature,
            top_k,
            top_p,
        )
        probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64) ** (1 / temperature)
        kept = {None: 4, 3: 3}[top_k] if top_p is None else 2
        probabilities[kept:] = 0
        expected = probabilities / probabilities.sum() * draws
        counts = torch.bincount(drawn[:, 0], minlength=4)
        assert int(counts[kept:].sum()) == 0
        distance = ((counts - expected).square() / expected)[:kept].sum()  # chi-squared, of kept - 1 degrees
        assert torch.special.gammaincc(torch.tensor((kept - 1) / 2, dtype=torch.float64), distance / 2) > 1e-4


def brute_force(row: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """The definition, token by token, in float64: probabilities left after filtering."""
    weights = [math.exp(value / temperature) for value in row]
    order = sorted(range(len(row)), key=lambda token: (-weights[token], token))
    if top_k is not None:
        order = order[:top_k]
    total = sum(weights[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if top_p is not None and mass >= top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(row))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, 50])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.5, 0.9, 1.0])
def test_filtering_against_its_definition(temperature: float, top_k: int | None, top_p: float | None) -> None:
    rows = torch.randn(16, 11)
    found = filter_logits(rows, temperature, top_k, top_p).exp()
    expected = torch.tensor([brute_force(row.tolist(), temperature, top_k, top_p) for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_ties_keep_the_first_tokens_and_the_input_is_left_alone() -> None:
    rows = torch.zeros(2, 5)
    assert filter_logits(rows, 1.0, top_k=2).isfinite().tolist() == [[True, True, False, False, False]] * 2
    assert filter_logits(rows, 0.0).exp().tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]] * 2
    assert torch.equal(rows, torch.zeros(2, 5))


def test_tokens_the_model_excludes_are_never_drawn() -> None:
    rows = torch.tensor([[0.0, -math.inf, 1.0]])
    for options in ((1.0, None, None), (1.0, 3, None), (1.0, None, 1.0)):
        found = filter_logits(rows, *options)
        assert found[0, 1] == -math.inf
        assert not found.isnan().any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature: found -0.1"),
        ({"temperature": math.nan}, "temperature: found nan"),
        ({"temperature": math.inf}, "temperature: found inf"),
        ({"top_k": 0}, "top_k: found 0"),
        ({"top_k": 2.5}, "top_k: found 2.5"),
        ({"top_p": 0.0}, "top_p: found 0.0"),
        ({"top_p": 1.1}, "top_p: found 1.1"),
    ],
)
def test_values_that_cannot_be_sampled_with_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        draw(**options)
    with pytest.raises(UserError, match=words):
        filter_logits(torch.zeros(1, 3), **options)  # type: ignore[arg-type]
