"""Translating text with exported models alone: no data set is needed, only what training left in `models/`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unroll.data.tokenizers import load as load_tokenizer
from unroll.decoding.beam import BeamOptions, beam_search
from unroll.decoding.conditional import Hypothesis
from unroll.decoding.ensemble import Ensemble
from unroll.errors import UserError
from unroll.tasks.generation import attends
from unroll.tasks.translation import pieces, source_tensors

LONGEST = 1000
"""Tokens of a sentence that is still translated: what is longer is no sentence, and a beam over it takes minutes."""


@dataclass(frozen=True)
class Translation:
    """One hypothesis for one line: `score` as the beam ranked it; `weights` [T,S] for `target` and `source` tokens."""

    text: str
    score: float
    source: list[str]
    target: list[str]
    weights: np.ndarray | None


class Translator:
    """Translates lines of text. Several models of one recipe vote at every step."""

    def __init__(self, models: Sequence[Any], folder: Path, description: dict[str, Any], device: torch.device) -> None:
        """`folder`: an exported model's, for its tokenizers. `description`: its `model.json`.

        Raises:
            UserError: the folder holds no translation model.
        """
        if "text" not in description:
            raise UserError(f"{folder / 'model.json'}: 'text' is missing, it is no translation model; train it again")
        chosen = [model.to(device) for model in models]
        self.model = chosen[0] if len(chosen) == 1 else Ensemble(chosen)
        self.device = device
        self.source = load_tokenizer(folder / "source_tokenizer.json")
        self.target = load_tokenizer(folder / "tokenizer.json")
        self.lowercase: bool = description["text"]["lowercase"]
        self.source_vocabulary: int = description["vocabulary"]["source"]

    def translate(self, lines: Sequence[str], beam: BeamOptions, batch: int = 32) -> Iterator[list[Translation]]:
        """The n best translations of each line, in the lines' order; an empty line has an empty translation.

        Raises:
            UserError: a line that is too long to be a sentence, or a character that the tokenizer does not know.
        """
        for start in range(0, len(lines), batch):
            part = [line.strip() for line in lines[start : start + batch]]
            ids = [self.encode(line, start + number + 1) for number, line in enumerate(part)]
            full = [number for number, line in enumerate(part) if line]
            found = dict(zip(full, self._search([ids[number] for number in full], beam), strict=True))
            for number in range(len(part)):
                if number not in found:
                    yield [Translation("", 0.0, [], [], None)]
                    continue
                yield [self._translation(ids[number], hypothesis) for hypothesis in found[number]]

    def encode(self, line: str, number: int) -> np.ndarray:
        """Source ids of line `number`."""
        ids = self.source.encode(line.lower() if self.lowercase else line, f"line {number}")
        if len(ids) > LONGEST:
            raise UserError(f"line {number}: {len(ids):,} tokens, at most {LONGEST:,} are translated; split it")
        return ids

    @torch.no_grad()
    def _search(self, ids: list[np.ndarray], beam: BeamOptions) -> list[list[Hypothesis]]:
        if not ids:
            return []
        tensors = source_tensors(ids, self.source_vocabulary)
        memory = self.model.encode({name: tensor.to(self.device) for name, tensor in tensors.items()})
        return beam_search(self.model, memory, beam, with_attention=attends(memory))

    def _translation(self, ids: np.ndarray, found: Hypothesis) -> Translation:
        text = self.target.decode(found.tokens).strip()
        source = [*pieces(self.source, ids.tolist()), "</s>"]
        return Translation(text, found.score, source, pieces(self.target, found.tokens), found.attention)
