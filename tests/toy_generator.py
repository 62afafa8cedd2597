"""A small conditional generator in float64 with random weights: what decoding is tested on."""

import torch
from torch import Tensor

State = dict[str, Tensor]


class ToyGenerator:
    """A GRU-like cell with dot attention. `sharpness` spreads the logits; `end` is added to the logit of EOS."""

    def __init__(self, vocabulary: int = 7, seed: int = 0, width: int = 8, sharpness: float = 3.0, end: float = 0.0):
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5

        self.vocabulary, self.sharpness, self.end = vocabulary, sharpness, end
        self.words, self.embed = weights(20, width) * width**0.5, weights(vocabulary, width) * width**0.5
        self.gate, self.candidate = weights(width, 3 * width), weights(width, 3 * width)
        self.output = weights(vocabulary, 2 * width)
        self.steps = 0
        self.rows = 0

    def encode(self, inputs: State) -> State:
        """`tokens` [B,S], -1 is padding."""
        tokens = inputs["tokens"]
        mask = tokens >= 0
        place = torch.arange(tokens.shape[1], dtype=torch.float64)[None, :, None]  # [1,S,1]
        return {"values": (self.words[tokens.clamp(min=0)] + (place + 1).sin()) * mask[..., None], "mask": mask}

    def initial_state(self, memory: State) -> State:
        mean = memory["values"].sum(1) / memory["mask"].sum(1, keepdim=True).clamp(min=1)
        return {"hidden": mean.tanh(), "read": torch.zeros_like(mean)}  # [B,D]

    def step(self, tokens: Tensor, memory: State, state: State) -> tuple[Tensor, State, Tensor | None]:
        sources, length, width = memory["values"].shape
        assert len(tokens) == len(state["hidden"])
        assert len(tokens) % sources == 0
        self.steps, self.rows = self.steps + 1, self.rows + len(tokens)
        inputs = torch.cat([self.embed[tokens], state["read"], state["hidden"]], 1)  # [N,3D]
        gate, candidate = (inputs @ self.gate.T).sigmoid(), (inputs @ self.candidate.T).tanh()
        hidden = gate * state["hidden"] + (1 - gate) * candidate  # [N,D]
        scores = hidden.view(sources, -1, width) @ memory["values"].transpose(1, 2)  # [B,K,S]
        attention = scores.masked_fill(~memory["mask"][:, None], -torch.inf).softmax(-1)
        read = (attention @ memory["values"]).view(-1, width)  # [N,D]
        logits = self.sharpness * torch.cat([hidden, read], 1) @ self.output.T  # [N,V]
        logits[:, -1] += self.end
        return logits.log_softmax(-1), {"hidden": hidden, "read": read}, attention.reshape(-1, length)


def random_sources(count: int, longest: int = 6, seed: int = 1) -> Tensor:
    """Sources of different lengths, 1 to `longest` tokens, padded with -1: [B,S]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 20, (count, longest), generator=generator)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    return tokens.masked_fill(torch.arange(longest) >= lengths[:, None], -1)
