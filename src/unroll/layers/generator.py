"""What every conditional generator shares, whatever it reads: encoder -> memory -> decoder, one token at a time.

The memory is made once for each source and stays as it is. The state belongs to a hypothesis. In decoding each source
has K hypotheses, rows b*K .. b*K + K-1 of tokens and state, and the memory keeps one row b: it is never copied.

Two symbols stand on top of the target vocabulary: BOS = V-2 opens every sequence and is never predicted, EOS = V-1 ends
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from unroll.layers.attention import spread
from unroll.layers.softmax import Softmax

State = dict[str, Tensor]


def bos(vocabulary: int) -> int:
    """The symbol that opens a sequence."""
    return vocabulary - 2


def eos(vocabulary: int) -> int:
    """The symbol that ends a sequence."""
    return vocabulary - 1


@dataclass
class GeneratorOutput:
    """`hidden` [N,T,D] goes into the output layer, `state` has N rows, `attention` [N,T,S] is float32 or none.

    `extras` [N,T] are named numbers of each step that a task makes losses of, in training alone.
    """

    hidden: Tensor
    state: State
    attention: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)


class ConditionalGenerator(nn.Module):
    """Base of the models that write a sequence about something they read.

    `memory` has B rows, one for each source: "values" [B,S,D], "mask" [B,S] (true where there is a source position) and
    what else the model wants to compute once. Tokens and state have N = B*K rows.
    """

    output: Softmax
    reads: str = "text"
    """What it is given: `text`, or for a task that shows pictures `image` or `frames`."""

    @property
    def vocabulary(self) -> int:
        """Number of target symbols V, BOS and EOS included."""
        return self.output.vocabulary

    def encode(self, inputs: Mapping[str, Tensor]) -> State:
        """Read the sources."""
        raise NotImplementedError

    def initial_state(self, memory: State) -> State:
        """The state before BOS, one row for each source."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, memory: State, state: State) -> GeneratorOutput:
        """`tokens` [N,T], T >= 1, BOS first -> hidden [N,T,D], where hidden t predicts token t + 1."""
        raise NotImplementedError

    def step(self, tokens: Tensor, memory: State, state: State) -> tuple[Tensor, State, Tensor | None]:
        """`tokens` [N] -> log-probabilities of the next token [N,V] (BOS: -inf), state, attention [N,S] or none."""
        output = self(tokens[:, None], memory, state)
        log_probabilities = self.output.log_probabilities(output.hidden[:, 0])  # [N,V]
        log_probabilities[:, bos(self.vocabulary)] = -torch.inf
        attention = None if output.attention is None else output.attention[:, 0]
        return log_probabilities, output.state, attention

    @property
    def flops_per_token(self) -> int:
        """Operations of the forward pass for one token: 2 for each weight of a matrix, of encoder and decoder both.

        Convolutions are left out: what they cost depends on the size of the picture, not on the words.
        """
        modules = [module for module in self.modules() if not isinstance(module, nn.Embedding)]
        weights = {id(p): p for module in modules for p in module.parameters(recurse=False) if p.dim() == 2}
        return 2 * sum(weight.numel() for weight in weights.values())


class Recital(nn.Module):
    """Says a text that is known: to decoding it is a model that gives every next token the probability 1.

    Base of the systems that choose one of several given texts, so that they are decoded and scored like all others.
    """

    reads: str

    def __init__(self, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.vocabulary = vocabulary["target"]

    def memory(self, texts: Tensor) -> State:
        """Of `texts` [B,T], the tokens closed by EOS, -1 after it."""
        places = torch.ones(len(texts), 1, dtype=torch.bool, device=texts.device)
        return {"values": places[..., None].float(), "mask": places, "texts": texts}

    def initial_state(self, memory: State) -> State:
        """{"text" [B,T], "place" [B]}."""
        return {"text": memory["texts"], "place": torch.zeros_like(memory["texts"][:, 0])}

    def step(self, tokens: Tensor, memory: State, state: State) -> tuple[Tensor, State, None]:
        """The next token of the text, whatever was said before; EOS after its end."""
        text, place = state["text"], state["place"][:, None]  # [N,T] [N,1]
        following = text.gather(1, place.clamp(max=text.shape[1] - 1))  # [N,1]
        following = torch.where((following < 0) | (place >= text.shape[1]), eos(self.vocabulary), following)
        certain = torch.full((len(tokens), self.vocabulary), -torch.inf, device=tokens.device)
        return certain.scatter(1, following, 0.0), {**state, "place": state["place"] + 1}, None


def read_memory(
    attention: nn.Module, queries: Tensor, memory: State, coverage: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of `queries` [N,T,H] over a memory of B rows -> contexts [N,T,D], weights [N,T,S].

    `memory` holds "keys", "values" and "mask"; `coverage` is [N,T,S].
    """
    rows, (count, steps) = len(memory["mask"]), queries.shape[:2]
    if not rows:
        return queries.new_zeros(0, steps, memory["values"].shape[-1]), queries.new_zeros(0, steps, 0)
    side_by_side = spread(queries, rows).flatten(1, 2)  # [B,K*T,H]
    if coverage is not None:
        coverage = spread(coverage, rows).flatten(1, 2)  # [B,K*T,S]
    contexts, weights = attention(side_by_side, memory["keys"], memory["values"], memory["mask"], coverage)
    shape = (count, steps)
    return contexts.reshape(*shape, contexts.shape[-1]), weights.reshape(*shape, weights.shape[-1])
