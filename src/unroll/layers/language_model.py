"""What neural language models share: the form of their output, the single step, the ends of the network, and the
naming of states: "<layer>.<name>" for the tensor `name` of layer number `layer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from unroll.layers.softmax import AdaptiveSoftmax, Softmax

State = dict[str, Tensor]


@dataclass
class LanguageModelOutput:
    """`hidden` [B,T,D] goes into the output layer; `state` is for the next tokens, batch at dim 0 of every tensor;
    `penalties` are named means over the tokens, weighted, to add to the training loss."""

    hidden: Tensor
    state: State
    penalties: dict[str, Tensor] = field(default_factory=dict)


class LanguageModel(nn.Module):
    """Base of the neural language models: `forward` over [B,T] tokens, `step` over one token for each row."""

    output: Softmax | AdaptiveSoftmax

    def initial_state(self, batch: int) -> State:
        """State before the first token, for `batch` rows."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, state: State) -> LanguageModelOutput:
        """`tokens` [B,T], T >= 1, and the state before them -> hidden [B,T,D], where hidden t predicts token t + 1."""
        raise NotImplementedError

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """`tokens` [B] -> log-probabilities of the next token [B,V] and the state after them."""
        output = self(tokens.unsqueeze(1), state)
        return self.output.log_probabilities(output.hidden[:, 0]), output.state

    @property
    def flops_per_token(self) -> int:
        """Operations of the forward pass for one token: 2 for each weight of a matrix, all of the output layer's."""
        modules = [module for module in self.modules() if not isinstance(module, nn.Embedding)]
        weights = [p for module in modules for p in module.parameters(recurse=False) if p.dim() == 2]
        return 2 * sum(weight.numel() for weight in weights)


def output_layer(
    width: int, vocabulary: int, cutoffs: list[int], tied: nn.Embedding | None = None
) -> Softmax | AdaptiveSoftmax:
    """An adaptive softmax when there are `cutoffs`, else a full one, its matrix shared with `tied` if given."""
    if cutoffs:
        return AdaptiveSoftmax(width, vocabulary, cutoffs)
    return Softmax(width, vocabulary, tied)


def embedding_layer(vocabulary: int, width: int, tied: bool) -> nn.Embedding:
    """Embeddings of unit variance; small ones when they serve as the matrix of the softmax as well."""
    embedding = nn.Embedding(vocabulary, width)
    if tied:
        nn.init.uniform_(embedding.weight, -0.1, 0.1)
    return embedding


def numbered(layer: int, state: State) -> State:
    """The state of one layer under the names that it has in the model's state."""
    return {f"{layer}.{name}": value for name, value in state.items()}


def part_of(state: State, layer: int) -> State:
    """The state of one layer, taken out of the model's: undoes `numbered`."""
    prefix = f"{layer}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
