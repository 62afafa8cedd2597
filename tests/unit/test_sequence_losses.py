"""Losses over candidates against the paper's formulas written out, and what their gradients do to a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from unroll.config import load_part
from unroll.decoding.conditional import forced_scores
from unroll.layers.dropout import draw_mask, dropout_place, several_for_each_row
from unroll.losses.sequence import SequenceObjective, candidate_scores, candidates, sequence_loss

SCORES = [[-0.5, -1.0, -2.0], [-3.0, -0.1, -0.2]]
COSTS = [[0.9, 0.2, 0.5], [0.3, 0.3, 0.8]]


def written_out(kind: str, scores: list[float], costs: list[float], sharpness: float) -> float:
    best = min(range(len(costs)), key=lambda u: costs[u])
    top = max(range(len(scores)), key=lambda u: scores[u])
    if kind == "max_margin":
        return max(0.0, costs[top] - costs[best] - scores[best] + scores[top])
    total = sum(math.exp(sharpness * s) for s in scores)
    shares = [math.exp(sharpness * s) / total for s in scores]
    if kind == "nll":
        return -math.log(shares[best])
    return sum(share * cost for share, cost in zip(shares, costs, strict=True))


@pytest.mark.parametrize("sharpness", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["risk", "nll", "max_margin"])
def test_losses_equal_the_formulas(kind: Any, sharpness: float) -> None:
    options = SequenceObjective(loss=kind, sharpness=sharpness)
    found = sequence_loss(torch.tensor(SCORES), torch.tensor(COSTS), options)
    expected = [written_out(kind, s, c, sharpness) for s, c in zip(SCORES, COSTS, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def tiny_model(dropout: float = 0.0) -> Any:
    module = load_part("models", "seq2seq", "test")
    torch.manual_seed(2)
    config = module.Config(embedding=8, width=8, decoder_width=8, tied="all", dropout={"output": dropout})
    return module.Model(config, {"source": 12, "target": 12}).double()


def sources() -> dict[str, Tensor]:
    return {"source": torch.tensor([[1, 2, 3, 11], [4, 5, 11, 11]]), "source_lengths": torch.tensor([4, 3])}


@pytest.mark.parametrize("search", ["beam", "sample"])
def test_a_candidate_scores_what_decoding_says(search: Any) -> None:
    model = tiny_model().eval()
    memory = model.encode(sources())
    with torch.no_grad():
        found, _ = candidates(model, memory, SequenceObjective(candidates=4, search=search))  # [8,T]
        expected = forced_scores(model, memory, found) / (found >= 0).sum(1)
        scores = candidate_scores(model, memory, found)
    assert scores.shape == (2, 4)
    torch.testing.assert_close(scores.flatten(), expected)
    if search == "beam":
        assert len({tuple(row) for row in found[:4].tolist()}) == 4


def test_a_candidate_is_scored_by_what_its_reader_makes_of_it() -> None:
    model = tiny_model().eval()
    memory = model.encode(sources())
    with torch.no_grad():
        found, _ = candidates(model, memory, SequenceObjective(candidates=2))
        plain = candidate_scores(model, memory, found)
        misread = candidate_scores(model, memory, found, misread=lambda tokens: torch.full_like(tokens, 3))
        other = candidate_scores(model, memory, found, misread=lambda tokens: tokens.clone())
    assert torch.equal(plain, other)
    assert (plain != misread).all()


def test_the_risk_falls_when_it_is_minimised() -> None:
    """The task: sentences that hold token 3. The candidates are the model's own at each step."""
    model, options = tiny_model(), SequenceObjective(loss="risk", candidates=6, search="sample")
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    risks = []
    for _ in range(40):
        memory = model.encode(sources())
        with torch.no_grad():
            found, _ = candidates(model, memory, options)
        costs = 1 - (found == 3).any(1).double().view(2, 6)
        risk = sequence_loss(candidate_scores(model, memory, found), costs, options).mean()
        optimizer.zero_grad()
        risk.backward()
        optimizer.step()
        risks.append(float(costs.mean()))
    assert sum(risks[-5:]) / 5 < 0.5 * sum(risks[:5]) / 5


def test_dropout_knows_the_place_of_each_candidate() -> None:
    """Two workers with a row each draw the masks that one worker draws for both."""

    def masks(first: int, rows: int) -> Tensor:
        with dropout_place(1, 7, first, 2), several_for_each_row(3):
            return draw_mask((rows * 3, 5), 0.5, True, torch.device("cpu"), torch.float32)

    together = masks(0, 2)
    torch.testing.assert_close(together, torch.cat([masks(0, 1), masks(1, 1)]))
    assert len({tuple(row) for row in together.tolist()}) > 3


def test_self_critical_weighs_draws_against_the_greedy_output() -> None:
    options = SequenceObjective(loss="self_critical", search="sample", candidates=3)
    found = sequence_loss(torch.tensor(SCORES), torch.tensor(COSTS), options, torch.tensor([[0.4], [0.8]]))
    rows = zip(SCORES, COSTS, (0.4, 0.8), strict=True)
    expected = [sum((c - greedy) * s for s, c in zip(scores, costs, strict=True)) / 3 for scores, costs, greedy in rows]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_self_critical_draws_and_compares_with_nothing_else() -> None:
    for wrong, message in (({"search": "beam"}, "use sample"), ({"loss": "risk", "candidates": 1}, "compares several")):
        with pytest.raises(ValueError, match=message):
            SequenceObjective(**{"loss": "self_critical", "search": "sample", **wrong})
