"""Parallel text for translation: pairs of a source and a target sentence become samples (layout: `data/pairs.py`).

The pairs come either from two files a split, line n of one translating line n of the other (each source names its
`split` and `language`), or from one table with tab-separated columns, which is split by a hash of one side: rows that
share a sentence of that side (but for case and blanks around it) fall into one split.

Sentences are taken as they stand: no normalisation, no tokenisation before the tokenizer, line ends alone are stripped.
Of the training split, pairs are skipped and counted by reason: an empty side, a source sentence that occurs in another
split (but for case and blanks around it), a repetition (if asked for), more tokens than `longest`. Pairs of the other
splits are never dropped: scores are over all of them.

Memory: the source sentences of all splits but training, and 16 bytes for each different training pair.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from unroll.config import DatasetEntry, Source, Strict, check
from unroll.data import tokenizers
from unroll.data.pairs import Pair, PairTokenizers, PairWriter
from unroll.data.sources import Passes, Progress, RawFile, check_content, locate, no_progress
from unroll.data.splits import HashSplit, check_fractions, check_names, folded
from unroll.data.tokenizers import Tokenizer, TokenizerOptions
from unroll.data.writers import write_manifest
from unroll.errors import UserError
from unroll.files import new_folder

TRAIN = "train"
EMPTY_SOURCE, EMPTY_TARGET, ELSEWHERE, DUPLICATE, TOO_LONG = REASONS = (
    "empty_source",
    "empty_target",
    "in_other_split",
    "duplicate",
    "too_long",
)


class Options(Strict):
    """source, target: languages. tokenizer: of the target side, and of the source side unless source_tokenizer is
    given; joint: one for both, learnt on both sides of the training split. lowercase: what the tokenizers see.

    longest: training pairs with more tokens on a side are skipped. skip_limit: the share of training pairs that may be
    skipped for being empty or too long. drop_duplicates: keep the first of equal training pairs only. limit: use only
    that many pairs of each split.

    Of a table: columns {language: number of the column, from 0}, split_by: the language whose sentences are hashed,
    split {name: fraction}.
    """

    source: str
    target: str
    tokenizer: TokenizerOptions
    source_tokenizer: TokenizerOptions | None = None
    joint: bool = False
    lowercase: bool = False
    longest: int = Field(100, ge=1)
    skip_limit: float = Field(0.1, ge=0, le=1)
    drop_duplicates: bool = False
    limit: int | None = Field(None, ge=1)
    columns: dict[str, int] | None = None
    split_by: str | None = None
    split: dict[str, float] | None = None

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.source == self.target:
            raise ValueError("source and target must be two languages")
        if self.joint and self.source_tokenizer:
            raise ValueError("a joint tokenizer leaves no place for source_tokenizer")
        table = {"columns": self.columns, "split_by": self.split_by, "split": self.split}
        if any(table.values()) and not all(table.values()):
            missing = ", ".join(key for key, value in table.items() if not value)
            raise ValueError(f"a table needs columns, split_by and split; {missing} is missing")
        if self.columns and self.split and self.split_by:
            self._check_table(self.columns, self.split_by)
            check_fractions(self.split)
        return self

    def _check_table(self, columns: dict[str, int], split_by: str) -> None:
        languages = {self.source, self.target}
        if set(columns) != languages or min(columns.values()) < 0 or len(set(columns.values())) < 2:
            raise ValueError(f"columns must give {self.source} and {self.target} different columns, counted from 0")
        if split_by not in languages:
            raise ValueError(f"split_by must be {self.source} or {self.target}")


def prepare(entry: DatasetEntry, name: str, root: Path, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Write the prepared folder `out` and give its manifest. `progress` counts bytes read, over all passes.

    Raises:
        UserError: a source that is missing or wrong, files of different length, text that is not UTF-8 or holds NUL
            bytes, options that do not fit, too many pairs skipped, an empty split.
    """
    place = f"params.yaml: datasets.{name}"
    options: Options = check(Options, entry.options, f"{place}.options")
    _check_sources(entry.sources, options, place)
    files = [RawFile(locate(source, root, progress)) for source in entry.sources]
    corpus = _Table(files[0], options) if options.columns else _Files(entry.sources, files, options)
    learnt = _learnt_tokenizers(options)
    corpus.count_passes(progress, [corpus.others, *[[TRAIN]] * learnt, corpus.splits])
    elsewhere = {folded(pair.source) for _, pair in corpus.pairs(corpus.others)} if corpus.others else set()
    with new_folder(out) as folder:
        both = _learn(corpus, lambda: _TrainingFilter(elsewhere, options.drop_duplicates), options)
        training = _TrainingFilter(elsewhere, options.drop_duplicates)
        splits = _write(folder, corpus, training, both, options)
        check_content(entry.sources, files)
        _check_result(splits, training, options, place)
        manifest = {
            "dataset": name,
            "preparer": "parallel_text",
            "kind": "samples",
            "options": options.model_dump(mode="json"),
            "licence": entry.licence,
            "sources": [{"file": s.file, "sha256": f.sha256} for s, f in zip(entry.sources, files, strict=True)],
            **both.save(folder),
            "joint": options.joint,
            "source_language": options.source,
            "target_language": options.target,
            "splits": splits,
            "skipped": {reason: training.skipped[reason] for reason in REASONS},
        }
        return write_manifest(folder, manifest)


def _check_sources(sources: list[Source], options: Options, place: str) -> None:
    if options.columns:
        if len(sources) != 1 or sources[0].split or sources[0].language:
            raise UserError(f"{place}: a table (options.columns) is exactly one source, without split and language")
        check_names(options.split or {}, f"{place}.options.split")
        return
    for source in sources:
        if source.split is None or source.language is None:
            raise UserError(f"{place}: source {source.file}: split and language are expected, or options.columns")
    check_names(dict.fromkeys(str(source.split) for source in sources), place)
    for split in dict.fromkeys(source.split for source in sources):
        found = [str(source.language) for source in sources if source.split == split]
        if sorted(found) != sorted([options.source, options.target]):
            expected = f"one source in {options.source} and one in {options.target} expected"
            raise UserError(f"{place}: split {split!r}: {expected}, found {', '.join(found)}")


# ---------------------------------------------------------------- reading


class _Corpus(ABC):
    """The pairs of all splits, read as often as needed."""

    splits: list[str]
    passes: Passes

    @property
    def others(self) -> list[str]:
        return [split for split in self.splits if split != TRAIN]

    def count_passes(self, progress: Progress, readings: list[list[str]]) -> None:
        """`readings`: the splits of each reading to come."""
        self.passes = Passes(progress, sum(self.packed_bytes(splits) for splits in readings if splits))

    @abstractmethod
    def packed_bytes(self, splits: Collection[str]) -> int:
        """Bytes on disk that reading these splits takes."""

    @abstractmethod
    def pairs(self, splits: Collection[str]) -> Iterator[tuple[str, Pair]]:
        """Every pair of these splits with the name of its split. Files are read to their ends."""


class _Files(_Corpus):
    """Two files a split."""

    def __init__(self, sources: list[Source], files: list[RawFile], options: Options) -> None:
        self.limit = options.limit
        named = {(source.split, source.language): file for source, file in zip(sources, files, strict=True)}
        self.splits = list(dict.fromkeys(str(source.split) for source in sources))
        self.files = {s: (named[s, options.source], named[s, options.target]) for s in self.splits}

    def packed_bytes(self, splits: Collection[str]) -> int:
        return sum(file.packed_bytes for split in splits for file in self.files[split])

    def pairs(self, splits: Collection[str]) -> Iterator[tuple[str, Pair]]:
        for split in splits:
            for number, pair in enumerate(self._side_by_side(*self.files[split])):
                if self.limit is None or number < self.limit:
                    yield split, pair

    def _side_by_side(self, source_file: RawFile, target_file: RawFile) -> Iterator[Pair]:
        sources, targets = self.passes.lines(source_file), self.passes.lines(target_file)
        number, ended = 0, object()
        while True:
            source, target = next(sources, ended), next(targets, ended)
            if source is ended and target is ended:
                return
            if source is ended or target is ended:
                break
            number += 1
            places = f"{source_file.path}: line {number}", f"{target_file.path}: line {number}"
            yield Pair(str(source), str(target), *places)
        left = [
            number + (side is not ended) + sum(1 for _ in rest) for side, rest in ((source, sources), (target, targets))
        ]
        raise UserError(
            f"{source_file.path} has {left[0]} lines, {target_file.path} has {left[1]}; "
            "line n of one must be the translation of line n of the other"
        )


class _Table(_Corpus):
    """One file with tab-separated columns, split by the hash of one of them."""

    def __init__(self, file: RawFile, options: Options) -> None:
        columns = options.columns or {}
        self.file, self.limit = file, options.limit
        self.columns = {language: columns[language] for language in (options.source, options.target)}
        self.by_source = options.split_by == options.source
        self.split_of = HashSplit(options.split or {})
        self.splits = self.split_of.names

    def packed_bytes(self, splits: Collection[str]) -> int:
        return self.file.packed_bytes

    def pairs(self, splits: Collection[str]) -> Iterator[tuple[str, Pair]]:
        seen: Counter[str] = Counter()
        for number, line in enumerate(self.passes.lines(self.file), 1):
            place = f"{self.file.path}: line {number}"
            cells = line.split("\t")
            source, target = (self._cell(cells, language, place) for language in self.columns)
            split = self.split_of(source if self.by_source else target)
            seen[split] += 1
            if split in splits and (self.limit is None or seen[split] <= self.limit):
                yield split, Pair(source, target, place, place)

    def _cell(self, cells: list[str], language: str, place: str) -> str:
        column = self.columns[language]
        if column >= len(cells):
            raise UserError(
                f"{place}: {len(cells)} columns found, {language} is expected in column {column} (separated by tabs, "
                "counted from 0)"
            )
        return cells[column]


class _TrainingFilter:
    """Decides which training pairs are kept, for one reading, and counts the others by reason."""

    def __init__(self, elsewhere: set[str], drop_duplicates: bool) -> None:
        self.elsewhere, self.drop_duplicates = elsewhere, drop_duplicates
        self.skipped: Counter[str] = Counter()
        self.pairs = self.duplicates = 0
        self._seen: set[bytes] = set()

    def keeps(self, pair: Pair) -> bool:
        """Whether a pair is trained on, but for its length in tokens."""
        self.pairs += 1
        reason = self._reason(pair)
        if reason:
            self.skipped[reason] += 1
        return reason is None

    def _reason(self, pair: Pair) -> str | None:
        if not pair.source.strip():
            return EMPTY_SOURCE
        if not pair.target.strip():
            return EMPTY_TARGET
        if folded(pair.source) in self.elsewhere:
            return ELSEWHERE
        digest = hashlib.blake2b(f"{pair.source}\n{pair.target}".encode(), digest_size=16).digest()
        if digest in self._seen:
            self.duplicates += 1
            return DUPLICATE if self.drop_duplicates else None
        self._seen.add(digest)
        return None


# ---------------------------------------------------------------- learning and writing


def _learnt_tokenizers(options: Options) -> int:
    """How often the training split is read to learn tokenizers."""
    sides = [options.tokenizer] if options.joint else [options.tokenizer, options.source_tokenizer or options.tokenizer]
    return sum(side.kind != "bytes" for side in sides)


def _learn(corpus: _Corpus, new_filter: Callable[[], _TrainingFilter], options: Options) -> PairTokenizers:
    """The tokenizers of both sides, from the training pairs that are kept."""

    def texts(source: bool, target: bool) -> Iterator[tuple[str, list[str]]]:
        training = new_filter()
        for _, pair in corpus.pairs([TRAIN]):
            if training.keeps(pair):
                if source:
                    yield pair.source_place, [pair.source.lower() if options.lowercase else pair.source]
                if target:
                    yield pair.target_place, [pair.target.lower() if options.lowercase else pair.target]

    def learnt(kind: TokenizerOptions, source: bool, target: bool) -> Tokenizer:
        return tokenizers.learn(texts(source, target), kind, leading_blank=True)

    if options.joint:
        joint = learnt(options.tokenizer, source=True, target=True)
        return PairTokenizers(joint, joint, options.lowercase)
    source = learnt(options.source_tokenizer or options.tokenizer, source=True, target=False)
    return PairTokenizers(source, learnt(options.tokenizer, source=False, target=True), options.lowercase)


def _write(
    folder: Path, corpus: _Corpus, training: _TrainingFilter, both: PairTokenizers, options: Options
) -> dict[str, dict[str, Any]]:
    """The shards of every split; gives the manifest's `splits`."""
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(PairWriter(folder, split, both, options.longest, drop_longer=split == TRAIN))
            for split in corpus.splits
        }
        for split, pair in corpus.pairs(corpus.splits):
            if split != TRAIN or training.keeps(pair):
                writers[split].write(pair)
    training.skipped[TOO_LONG] = writers[TRAIN].too_long
    splits = {split: writer.summary for split, writer in writers.items()}
    splits[TRAIN].update(pairs_read=training.pairs, duplicates=training.duplicates)
    return splits


def _check_result(splits: dict[str, dict[str, Any]], training: _TrainingFilter, options: Options, place: str) -> None:
    counts = ", ".join(f"{reason} {training.skipped[reason]}" for reason in REASONS if training.skipped[reason])
    bad = sum(training.skipped[reason] for reason in (EMPTY_SOURCE, EMPTY_TARGET, TOO_LONG))
    if bad > options.skip_limit * training.pairs:
        raise UserError(
            f"{place}: {bad} of {training.pairs} training pairs are empty or longer than {options.longest} tokens "
            f"({counts}); options.skip_limit allows a share of {options.skip_limit}"
        )
    for split, summary in splits.items():
        if not summary["samples"]:
            raise UserError(f"{place}: split {split!r} is empty{f' (skipped: {counts})' if counts else ''}")
