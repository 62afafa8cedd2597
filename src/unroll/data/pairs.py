"""Samples for sequence to sequence: pairs of a source and a target text, as text and as token ids.

A sample is `{"id": number in its split, "source_text", "target_text": as in the file, "source": ids [S], "target": ids
[T]}`. The ids hold no special symbols; two more stand on top of each tokenizer's: BOS = its size, EOS = its size + 1,
and the manifest's `vocabulary` (of the target) and `source_vocabulary` count them. An empty text has no ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from unroll.data.shards import token_type
from unroll.data.sources import file_sha256
from unroll.data.tokenizers import Tokenizer
from unroll.data.writers import SampleWriter

SPECIAL_SYMBOLS = 2
ENCODED_TOGETHER = 1024


@dataclass(frozen=True)
class Pair:
    """Two texts that say the same; `source_place` and `target_place` name them in errors."""

    source: str
    target: str
    source_place: str = "source"
    target_place: str = "target"


@dataclass(frozen=True)
class PairTokenizers:
    """The tokenizers of the two sides, which may be one and the same. `lowercase`: texts are lower-cased before."""

    source: Tokenizer
    target: Tokenizer
    lowercase: bool = False

    def encode(self, pairs: list[Pair]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids of both sides of each pair: int64 [S] and [T].

        Raises:
            UserError: a character that the tokenizer `characters` does not know.
        """
        sources = self.source.encode_all([self.cased(p.source) for p in pairs], [p.source_place for p in pairs])
        targets = self.target.encode_all([self.cased(p.target) for p in pairs], [p.target_place for p in pairs])
        return list(zip(sources, targets, strict=True))

    def cased(self, text: str) -> str:
        """The text as the tokenizers see it."""
        return text.lower() if self.lowercase else text

    @property
    def largest_vocabulary(self) -> int:
        """The larger one of the two vocabularies, special symbols included."""
        return max(self.source.vocabulary_size, self.target.vocabulary_size) + SPECIAL_SYMBOLS

    def save(self, folder: Path) -> dict[str, Any]:
        """Write both into a prepared folder; gives the manifest's part about them."""
        self.target.save(folder / "tokenizer.json")
        self.source.save(folder / "source_tokenizer.json")
        return {
            "tokenizer": "tokenizer.json",
            "tokenizer_sha256": file_sha256(folder / "tokenizer.json"),
            "source_tokenizer": "source_tokenizer.json",
            "source_tokenizer_sha256": file_sha256(folder / "source_tokenizer.json"),
            "vocabulary": self.target.vocabulary_size + SPECIAL_SYMBOLS,
            "source_vocabulary": self.source.vocabulary_size + SPECIAL_SYMBOLS,
            "token_bytes": token_type(self.largest_vocabulary).itemsize,
            "lowercase": self.lowercase,
        }


class PairWriter:
    """Writes the pairs of one split. Pairs with more than `longest` tokens on a side are counted; `drop_longer` leaves
    them out.

    Use as a context manager; `summary` afterwards is this split's part of the manifest, `too_long` what was left out.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        tokenizers: PairTokenizers,
        longest: int | None = None,
        drop_longer: bool = False,
    ) -> None:
        self.tokenizers, self.longest, self.drop_longer = tokenizers, longest, drop_longer
        self.too_long = 0
        self._writer = SampleWriter(folder, split, tokenizers.largest_vocabulary)
        self._waiting: list[Pair] = []
        self._written = 0
        self._counts = {
            "source_tokens": 0,
            "target_tokens": 0,
            "longest_source": 0,
            "longest_target": 0,
            "over_longest": 0,
            "empty": 0,
        }

    def __enter__(self) -> Self:
        return self

    def write(self, pair: Pair) -> None:
        """Append a pair."""
        self._waiting.append(pair)
        if len(self._waiting) == ENCODED_TOGETHER:
            self._flush()

    def _flush(self) -> None:
        for pair, (source, target) in zip(self._waiting, self.tokenizers.encode(self._waiting), strict=True):
            longer = self.longest is not None and max(len(source), len(target)) > self.longest
            if longer and self.drop_longer:
                self.too_long += 1
                continue
            self._count(source, target, longer)
            texts = {"source_text": pair.source, "target_text": pair.target}
            sample = {"id": self._written, **texts, "source": source, "target": target}
            self._writer.write(sample, len(target) + 1, len(source) + 1)
            self._written += 1
        self._waiting = []

    def _count(self, source: np.ndarray, target: np.ndarray, longer: bool) -> None:
        counts = self._counts
        counts["source_tokens"] += len(source)
        counts["target_tokens"] += len(target)
        counts["longest_source"] = max(counts["longest_source"], len(source))
        counts["longest_target"] = max(counts["longest_target"], len(target))
        counts["over_longest"] += longer
        counts["empty"] += not (len(source) and len(target))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._writer.__exit__(kind, error, trace)

    @property
    def summary(self) -> dict[str, Any]:
        """Counts and shards, for the manifest."""
        return {**self._counts, **self._writer.summary}
