"""The caption of the training picture that looks most alike: what a system must beat that means to see more.

A picture is described by simple features, from `side` x `side` cells that it is cut into: the mean colour of each cell,
a histogram of the colours of the whole, and how strong edges of each direction are in each cell. Each of the three groups
is scaled to length 1; a clip is the mean of its frames. The nearest is the one with the largest product, and it says its
first caption (Devlin et al. 2015, arXiv:1505.04467, take the consensus of many neighbours in features of a network).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unroll.config import Strict
from unroll.errors import UserError
from unroll.layers.generator import Recital, State


class Config(Strict):
    """`side`: cells across; `colours`: levels of each of red, green and blue; `directions` of edges."""

    side: int = Field(4, ge=1)
    colours: int = Field(4, ge=2)
    directions: int = Field(8, ge=1)


TINY: list[dict[str, Any]] = [{"side": 2}]
"""Small configurations, at least one for each option."""


class Model(Recital):
    """The features and captions of all training pictures. `fit` replaces training; there are no gradients."""

    reads = "pictures"
    features: Tensor
    captions: Tensor

    def __init__(self, config: Config, vocabulary: dict[str, int]) -> None:
        super().__init__(vocabulary)
        self.config = config
        self.register_buffer("features", torch.empty(0, 0))
        self.register_buffer("captions", torch.empty(0, 0, dtype=torch.int64))

    @property
    def parameter_count(self) -> int:
        """Numbers kept of all pictures."""
        return self.features.numel()

    def fit(self, shown: Iterable[tuple[Mapping[str, Tensor], list[np.ndarray]]]) -> None:
        """`shown`: inputs of some pictures, and a caption of each."""
        features, captions = [], []
        for inputs, texts in shown:
            features.append(self.describe(inputs))
            captions += texts
        if not captions:
            raise UserError("nearest_image: there is no picture to remember")
        self.features = torch.cat(features)
        longest = max(map(len, captions))
        self.captions = torch.full((len(captions), max(1, longest)), -1, dtype=torch.int64)
        for row, ids in enumerate(captions):
            self.captions[row, : len(ids)] = torch.from_numpy(ids)

    def encode(self, inputs: Mapping[str, Tensor]) -> State:
        """`image` [B,H,W,3] or `frames` [B,F,H,W,3] -> the caption of the nearest picture as the text to say."""
        if not len(self.features):
            raise UserError("nearest_image: nothing was remembered yet; train it first")
        nearest = (self.describe(inputs) @ self.features.T).argmax(1)  # [B]
        return self.memory(self.captions[nearest])

    def describe(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The features of some pictures: [B,D]."""
        frames = inputs["frames"] if "frames" in inputs else inputs["image"][:, None]  # [B,F,H,W,3]
        rows, count = frames.shape[:2]
        pixels = frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 255  # [B*F,3,H,W]
        groups = [self._layout(pixels), self._histogram(pixels), self._edges(pixels)]
        means = [F.normalize(group.view(rows, count, -1).mean(1), dim=1) for group in groups]
        return torch.cat(means, 1)

    def _layout(self, pixels: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(pixels - 0.5, self.config.side).flatten(1)

    def _histogram(self, pixels: Tensor) -> Tensor:
        levels = self.config.colours
        steps = (pixels * levels).long().clamp(max=levels - 1)  # [B,3,H,W]
        bins = (steps[:, 0] * levels + steps[:, 1]) * levels + steps[:, 2]  # [B,H,W]
        counts = torch.zeros(len(pixels), levels**3, device=pixels.device)
        flat = bins.flatten(1)
        return counts.scatter_add(1, flat, torch.ones_like(flat, dtype=counts.dtype)).sqrt()

    def _edges(self, pixels: Tensor) -> Tensor:
        grey = pixels.mean(1, keepdim=True)  # [B,1,H,W]
        across, down = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2], grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
        strength = torch.hypot(across, down)
        turn = torch.atan2(down, across) / torch.pi % 1  # an edge from dark to light is one from light to dark
        number = (turn * self.config.directions).long().clamp(max=self.config.directions - 1)
        each = F.one_hot(number[:, 0], self.config.directions).permute(0, 3, 1, 2) * strength  # [B,directions,H,W]
        return F.adaptive_avg_pool2d(each, self.config.side).flatten(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes tables of any length, which `nn.Module` refuses."""
        for name in ("features", "captions"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args)
