"""An ensemble is reported as one system: it must be the mean it claims to be, in every search."""

import math
from itertools import chain

import pytest
import torch
from torch import Tensor
from toy_generator import ToyGenerator, random_sources

from unroll.decoding.beam import BeamOptions, beam_search
from unroll.decoding.conditional import LengthOptions, SampleOptions, as_targets, forced_scores, greedy, sample
from unroll.decoding.ensemble import Ensemble
from unroll.errors import UserError

INPUTS = {"tokens": random_sources(7)}
WIDE = BeamOptions(width=4, n_best=4, length_penalty=0.8)
BOTH = ["probabilities", "log_probabilities"]


def distributions(model: ToyGenerator | Ensemble, tokens: Tensor) -> Tensor:
    """The probabilities after BOS and after each of the tokens [B]: [2,B,V]."""
    memory = model.encode(INPUTS)
    first, state, _ = model.step(torch.full_like(tokens, 5), memory, model.initial_state(memory))
    return torch.stack([first, model.step(tokens, memory, state)[0]]).exp()


@pytest.mark.parametrize("average", BOTH)
def test_predictions_are_the_mean_of_the_models(average: str) -> None:
    models, tokens = [ToyGenerator(seed=seed) for seed in range(3)], torch.arange(7) % 5
    found = distributions(Ensemble(models, average), tokens)  # type: ignore[arg-type]
    every = torch.stack([distributions(model, tokens) for model in models])
    if average == "probabilities":
        expected = every.mean(0)
    else:
        expected = every.prod(0) ** (1 / 3)
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found.sum(-1)))


@pytest.mark.parametrize("average", BOTH)
def test_copies_of_one_model_are_that_model(average: str) -> None:
    model = ToyGenerator()
    copies = Ensemble([ToyGenerator(), ToyGenerator()], average)  # type: ignore[arg-type]
    expected = beam_search(model, model.encode(INPUTS), WIDE, with_attention=True)
    found = beam_search(copies, copies.encode(INPUTS), WIDE, with_attention=True)
    for one, other in zip(chain.from_iterable(found), chain.from_iterable(expected), strict=True):
        assert one.tokens == other.tokens
        assert math.isclose(one.score, other.score, abs_tol=1e-9)
        torch.testing.assert_close(torch.tensor(one.attention), torch.tensor(other.attention))


@pytest.mark.parametrize("average", BOTH)
def test_every_way_of_decoding_takes_an_ensemble(average: str) -> None:
    ensemble = Ensemble([ToyGenerator(seed=1), ToyGenerator(seed=2, width=5)], average)  # type: ignore[arg-type]
    memory = ensemble.encode(INPUTS)
    found = beam_search(ensemble, memory, WIDE)
    for row, hypotheses in enumerate(found):
        source = {name: value[row : row + 1] for name, value in memory.items()}
        forced = forced_scores(ensemble, source, as_targets([h.tokens for h in hypotheses], 6))
        torch.testing.assert_close(torch.tensor([h.log_probability for h in hypotheses]).double(), forced)
        alone = beam_search(ensemble, ensemble.encode({"tokens": INPUTS["tokens"][row : row + 1]}), WIDE)
        assert [h.tokens for h in alone[0]] == [h.tokens for h in hypotheses]
    single = beam_search(ensemble, memory, BeamOptions(width=1))
    assert [h.tokens for (h,) in single] == [h.tokens for h in greedy(ensemble, memory, LengthOptions())]
    drawn = sample(ensemble, memory, SampleOptions(count=2), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.log_probabilities, forced_scores(ensemble, memory, drawn.tokens))


class WithoutAttention(ToyGenerator):
    """A model that does not say where it looked."""

    def step(self, tokens: Tensor, memory: dict[str, Tensor], state: dict[str, Tensor]):  # type: ignore[no-untyped-def]
        return *super().step(tokens, memory, state)[:2], None


def test_attention_is_the_mean_of_those_who_have_it() -> None:
    def look(*models: ToyGenerator) -> Tensor | None:
        ensemble = Ensemble(models)
        memory = ensemble.encode(INPUTS)
        return ensemble.step(torch.full((7,), 5), memory, ensemble.initial_state(memory))[2]

    first, second = look(ToyGenerator(seed=1)), look(ToyGenerator(seed=2))
    assert first is not None
    assert second is not None
    torch.testing.assert_close(look(ToyGenerator(seed=1), ToyGenerator(seed=2)), (first + second) / 2)
    torch.testing.assert_close(look(WithoutAttention(), ToyGenerator(seed=2)), second)
    assert look(WithoutAttention()) is None


@pytest.mark.parametrize("sizes", [[], [7, 9]])
def test_models_that_do_not_fit_are_refused(sizes: list[int]) -> None:
    with pytest.raises(UserError, match="ensemble: found vocabularies of"):
        Ensemble([ToyGenerator(vocabulary=size) for size in sizes])
