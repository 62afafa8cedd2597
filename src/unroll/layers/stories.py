"""What the models that answer questions about stories share: sentences to vectors, and the scores of the answers.

A model is called with `facts` [B,F,W] and `question` [B,Q], word ids with 0 for padding, and gives an `Answer`. A fact
without any word is none: it takes part in nothing but the count of time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENTITIES = 2
"""Id of the first entity; 0 is padding, 1 the unknown word (`data/stories.py`)."""


@dataclass
class Answer:
    """`scores` [B,A] of the answers before the softmax; `attention` [B,hops,F]: how much of each fact was read."""

    scores: Tensor
    attention: Tensor


class StoryModel(nn.Module):
    """Base of the models. `vocabulary`: {"words", "answers", "entities"}: how many there are of each."""

    output: AnswerLayer

    def forward(self, inputs: Mapping[str, Tensor]) -> Answer:
        """Answer the questions."""
        raise NotImplementedError

    @property
    def flops_per_token(self) -> int:
        """Operations of the forward pass for one fact: 2 for each weight of a matrix but the embeddings."""
        modules = [module for module in self.modules() if not isinstance(module, nn.Embedding)]
        weights = {id(p): p for module in modules for p in module.parameters(recurse=False) if p.dim() == 2}
        return 2 * sum(weight.numel() for weight in weights.values())


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 as it was."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def facts_told(facts: Tensor) -> Tensor:
    """True for the facts that have a word: [B,F,W] -> [B,F]."""
    return (facts > 0).any(-1)


def ages(facts: Tensor) -> Tensor:
    """How old each fact is: 0 for the last one with a word, 1 for the one before, ...: [B,F,W] -> [B,F]."""
    told = facts_told(facts)
    places = torch.arange(1, told.shape[1] + 1, device=facts.device)
    return ((told * places).amax(1, keepdim=True) - places).clamp_min(0)


def weighted_words(sentences: Tensor, weights: Tensor, words: int) -> Tensor:
    """How often each word stands in a sentence, weighted by place: ids [...,W], weights [...,W] -> [...,V].

    An embedding of bags of words then is a product with the embedding matrix [V,D], many times as fast on a CPU as
    gathering and adding rows, forward and backward both, while V is a few hundred.
    """
    bags = torch.zeros(*sentences.shape[:-1], words, dtype=weights.dtype, device=weights.device)
    return bags.scatter_add_(-1, sentences, weights * (sentences > 0))


def distinct(sentences: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """The sentences [N,W] that differ [U,W], and which of them each one is [N]. Stories say few things many times."""
    number = torch.zeros(len(sentences), dtype=torch.int64, device=sentences.device)
    bound = 1  # every number is below it; sentences that have begun alike have the same one
    for column in sentences.unbind(1):
        if bound * words >= 2**62:
            number = torch.unique(number, return_inverse=True)[1]
            bound = len(sentences)
        number, bound = number * words + column, bound * words
    kept, number = torch.unique(number, return_inverse=True)
    first = number.new_empty(len(kept)).scatter_(0, number, torch.arange(len(number), device=number.device))
    return sentences[first], number


class SentenceEncoder(nn.Module):
    """A sentence as a vector that knows the order of its words: sum_j W_j e(w_j) + b, a matrix for each place j.

    Words after the `places` first ones share the last matrix.
    """

    def __init__(self, embedding: nn.Embedding, places: int, width: int) -> None:
        super().__init__()
        self.embedding, self.places = [embedding], places  # in a list: the parameter belongs to the model
        self.linear = nn.Linear(places * embedding.embedding_dim, width)

    def forward(self, sentences: Tensor) -> Tensor:
        """ids [...,W] -> [...,D]."""
        embedded = self.embedding[0](sentences) * (sentences > 0)[..., None]  # [...,W,E]
        longest = sentences.shape[-1]
        if longest < self.places:
            embedded = F.pad(embedded, (0, 0, 0, self.places - longest))
        elif longest > self.places:
            rest = embedded[..., self.places - 1 :, :].sum(-2, keepdim=True)
            embedded = torch.cat([embedded[..., : self.places - 1, :], rest], -2)
        return self.linear(embedded.flatten(-2))


class AnswerLayer(nn.Module):
    """Scores of the answers. An answer of the list has a weight vector of its own; an entity e scores P h . x_e with
    its word's embedding x_e, so what is learnt about one entity holds for all of them."""

    def __init__(self, width: int, vocabulary: Mapping[str, int], embedding: int) -> None:
        super().__init__()
        self.entities = vocabulary["entities"]
        self.listed = nn.Linear(width, vocabulary["answers"] - self.entities)
        self.project = nn.Linear(width, embedding) if self.entities else None

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        """hidden [B,D], embeddings of the words [V,E] -> [B,A]."""
        listed: Tensor = self.listed(hidden)
        if self.project is None:
            return listed
        named = words[ENTITIES : ENTITIES + self.entities].to(listed.dtype)  # [N,E]
        entities = self.project(hidden) @ named.T  # [B,N]
        return torch.cat([listed[:, :1], entities.to(listed.dtype), listed[:, 1:]], -1)
