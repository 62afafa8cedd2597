"""Drawing text from any model that predicts one token at a time.

Temperature divides the log-probabilities; top-k keeps the k likeliest tokens (Fan et al. 2018, arXiv:1805.04833);
top-p keeps the smallest set of likeliest tokens that holds a mass of at least p (Holtzman et al. 2020,
arXiv:1904.09751). They are applied in this order, each to what the one before left, renormalised. Temperature 0 is
greedy decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from unroll.errors import UserError

State = TypeVar("State")
Step = Callable[[Tensor, State], tuple[Tensor, State]]


def check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse what cannot be sampled with.

    Raises:
        UserError: temperature negative or not finite, top_k below 1, top_p outside ]0, 1].
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature: found {temperature}, allowed is a number >= 0 (0 = the likeliest token)")
    if top_k is not None and (int(top_k) != top_k or top_k < 1):
        raise UserError(f"top_k: found {top_k}, allowed is a whole number >= 1, or none")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p: found {top_p}, allowed is a number above 0 and up to 1, or none")


def filter_logits(
    log_probabilities: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Log-probabilities to draw from. [B,V] -> [B,V], normalised; -inf for what is filtered out.

    The input need not be normalised. Of equally likely tokens the one with the lower number is kept first.

    Raises:
        UserError: see `check_options`.
    """
    check_options(temperature, top_k, top_p)
    if temperature == 0:
        temperature, top_k = 1.0, 1
    logits = log_probabilities.float() / temperature  # [B,V]
    if top_k is None and top_p is None:
        return logits.log_softmax(-1)
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)  # [B,V]
    if top_k is not None:
        ordered[:, int(top_k) :] = -math.inf
    if top_p is not None:
        probabilities = ordered.softmax(-1)  # [B,V]
        before = probabilities.cumsum(-1) - probabilities  # [B,V] mass of the likelier tokens
        before[:, 0] = 0.0  # rounding must not remove the likeliest
        ordered = ordered.masked_fill(before >= top_p, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, tokens, ordered.log_softmax(-1))


@torch.no_grad()
def sample(
    step: Step[State],
    state: State,
    tokens: Tensor,
    length: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """`length` tokens after `tokens` [B], which follow what `state` has read. -> [B,length], int64.

    `step(tokens [B], state) -> (log_probabilities [B,V], state)`. The same generator state gives the same tokens.

    Raises:
        UserError: see `check_options`.
    """
    check_options(temperature, top_k, top_p)
    drawn = tokens.new_zeros((len(tokens), length), dtype=torch.int64)  # [B,length]
    for position in range(length):
        log_probabilities, state = step(tokens, state)  # [B,V]
        if temperature == 0:
            tokens = log_probabilities.argmax(-1)  # [B]
        else:
            probabilities = filter_logits(log_probabilities, temperature, top_k, top_p).exp()  # [B,V]
            chosen = torch.multinomial(probabilities.to(generator.device), 1, generator=generator)  # [B,1]
            tokens = chosen.squeeze(1).to(drawn.device)  # [B]
        drawn[:, position] = tokens
    return drawn
