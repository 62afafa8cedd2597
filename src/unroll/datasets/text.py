"""Plain text for language models: one stream of token ids per split.

Splits are either fractions of the characters of one file, in file order and cut at floor(n x fraction) characters
(the convention of char-rnn and nanoGPT for tiny-shakespeare), or the `split` that each source names; sources of one
split follow each other. The text is streamed, so its size does not matter: fractions take one quick pass to count the
characters, then a pass over the training split learns the tokenizer, then one writes the shards. Characters are taken
as they are: no normalisation, line ends untouched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from unroll.config import DatasetEntry, Strict, check
from unroll.data import tokenizers
from unroll.data.shards import token_type
from unroll.data.sources import Passes, Progress, RawFile, check_content, file_sha256, locate, no_progress
from unroll.data.splits import check_fractions, check_names, exact
from unroll.data.tokenizers import Tokenizer, TokenizerOptions
from unroll.data.writers import RECORD_TOKENS, StreamWriter, write_manifest
from unroll.errors import UserError
from unroll.files import new_folder


class Options(Strict):
    """tokenizer: see `TokenizerOptions`. split: {name: fraction} of the one source, in file order; without it each
    source names its split. limit: use only that many characters of each source. record_tokens: ids to a tar record."""

    tokenizer: TokenizerOptions
    split: dict[str, float] | None = None
    limit: int | None = Field(None, ge=1)
    record_tokens: int = Field(RECORD_TOKENS, ge=1)

    @field_validator("split")
    @classmethod
    def fractions(cls, split: dict[str, float] | None) -> dict[str, float] | None:
        if split is not None:
            check_fractions(split)
        return split


@dataclass(frozen=True)
class Part:
    """Characters `start` .. `stop - 1` of a file belong to `split`; `stop` None means up to its end."""

    split: str
    file: RawFile
    start: int = 0
    stop: int | None = None


def prepare(entry: DatasetEntry, name: str, root: Path, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Write the prepared folder `out` and give its manifest. `progress` counts bytes read, over all passes.

    Raises:
        UserError: a source that is missing or wrong, text that is not UTF-8, options that do not fit, an empty split.
    """
    place = f"params.yaml: datasets.{name}"
    options: Options = check(Options, entry.options, f"{place}.options")
    _check_splits(entry, options, place)
    files = [RawFile(locate(source, root, progress)) for source in entry.sources]
    training = [file for source, file in zip(entry.sources, files, strict=True) if source.split in (None, "train")]
    counted = files if options.split else []
    learnt = [] if options.tokenizer.kind == "bytes" else training
    passes = Passes(progress, sum(file.packed_bytes for file in [*counted, *learnt, *files]))
    parts = _fractions(files[0], options, passes) if options.split else _marked(entry, files, options)
    _refuse_empty([part for part in parts if part.stop == part.start or part.file.packed_bytes == 0], place)
    with new_folder(out) as folder:
        tokenizer = tokenizers.learn(_training_texts(parts, training, passes), options.tokenizer)
        tokenizer.save(folder / "tokenizer.json")
        splits = _write(folder, parts, tokenizer, options, passes)
        _refuse_empty([part for part in parts if not splits.get(part.split, {}).get("tokens")], place)
        check_content(entry.sources, files)
        manifest = {
            "dataset": name,
            "preparer": "text",
            "kind": "stream",
            "options": options.model_dump(mode="json"),
            "licence": entry.licence,
            "sources": [{"file": s.file, "sha256": f.sha256} for s, f in zip(entry.sources, files, strict=True)],
            "tokenizer": "tokenizer.json",
            "tokenizer_sha256": file_sha256(folder / "tokenizer.json"),
            "vocabulary": tokenizer.vocabulary_size,
            "token_bytes": token_type(tokenizer.vocabulary_size).itemsize,
            "record_tokens": options.record_tokens,
            "splits": splits,
            "skipped": {},
        }
        return write_manifest(folder, manifest)


def _check_splits(entry: DatasetEntry, options: Options, place: str) -> None:
    marked = [source.split for source in entry.sources]
    if options.split and (len(marked) != 1 or marked[0]):
        raise UserError(f"{place}.options.split: fractions need exactly one source, without a split of its own")
    names = list(options.split or marked)
    if None in names:
        file = entry.sources[names.index(None)].file
        raise UserError(f"{place}: source {file} names no split, and options.split gives no fractions")
    check_names(map(str, names), place)


def _fractions(file: RawFile, options: Options, passes: Passes) -> list[Part]:
    characters = sum(map(len, passes.text(file)))
    characters = min(characters, options.limit or characters)
    parts, start, share = [], 0, Fraction(0)
    for split, fraction in (options.split or {}).items():
        share += exact(fraction)
        stop = int(characters * share)
        parts.append(Part(split, file, start, stop))
        start = stop
    return parts


def _marked(entry: DatasetEntry, files: list[RawFile], options: Options) -> list[Part]:
    """One part a source, the sources of a split side by side."""
    pairs = list(zip([str(source.split) for source in entry.sources], files, strict=True))
    names = list(dict.fromkeys(split for split, _ in pairs))
    pairs.sort(key=lambda pair: names.index(pair[0]))
    return [Part(split, file, 0, options.limit) for split, file in pairs]


def _text(parts: list[Part], passes: Passes) -> Iterator[tuple[Part, str]]:
    """The text of every part in pieces, each file read once and to its end (so that its hash is known)."""
    for file, group in groupby(parts, key=lambda part: part.file):
        waiting, place = deque(group), 0
        for piece in passes.text(file):
            while piece and waiting:
                part = waiting[0]
                own = piece if part.stop is None else piece[: part.stop - place]
                yield part, own
                place, piece = place + len(own), piece[len(own) :]
                if place == part.stop:
                    waiting.popleft()


def _training_texts(parts: list[Part], training: list[RawFile], passes: Passes) -> Iterator[tuple[str, Iterator[str]]]:
    of_training_files = _text([part for part in parts if part.file in training], passes)
    for part, group in groupby(of_training_files, key=lambda item: item[0]):
        if part.split == "train":
            yield str(part.file.path), (piece for _, piece in group)


def _write(
    folder: Path, parts: list[Part], tokenizer: Tokenizer, options: Options, passes: Passes
) -> dict[str, dict[str, Any]]:
    """The shards of every split; gives the manifest's `splits`. Words do not reach over from one file to the next."""
    splits = {}
    for split, of_split in groupby(_text(parts, passes), key=lambda item: item[0].split):
        sizes = {"bytes": 0, "characters": 0}
        with StreamWriter(folder, split, tokenizer.vocabulary_size, options.record_tokens) as writer:
            for part, of_part in groupby(of_split, key=lambda item: item[0]):
                text = _measured((piece for _, piece in of_part), sizes)
                for ids in tokenizer.encode_pieces(text, str(part.file.path), part.start):
                    writer.write(ids)
        splits[split] = {**sizes, **writer.summary}
    return splits


def _measured(pieces: Iterator[str], sizes: dict[str, int]) -> Iterator[str]:
    for piece in pieces:
        sizes["characters"] += len(piece)
        sizes["bytes"] += len(piece) if piece.isascii() else len(piece.encode())
        yield piece


def _refuse_empty(empty: list[Part], place: str) -> None:
    if empty:
        raise UserError(f"{place}: split {empty[0].split!r} is empty ({empty[0].file.path})")
