"""A person: says one of the captions that people wrote about the picture, and is measured by the others.

Nothing is learnt. The score says what agreement people reach on this data set; it is on one reference fewer than that of
the systems, which lowers the precisions of BLEU but not the mean that CIDEr is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from unroll.config import Strict
from unroll.layers.generator import Recital, State


class Config(Strict):
    """Nothing to choose: the task gives the captions of a picture their turn."""


TINY: list[dict[str, Any]] = [{}]
"""Small configurations, at least one for each option."""


class Model(Recital):
    """`captions`: what it is given to say."""

    reads = "captions"
    parameter_count = 0

    def __init__(self, config: Config, vocabulary: dict[str, int]) -> None:
        super().__init__(vocabulary)

    def fit(self, shown: Iterable[Any]) -> None:
        """Nothing is learnt."""

    def encode(self, inputs: Mapping[str, Tensor]) -> State:
        """`captions` [B,T], closed by EOS and padded with -1 -> the text to say."""
        return self.memory(inputs["captions"])
