"""Samples for captioning: one image or clip with all its captions, as text and as token ids.

A sample is `{"id": number in its split, "key": its name in the source, "media": encoded bytes of the image or clip, or a
list of encoded images for a sequence of frames, "extension": "jpg", "png", "webp", "gif", "mp4", "avi", "webm" or
"frames", "captions": texts, "caption_ids": their ids, a list of [T], "truth": what is known to be in it (optional)}`.

The ids hold no special symbols; BOS = the tokenizer's size and EOS = its size + 1 stand on top, and the manifest's
`vocabulary` counts them. The one length of a sample, for the plan, is that of its longest caption with EOS.

Captions are cleaned where they are read: line ends, tabs and `|||` (which METEOR's protocol gives a meaning) become
blanks. Tokenizers see words in lower case without punctuation (`caption_words`), as Karpathy's preparation does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from unroll.data import tokenizers
from unroll.data.pairs import SPECIAL_SYMBOLS
from unroll.data.shards import token_type
from unroll.data.sources import file_sha256
from unroll.data.tokenizers import Tokenizer, TokenizerOptions
from unroll.data.writers import SHARD_BYTES, MediaWriter

SEPARATORS = re.compile(r"(?:\|{3,}|\s)+")
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class Captioned:
    """One image or clip with its captions; `place` names it in errors."""

    key: str
    media: bytes | list[bytes]
    extension: str
    captions: list[str]
    truth: Mapping[str, Any] | None = None
    place: str = "caption"


def clean_caption(text: str) -> str:
    """A caption on one line, without what a scorer would take for the end of it."""
    return SEPARATORS.sub(" ", text).strip()


def caption_words(text: str) -> str:
    """What the tokenizer sees: lower case, words alone, one blank between them.

    A hyphen or an apostrophe inside a word stays: "It's a well-kept, green park." -> "it's a well-kept green park".
    """
    return " ".join(WORD.findall(text.lower()))


def learn_tokenizer(captions: Iterable[tuple[str, str]], options: TokenizerOptions) -> Tokenizer:
    """From (place, caption) of the training split."""
    return tokenizers.learn(((place, [caption_words(text)]) for place, text in captions), options, leading_blank=True)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Write it into a prepared folder; gives the manifest's part about it."""
    tokenizer.save(folder / "tokenizer.json")
    vocabulary = tokenizer.vocabulary_size + SPECIAL_SYMBOLS
    return {
        "tokenizer": "tokenizer.json",
        "tokenizer_sha256": file_sha256(folder / "tokenizer.json"),
        "vocabulary": vocabulary,
        "token_bytes": token_type(vocabulary).itemsize,
    }


class CaptionWriter:
    """Writes the captioned media of one split.

    Use as a context manager; `summary` afterwards is this split's part of the manifest.
    """

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_bytes: int = SHARD_BYTES // 4) -> None:
        self.tokenizer = tokenizer
        self._writer = MediaWriter(folder, split, tokenizer.vocabulary_size + SPECIAL_SYMBOLS, shard_bytes)
        self._written = 0
        self._counts = {"captions": 0, "caption_tokens": 0, "longest_caption": 0, "media_bytes": 0}
        self._extensions: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def write(self, item: Captioned) -> None:
        """Append an image or clip. It has at least one caption."""
        ids = self.tokenizer.encode_all(
            [caption_words(text) for text in item.captions], [item.place] * len(item.captions)
        )
        longest = max(map(len, ids))
        sample = {
            "id": self._written,
            "key": item.key,
            "extension": item.extension,
            "media": item.media,
            "captions": item.captions,
            "caption_ids": ids,
            **({} if item.truth is None else {"truth": item.truth}),
        }
        self._writer.write(sample, longest + 1)
        self._written += 1
        self._count(item, sum(map(len, ids)), longest)

    def _count(self, item: Captioned, tokens: int, longest: int) -> None:
        counts = self._counts
        counts["captions"] += len(item.captions)
        counts["caption_tokens"] += tokens
        counts["longest_caption"] = max(counts["longest_caption"], longest)
        counts["media_bytes"] += _size(item.media)
        self._extensions[item.extension] = self._extensions.get(item.extension, 0) + 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._writer.__exit__(kind, error, trace)

    @property
    def summary(self) -> dict[str, Any]:
        """Counts and shards, for the manifest."""
        return {**self._counts, "extensions": dict(sorted(self._extensions.items())), **self._writer.summary}


def _size(media: bytes | Sequence[bytes]) -> int:
    return len(media) if isinstance(media, bytes) else sum(map(len, media))
