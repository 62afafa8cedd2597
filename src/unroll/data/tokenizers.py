"""Text to token ids and back: bytes, characters, words and byte-pair encoding.

All four have one interface (`Tokenizer`). Ids do not depend on how a text is cut into pieces, so a text of any size is
encoded as a stream. `byte_lengths` says how many UTF-8 bytes a token stands for, so that bits per byte compare models
over different tokens:
- bytes, characters and BPE: exact, the sum over an encoded text is its size;
- words: the word and the blank beside it, 1 for `<eos>`; exact for text with single blanks and none at line ends.
  `<unk>` counts as the mean word that it replaced in the training text (or as its own five letters and a blank).

A tokenizer is learnt from the training split alone and stored as JSON beside the shards.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from unroll.config import Strict
from unroll.errors import UserError

FORMAT = "unroll tokenizer 1"
UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
REPLACEMENT = "\ufffd"
COUNTED_WORDS = 5_000_000
UNBROKEN_TEXT = 2**20
BORDER = re.compile(r"\S(?=[ \n])")
LAST_BORDER = re.compile(r"(?s:.*)\S(?=[ \n])")
BPE_PIECE = 2**14
BETWEEN_WORDS = re.compile(r"(?<=\S)(?=[ \n])")
KEPT_WORD = 64
KEPT_CUTS = 2**20

Texts = Iterable[tuple[str, Iterable[str]]]
"""Texts to learn from: each with its name (for errors), in pieces. No word reaches from one text to the next."""

OWN_OPTIONS = {
    "bytes": set[str](),
    "characters": {"unknown"},
    "words": {"minimum_count", "maximum_size"},
    "bpe": {"vocabulary_size"},
}


class TokenizerOptions(Strict):
    """Which tokenizer, and what it may be told.

    unknown (characters): give characters that the training text lacks an `<unk>` instead of refusing them.
    minimum_count, maximum_size (words): keep words seen so often, and at most so many (`<unk>`, `<eos>` included).
    vocabulary_size (bpe): tokens in all, the 256 bytes included.
    """

    kind: Literal["bytes", "characters", "words", "bpe"]
    unknown: bool = False
    minimum_count: int = Field(1, ge=1)
    maximum_size: int | None = Field(None, ge=3)
    vocabulary_size: int = Field(1024, ge=257, le=1_000_000)

    @model_validator(mode="after")
    def options_of_the_kind(self) -> Self:
        foreign = sorted(self.model_fields_set - {"kind"} - OWN_OPTIONS[self.kind])
        if foreign:
            raise ValueError(f"{foreign[0]} is not an option of the tokenizer {self.kind}")
        return self


class Tokenizer(ABC):
    """Token ids are 0 .. vocabulary_size - 1."""

    name: str

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Number of different tokens V."""

    @property
    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for: int64 [V]."""

    @abstractmethod
    def encode(self, text: str, place: str = "text", offset: int = 0) -> np.ndarray:
        """Token ids of a text: int64 [T]. `place` and `offset` (characters before) name it in errors."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """What `load` needs to make it again, as JSON."""

    def at_borders(self, pieces: Iterable[str], place: str) -> Iterator[str]:
        """The pieces, cut anew where encoding them one by one gives what encoding the whole gives."""
        return iter(pieces)

    def encode_pieces(self, pieces: Iterable[str], place: str = "text", offset: int = 0) -> Iterator[np.ndarray]:
        """Token ids of a text that comes in pieces; the same ids however it is cut."""
        for piece in self.at_borders(pieces, place):
            if piece:
                yield self.encode(piece, place, offset)
                offset += len(piece)

    def encode_all(self, texts: Sequence[str], places: Sequence[str]) -> list[np.ndarray]:
        """Token ids of many separate texts, each int64 [T]; `places` name them in errors."""
        return [self.encode(text, place) for text, place in zip(texts, places, strict=True)]

    def save(self, path: Path) -> None:
        """Write the tokenizer as JSON."""
        content = {"format": FORMAT, "kind": self.name, **self.content()}
        path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


class ByteTokenizer(Tokenizer):
    """Each UTF-8 byte is a token."""

    name = "bytes"

    @property
    def vocabulary_size(self) -> int:
        return 256

    @property
    def byte_lengths(self) -> np.ndarray:
        return np.ones(256, np.int64)

    def encode(self, text: str, place: str = "text", offset: int = 0) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return np.asarray(ids, np.uint8).tobytes().decode(errors="replace")

    def content(self) -> dict[str, Any]:
        return {}


class CharacterTokenizer(Tokenizer):
    """Each character (Unicode code point) of the training text is a token, in code point order; `<unk>` comes last."""

    name = "characters"

    def __init__(self, characters: str, unknown: bool) -> None:
        self.characters, self.unknown = characters, unknown
        self._points = code_points(characters + (REPLACEMENT if unknown else ""))
        self._ids = np.full(0x110000, len(characters) if unknown else -1, np.int32)
        self._ids[code_points(characters)] = np.arange(len(characters))

    @classmethod
    def learn(cls, texts: Texts, options: TokenizerOptions) -> CharacterTokenizer:
        """From the training texts."""
        seen = np.zeros(0x110000, bool)
        for _, pieces in texts:
            for piece in pieces:
                seen[code_points(piece)] = True
        return cls("".join(map(chr, np.flatnonzero(seen))), options.unknown)

    @property
    def vocabulary_size(self) -> int:
        return len(self.characters) + self.unknown

    @property
    def byte_lengths(self) -> np.ndarray:
        return np.array([len(chr(point).encode()) for point in self._points], np.int64)

    def encode(self, text: str, place: str = "text", offset: int = 0) -> np.ndarray:
        """Raises UserError for a character that the training text lacks, unless the option `unknown` is set."""
        ids = self._ids[code_points(text)].astype(np.int64)
        if not self.unknown and ids.size and ids.min() < 0:
            at = int(np.argmin(ids))
            raise UserError(
                f"{place}: character {offset + at}: {text[at]!r} (U+{ord(text[at]):04X}) is not in the training text; "
                "the tokenizer option 'unknown: true' allows it"
            )
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._points[np.asarray(ids, np.int64)].astype("<u4").tobytes().decode("utf-32-le")

    def content(self) -> dict[str, Any]:
        return {"characters": self.characters, "unknown": self.unknown}


def code_points(text: str) -> np.ndarray:
    """The Unicode code points of a text: uint8 or uint32 [characters]."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def at_word_ends(pieces: Iterable[str], place: str) -> Iterator[str]:
    """The pieces, cut anew between a character that is not a blank and a blank behind it.

    No word and no BPE token reaches over such a place.

    Raises:
        UserError: a stretch of `UNBROKEN_TEXT` characters has no such place.
    """
    waiting, given = "", 0
    for piece in pieces:
        waiting += piece
        border = LAST_BORDER.match(waiting)
        if border:
            yield waiting[: border.end()]
            given += border.end()
            waiting = waiting[border.end() :]
        elif len(waiting) > UNBROKEN_TEXT:
            raise UserError(
                f"{place}: character {given}: no blank behind a word in more than {UNBROKEN_TEXT} characters; "
                "use the tokenizer bytes or characters"
            )
    if waiting:
        yield waiting


def _words_of(texts: Texts) -> Iterator[tuple[str, str]]:
    for place, pieces in texts:
        for piece in at_word_ends(pieces, place):
            yield place, piece


class WordTokenizer(Tokenizer):
    """Words are what blanks separate; each line end is an `<eos>`. The most frequent words come first.

    This is WikiText's convention: 33,278 types and 2,088,628 training tokens on WikiText-2. `<unk>` is 0, `<eos>` 1.
    """

    name = "words"

    def __init__(self, words: list[str], unknown_bytes: int) -> None:
        self.words, self.unknown_bytes = words, unknown_bytes
        self._ids = {word: number for number, word in enumerate(words)}

    @classmethod
    def learn(cls, texts: Texts, options: TokenizerOptions) -> WordTokenizer:
        """From the training texts; `COUNTED_WORDS` bounds the memory.

        Raises:
            UserError: more different words than are counted, and neither minimum_count nor maximum_size is set.
        """
        counts: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        rare = 0
        for place, piece in _words_of(texts):
            counts.update(piece.split())
            while len(counts) > COUNTED_WORDS:
                rare += 1
                if options.minimum_count <= rare and options.maximum_size is None:
                    raise UserError(
                        f"{place}: more than {COUNTED_WORDS} different words; set the tokenizer option maximum_size, "
                        f"or minimum_count to more than {rare}"
                    )
                _drop(counts, dropped, [word for word, count in counts.items() if count <= rare])
        counts.pop(END_OF_LINE, None)
        _drop(counts, dropped, [UNKNOWN])
        order = sorted(counts, key=lambda word: (-counts[word], word))
        limit = len(order) if options.maximum_size is None else options.maximum_size - 2
        kept = [word for word in order[:limit] if counts[word] >= options.minimum_count]
        _drop(counts, dropped, order[len(kept) :])
        mean = round(dropped["bytes"] / dropped["words"]) if dropped["words"] else len(UNKNOWN)
        return cls([UNKNOWN, END_OF_LINE, *kept], mean + 1)

    def at_borders(self, pieces: Iterable[str], place: str) -> Iterator[str]:
        return at_word_ends(pieces, place)

    @property
    def vocabulary_size(self) -> int:
        return len(self.words)

    @property
    def byte_lengths(self) -> np.ndarray:
        return np.array([self.unknown_bytes, 1, *(len(word.encode()) + 1 for word in self.words[2:])], np.int64)

    def encode(self, text: str, place: str = "text", offset: int = 0) -> np.ndarray:
        words = text.replace("\n", f" {END_OF_LINE} ").split()
        return np.fromiter(map(self._ids.get, words, itertools.repeat(0)), np.int64, len(words))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        text = " ".join("\n" if number == 1 else self.words[number] for number in np.asarray(ids).tolist())
        return text.replace(" \n", "\n").replace("\n ", "\n")

    def content(self) -> dict[str, Any]:
        return {"words": self.words, "unknown_bytes": self.unknown_bytes}


def _drop(counts: Counter[str], dropped: Counter[str], words: list[str]) -> None:
    """Stop counting these words, and note how many there were in the text and how long: they become `<unk>`."""
    for word in words:
        count = counts.pop(word, 0)
        dropped["words"] += count
        dropped["bytes"] += count * len(word.encode())


class BpeTokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al. 2016) in GPT-2's form: over bytes, so nothing is unknown, within words.

    `leading_blank`, for separate sentences: each text is encoded as if a blank stood before it, and decoding takes it
    away again. Words carry the blank before them, so the first word of a sentence is the same token as inside one.
    """

    name = "bpe"

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]], leading_blank: bool = False) -> None:
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers

        self.vocabulary, self.merges, self.leading_blank = vocabulary, merges, leading_blank
        self._library = Library(models.BPE(vocab=vocabulary, merges=merges))
        self._library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._library.decoder = decoders.ByteLevel()

    @classmethod
    def learn(cls, texts: Texts, options: TokenizerOptions, leading_blank: bool = False) -> BpeTokenizer:
        """From the training texts; the library keeps the counts of different words only."""
        from tokenizers import Tokenizer as Library
        from tokenizers import models, pre_tokenizers, trainers

        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=options.vocabulary_size, initial_alphabet=alphabet, show_progress=False
        )
        if leading_blank:
            texts = ((place, itertools.chain([" "], pieces)) for place, pieces in texts)
        library.train_from_iterator(_small(piece for _, piece in _words_of(texts)), trainer)
        model = json.loads(library.to_str())["model"]
        return cls(model["vocab"], [(left, right) for left, right in model["merges"]], leading_blank)

    @property
    def vocabulary_size(self) -> int:
        return len(self.vocabulary)

    def at_borders(self, pieces: Iterable[str], place: str) -> Iterator[str]:
        return at_word_ends(pieces, place)

    @property
    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(len(self.vocabulary), np.int64)
        for token, number in self.vocabulary.items():
            lengths[number] = len(token)  # the library writes each byte as one letter
        return lengths

    def encode(self, text: str, place: str = "text", offset: int = 0) -> np.ndarray:
        parts = self._library.encode_batch_fast(list(_small([self.marked(text)])), add_special_tokens=False)
        return np.array([number for part in parts for number in part.ids], np.int64)

    def encode_all(self, texts: Sequence[str], places: Sequence[str]) -> list[np.ndarray]:
        parts = self._library.encode_batch_fast([self.marked(text) for text in texts], add_special_tokens=False)
        return [np.array(part.ids, np.int64) for part in parts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        text = str(self._library.decode(np.asarray(ids).tolist(), skip_special_tokens=False))
        return text.removeprefix(" ") if self.leading_blank else text

    def split_words(self, text: str) -> list[tuple[str, tuple[int, int]]]:
        """The parts that no token reaches over, as the library writes them (a letter for each byte), with places."""
        return list(self._library.pre_tokenizer.pre_tokenize_str(text))

    def marked(self, text: str) -> str:
        """The text with its leading blank, if this tokenizer writes one."""
        return f" {text}" if self.leading_blank and text else text

    def content(self) -> dict[str, Any]:
        content = {"vocabulary": self.vocabulary, "merges": [list(pair) for pair in self.merges]}
        return {**content, "leading_blank": True} if self.leading_blank else content


def _small(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces of about `BPE_PIECE` characters, which the library works on in parallel."""
    for text in texts:
        start = 0
        while border := BORDER.search(text, start + BPE_PIECE):
            yield text[start : border.end()]
            start = border.end()
        yield text[start:]


class SubwordSampler:
    """BPE-dropout (Provilkov et al. 2020, arXiv:1910.13267, algorithm 1): a text is cut differently every time, because
    at each step of merging every possible merge is left out with probability `dropout`. For training texts alone.

    The cut is a function of (seed, key, text): the same in any process, order and number of workers. A word (what
    stands between blanks, with the blank before it) has `variants` cuts, drawn by a generator seeded from (seed, word,
    number of the variant); which of them a place in the text gets is a hash of (seed, key, place). Cuts are drawn when
    they are first needed and kept, so most words cost one look into a dictionary. Words of more than `KEPT_WORD`
    characters are drawn each time; drawing takes time square in the word's length.

    Safe to use from several threads.
    """

    def __init__(self, tokenizer: Tokenizer, dropout: float, seed: int, variants: int = 32) -> None:
        """Raises UserError for a tokenizer that merges nothing, and for numbers out of range."""
        if not isinstance(tokenizer, BpeTokenizer):
            raise UserError(f"subword dropout: found the tokenizer {tokenizer.name}, bpe is allowed")
        if not 0 <= dropout <= 1:
            raise UserError(f"subword dropout: found {dropout}, 0 to 1 is allowed")
        if not 1 <= variants <= 256:
            raise UserError(f"subword dropout: found {variants} variants, 1 to 256 are allowed")
        self.tokenizer, self.dropout, self.seed, self.variants = tokenizer, dropout, seed, variants
        self._ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges)}
        self._variant_of_byte = bytes(byte * variants >> 8 for byte in range(256))
        self._kept: dict[str, list[tuple[int, ...] | None]] = {}
        self._kept_count = 0
        self._lock = threading.Lock()

    def encode(self, text: str, key: int) -> np.ndarray:
        """Token ids of a text: int64 [T]. Another `key` (such as a sample's number and epoch) gives another cut."""
        words = BETWEEN_WORDS.split(self.tokenizer.marked(text))
        hashed = hashlib.shake_128(f"{self.seed} {key}".encode()).digest(len(words))
        ids: list[int] = []
        for word, variant in zip(words, hashed.translate(self._variant_of_byte), strict=True):
            cuts = self._kept.get(word)
            ids += (cuts and cuts[variant]) or self._draw(word, variant)
        return np.array(ids, np.int64)

    def _draw(self, word: str, variant: int) -> tuple[int, ...]:
        """A variant of a word, drawn anew; it is kept, and the words that were kept first make room for it."""
        seed = hashlib.blake2b(f"{self.seed} {variant} {word}".encode(), digest_size=16).digest()
        generator = random.Random(int.from_bytes(seed, "big"))
        parts = self.tokenizer.split_words(word)
        symbols = itertools.chain.from_iterable(self._merge(part, generator) for part, _ in parts)
        ids = tuple([self.tokenizer.vocabulary[symbol] for symbol in symbols])
        if len(word) <= KEPT_WORD:
            self._keep(word, variant, ids)
        return ids

    def _keep(self, word: str, variant: int, ids: tuple[int, ...]) -> None:
        with self._lock:
            cuts = self._kept.setdefault(word, [None] * self.variants)
            same = next((cut for cut in cuts if cut == ids), ids)
            self._kept_count += cuts[variant] is None
            cuts[variant] = same
            while self._kept_count > KEPT_CUTS:
                oldest = self._kept.pop(next(iter(self._kept)))
                self._kept_count -= sum(cut is not None for cut in oldest)

    def _merge(self, symbols: Iterable[str], generator: random.Random) -> list[str]:
        """One merge at a time, the one learnt first among those that are not dropped in this step."""
        word, never = list(symbols), len(self._ranks)
        ranks = [self._ranks.get(pair, never) for pair in itertools.pairwise(word)]
        while True:
            best, at = never, -1
            for place, rank in enumerate(ranks):
                if rank < best and generator.random() >= self.dropout:
                    best, at = rank, place
            if at < 0:
                return word
            word[at : at + 2] = [word[at] + word[at + 1]]
            del ranks[at]
            for place in range(max(at - 1, 0), min(at + 1, len(ranks))):
                ranks[place] = self._ranks.get((word[place], word[place + 1]), never)


def learn(texts: Texts, options: TokenizerOptions, leading_blank: bool = False) -> Tokenizer:
    """The tokenizer of these options for the training texts; `leading_blank` is for the BPE of separate sentences."""
    if options.kind == "words":
        return WordTokenizer.learn(texts, options)
    if options.kind == "bpe":
        return BpeTokenizer.learn(texts, options, leading_blank)
    if options.kind == "characters":
        return CharacterTokenizer.learn(texts, options)
    return ByteTokenizer()


class _Stored(Strict):
    """The JSON of every kind of tokenizer."""

    format: Literal["unroll tokenizer 1"]
    kind: Literal["bytes", "characters", "words", "bpe"]
    characters: str = ""
    unknown: bool = False
    words: list[str] = Field(default_factory=list)
    unknown_bytes: int = Field(1, ge=1)
    vocabulary: dict[str, int] = Field(default_factory=dict)
    merges: list[tuple[str, str]] = Field(default_factory=list)
    leading_blank: bool = False

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if len(set(self.characters)) < len(self.characters) or len(set(self.words)) < len(self.words):
            raise ValueError("a token appears twice")
        if self.kind == "words" and self.words[:2] != [UNKNOWN, END_OF_LINE]:
            raise ValueError(f"words do not begin with {UNKNOWN}, {END_OF_LINE}")
        if sorted(self.vocabulary.values()) != list(range(len(self.vocabulary))):
            raise ValueError("ids of the vocabulary are not 0, 1, 2, ...")
        if any(not {left, right, left + right} <= self.vocabulary.keys() for left, right in self.merges):
            raise ValueError("a merge is not in the vocabulary")
        return self


def load(path: Path) -> Tokenizer:
    """A tokenizer that was saved.

    Raises:
        UserError: no such file, or not the JSON that `save` writes.
    """
    try:
        stored = _Stored.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; prepare the data set first") from None
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{path}: not a tokenizer of this project: {where} {problem['msg']}") from None
    if stored.kind == "words":
        return WordTokenizer(stored.words, stored.unknown_bytes)
    if stored.kind == "bpe":
        return BpeTokenizer(stored.vocabulary, stored.merges, stored.leading_blank)
    if stored.kind == "characters":
        return CharacterTokenizer(stored.characters, stored.unknown)
    return ByteTokenizer()
