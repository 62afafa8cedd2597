"""Losses over whole sequences: the model is trained on candidates of its own, weighed by what they are worth.

Paper: Edunov et al. 2018, arXiv:1711.04956; expected risk: Shen et al. 2016, 1512.02433. For a source x with candidates
U(x), cost c(u) in [0, 1] (1 - sentence BLEU, say), and score s(u) = log p(u | x) / |u|, |u| counting EOS:

    risk         sum_u c(u) q(u)                       q(u) = exp(a s(u)) / sum_u' exp(a s(u')), a = `sharpness`
    nll          -log q(u*)                            u* = the cheapest candidate
    max_margin   max(0, c(u^) - c(u*) - s(u*) + s(u^)) u^ = the candidate with the highest score
    self_critical   mean_u (c(u) - c(g)) s(u)          REINFORCE with the greedy output g as its baseline (Rennie et al.
                                                       2017, 1612.00563); the candidates must be drawn

A sentence counts as much as it has target tokens, so that the sum adds up over batches and workers as the token loss
does; the two are mixed by `token_weight` (the paper's "weighted" combination). With `encoder: false` this loss does not reach the
encoder, as in Rennie et al., who store what theirs says: the reward says little of a picture, and what is seen is not to change.

Candidates come from the model as it is at this step: the n best of a beam, or drawn. Drawn ones depend on the number of
workers, those of a beam do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from unroll.config import Strict
from unroll.decoding.beam import BeamOptions, beam_search
from unroll.decoding.conditional import (
    Decodable,
    LengthOptions,
    Longest,
    SampleOptions,
    as_targets,
    expand_rows,
    greedy,
    sample,
)
from unroll.layers.dropout import several_for_each_row
from unroll.layers.generator import ConditionalGenerator, State, bos, eos


class SequenceObjective(Strict):
    """See the top of this file. `reward`: what the cost is 1 minus of; the task knows which there are."""

    loss: Literal["risk", "nll", "max_margin", "self_critical"] = "risk"
    reward: str = "bleu"
    candidates: int = Field(5, ge=1)
    search: Literal["beam", "sample"] = "beam"
    longest: Annotated[int, Field(ge=1)] | Longest = Longest()
    temperature: float = Field(1.0, gt=0.0)
    sharpness: float = Field(1.0, gt=0.0)
    token_weight: float = Field(0.3, ge=0.0, le=1.0)
    encoder: bool = True

    @model_validator(mode="after")
    def enough(self) -> Self:
        if self.loss == "self_critical":
            if self.search == "beam":
                raise ValueError("search: self_critical needs candidates that are drawn, use sample")
        elif self.candidates < 2:
            raise ValueError(f"candidates: {self.loss} compares several, found {self.candidates}")
        return self


def candidates(model: Decodable, memory: State, options: SequenceObjective) -> tuple[Tensor, Tensor | None]:
    """Candidates of each of B sources: [B*K,T] with EOS, -1 after it; fewer different ones are repeated. For
    `self_critical` also the greedy outputs, one row for each source."""
    count, last, longest = options.candidates, eos(model.vocabulary), options.longest
    if options.search == "beam":
        found = beam_search(model, memory, BeamOptions(width=count, n_best=count, longest=longest))
        rows = [hypotheses[k % len(hypotheses)].tokens for hypotheses in found for k in range(count)]
        return as_targets(rows, last).to(memory["mask"].device), None
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    drawing = SampleOptions(count=count, temperature=options.temperature, longest=longest)
    drawn = sample(model, memory, drawing, generator).tokens
    if options.loss != "self_critical":
        return drawn, None
    best = greedy(model, memory, LengthOptions(longest=longest))
    return drawn, as_targets([hypothesis.tokens for hypothesis in best], last).to(drawn.device)


def plain_losses(model: Any, hidden: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
    """-log p of `targets` [N] given `hidden` [N,D], after `tokens` [N] were read: [N]."""
    losses: Tensor = model.output.log_loss(hidden, targets)
    return losses


TokenLosses = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def candidate_scores(
    model: ConditionalGenerator,
    memory: State,
    targets: Tensor,
    token_losses: TokenLosses = plain_losses,
    misread: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> Tensor:
    """Mean log-probability of a token of each candidate `targets` [B*K,T], with gradients: [B,K]. The model reads what
    `misread` makes of the tokens."""
    sources = len(memory["mask"])
    count = len(targets) // sources
    with several_for_each_row(count):
        opening = torch.full_like(targets[:, :1], bos(model.vocabulary))
        tokens = torch.cat([opening, targets[:, :-1].clamp_min(0)], 1)  # [B*K,T]
        output = model(misread(tokens), memory, expand_rows(model.initial_state(memory), count))
    losses = token_losses(model, output.hidden.flatten(0, 1), tokens.flatten(), targets.flatten())
    losses = losses.view_as(targets)  # [B*K,T]
    lengths = (targets >= 0).sum(1)
    return (-losses.sum(1) / lengths).view(sources, count)


def sequence_loss(scores: Tensor, costs: Tensor, options: SequenceObjective, baseline: Tensor | None = None) -> Tensor:
    """The loss of each source from scores and costs of its candidates [B,K], both -> [B]. `baseline` [B,1]: cost of the
    greedy output."""
    if options.loss == "self_critical":
        assert baseline is not None
        return ((costs - baseline) * scores).mean(1)
    best = costs.argmin(1, keepdim=True)  # [B,1]
    if options.loss == "max_margin":
        top = scores.argmax(1, keepdim=True)  # [B,1]
        margin = costs.gather(1, top) - costs.gather(1, best) - scores.gather(1, best) + scores.gather(1, top)
        return margin.clamp_min(0).squeeze(1)
    log_shares = (options.sharpness * scores).log_softmax(1)  # [B,K]
    if options.loss == "nll":
        return -log_shares.gather(1, best).squeeze(1)
    return (log_shares.exp() * costs).sum(1)
