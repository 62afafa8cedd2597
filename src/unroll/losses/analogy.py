"""Pairs of words that training lacks and analogy allows, which a loss had better not teach a model to avoid.

A decoder that is shown "red star" in no caption learns that "star" never follows "red", and then contradicts what it
sees: the words before and the colour in the picture both tell it so. Which pairs are merely missing is known from the
captions alone, by similarity of words (Dagan, Lee & Pereira 1999, "Similarity-based models of word cooccurrence
probabilities"). With n(u, w) the pairs of neighbours, BOS and EOS included, and rows and columns of n made to sum to 1:

    like(u, u')  = min(sum_w sqrt(p(w|u) p(w|u')), sum_w sqrt(q(w|u) q(w|u')))    p: what follows, q: what precedes
    p'(w | u)    = sum_u' [like >= 0.4] like(u, u') p(w|u') / sum_u' [like >= 0.4] like(u, u')       u' /= u
    missing      = n(u, w) = 0  and  p'(w | u) > 0.01

Words of one kind (colours) are alike as the same words stand before and after them; grammar is not: "of" is followed by
articles alone, and no word like it by anything else.

The loss leaves missing pairs out of the softmax where the word before is read, as no caption there could have had them:
they are neither punished nor favoured. The word before is half of it: at a star a model learns never to say "red" either,
because no star was. So words that are missing before the one that follows can be left out too. Decoding is as always.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unroll.layers.generator import bos, eos

ALIKE = 0.4
LIKELY = 0.01


def missing_pairs(captions: Iterable[Sequence[int] | np.ndarray], vocabulary: int) -> Tensor:
    """Whether a pair of words is missing by chance, from `captions` as word numbers: bool [V,V], first word by second."""
    counts = np.zeros((vocabulary, vocabulary))  # [V,V]
    for words in captions:
        line = [bos(vocabulary), *words, eos(vocabulary)]
        np.add.at(counts, (line[:-1], line[1:]), 1)
    follow, precede = _shares(counts), _shares(counts.T)
    alike = np.minimum(np.sqrt(follow) @ np.sqrt(follow).T, np.sqrt(precede) @ np.sqrt(precede).T)  # [V,V]
    np.fill_diagonal(alike, 0)
    expected = _shares(np.where(alike >= ALIKE, alike, 0)) @ follow  # [V,V]
    return torch.from_numpy((counts == 0) & (expected > LIKELY))


def _shares(counts: np.ndarray) -> np.ndarray:
    """Rows that sum to 1, or 0."""
    return counts / np.maximum(counts.sum(1, keepdims=True), 1e-12)


def total_loss_without(
    missing: Tensor, log_probabilities: Tensor, tokens: Tensor, targets: Tensor, following: Tensor | None = None
) -> Tensor:
    """The sum of -log p of `targets` [N], -1 where there is none, with p over the words that are not `missing` [V,V] after
    `tokens` [N], nor before `following` [N], -1 where nothing follows, from `log_probabilities` [N,V]; a target itself
    always counts."""
    left_out = _left_out(missing, tokens, following).scatter(1, targets.clamp_min(0)[:, None], False)  # [N,V]
    scores = log_probabilities.masked_fill(left_out, -torch.inf)
    return F.cross_entropy(scores, targets, ignore_index=-1, reduction="sum")


def losses_without(
    missing: Tensor, log_probabilities: Tensor, tokens: Tensor, targets: Tensor, following: Tensor | None = None
) -> Tensor:
    """As `total_loss_without`, but each by itself [N], and 0 where the target is missing after its token, or before what
    follows: what a model has drawn may hold such pairs, and that no picture of training rewards them is no news."""
    left_out = _left_out(missing, tokens, following)  # [N,V]
    wanted = targets.clamp_min(0)[:, None]  # [N,1]
    drawn = left_out.gather(1, wanted)[:, 0]  # [N]
    scores = log_probabilities.masked_fill(left_out.scatter(1, wanted, False), -torch.inf)
    return F.cross_entropy(scores, targets, ignore_index=-1, reduction="none").masked_fill(drawn, 0.0)


def _left_out(missing: Tensor, tokens: Tensor, following: Tensor | None) -> Tensor:
    """The words that are missing after `tokens` [N] or before `following` [N]: bool [N,V]."""
    if following is None:
        return missing[tokens]
    return missing[tokens] | (missing.T[following.clamp_min(0)] & (following >= 0)[:, None])


def followers(targets: Tensor, end: int) -> Tensor:
    """The word after each of `targets` [N], captions one after the other that are closed by `end`, -1 where there is none."""
    after = torch.cat([targets[1:], targets.new_full((1,), -1)])
    return torch.where((targets == end) | (targets < 0), -1, after)
