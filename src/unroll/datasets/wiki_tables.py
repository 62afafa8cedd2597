"""WikiTableQuestions: questions about tables of Wikipedia with their answers (Pasupat & Liang 2015, arXiv:1508.00305).

Sources: an archive of CSV tables, `csv/<n>-csv/<m>.csv`, a quote within a field written \\", and for each split a table of
questions, tab-separated: id, utterance, context (which table), targetValue (the values of the answer, joined by |).

A sample is what `datasets/table_questions.py` describes, for text: `rows` holds the number that a cell is or begins with
(thousands with commas; a date as a year with its fraction), null where there is none, and `texts` the cells as they are.
Beside it

    names, name_sizes     the words of all columns' names, and how many each has
    matches               cells whose text stands in the question; if there is none, those that share a content word with it
    frequent              cells that say what most cells of their column say
    column_matches        for each column, the share of its name's content words that are in the question
    answer, cells, parts  the answer as a number, if it is one, and the cells that say a part of it, from 1 on; of an answer
                          that no cell says and that is no number there is neither; `unreachable` counts
                          these, and `train` leaves them out

Words are what stands between blanks and signs, in small letters; those seen `minimum_count` times in training questions
and in their tables' headers are the vocabulary, the others are <unknown>; numbers are <number>. Rows after the first
`longest` of a table are cut (counted as `cut`).
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from unroll.config import DatasetEntry, Source, Strict, check
from unroll.data.archives import is_archive, members
from unroll.data.shards import token_type
from unroll.data.sources import Passes, Progress, RawFile, check_content, locate, no_progress
from unroll.data.splits import check_names
from unroll.data.writers import SampleWriter, write_manifest
from unroll.errors import UserError
from unroll.files import new_folder

UNKNOWN, NUMBER = "<unknown>", "<number>"
HEADER = ["id", "utterance", "context", "targetValue"]
TABLE_BYTES = 4_000_000
NUMBERS = 4
"""Numbers of a question that are kept."""
_WORD = re.compile(r"\d[\d,]*(?:\.\d+)?|[^\W\d_]+")
_NUMBER = re.compile(r"[$£€#]?\s*([-+−]?\d[\d,]*(?:\.\d+)?)")
_MONTH = {name: i for i, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split())}  # noqa: SIM905
_DATE = re.compile(r"(?:(\d{1,2}) )?([a-z]{3})[a-z]*\.?(?: (\d{1,2}))?,? (\d{4})")
COMMON = """a an the of in on at to for from by with and or is are was were be been did do does has have had which what who
when where how many much that this it its as than there their his her he she they total number most least"""
_COMMON = frozenset(COMMON.split())


class Options(Strict):
    """`minimum_count` of a word of the vocabulary; `longest`: rows of a table that are kept."""

    minimum_count: int = Field(5, ge=1)
    longest: int = Field(60, ge=1)


@dataclass(frozen=True)
class Asked:
    """A question as it stands in its file."""

    id: str
    text: str
    table: str
    answers: list[str]
    place: str


@dataclass(frozen=True)
class Sheet:
    """A table: names of its columns, its cells, and the number of each cell."""

    columns: list[str]
    cells: list[list[str]]
    numbers: list[list[float | None]]
    cut: bool


def prepare(entry: DatasetEntry, name: str, root: Path, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Write the prepared folder `out` and give its manifest. `progress` counts bytes of the questions.

    Raises:
        UserError: options, a source missing or damaged, a malformed line of questions or table (file and line).
    """
    place = f"params.yaml: datasets.{name}"
    options: Options = check(Options, entry.options, f"{place}.options")
    archives = [source for source in entry.sources if is_archive(source.file)]
    asked = [source for source in entry.sources if not is_archive(source.file)]
    if len(archives) != 1:
        raise UserError(f"{place}.sources: one archive of tables is needed, found {len(archives)}")
    splits = [str(source.split) for source in asked]
    check_names(splits, f"{place}.sources")
    files = [RawFile(locate(source, root)) for source in asked]
    questions = dict(zip(splits, _questions(files, progress), strict=True))
    check_content(asked, files)
    wanted = {question.table for of_split in questions.values() for question in of_split}
    archive = locate(archives[0], root)
    sheets = dict(_tables(archive, wanted, options.longest))
    words = _vocabulary(questions["train"], sheets, options.minimum_count)
    skipped: Counter[str] = Counter()
    with new_folder(out) as folder:
        summaries = {}
        for split, of_split in questions.items():
            with SampleWriter(folder, split, len(words)) as writer:
                for sample in _samples(of_split, sheets, words, split, archive, skipped):
                    writer.write(sample, len(sample["question"]), sample["operations"])
            summaries[split] = writer.summary
        manifest = {
            "dataset": name,
            "preparer": "wiki_tables",
            "kind": "samples",
            "options": options.model_dump(mode="json"),
            "licence": entry.licence,
            "sources": [_described(source) for source in entry.sources],
            "words": list(words),
            "vocabulary": len(words),
            "token_bytes": token_type(len(words)).itemsize,
            "splits": summaries,
            "skipped": dict(sorted(skipped.items())),
        }
        return write_manifest(folder, manifest)


def _described(source: Source) -> dict[str, Any]:
    return {"file": source.file, "split": source.split, "sha256": source.sha256}


# ---------------------------------------------------------------- reading


def _questions(files: list[RawFile], progress: Progress) -> Iterator[list[Asked]]:
    passes = Passes(progress, sum(file.packed_bytes for file in files))
    for file in files:
        yield list(read_questions(file, passes))


def read_questions(file: RawFile, passes: Passes) -> Iterator[Asked]:
    """The questions of one file.

    Raises:
        UserError: another header, a line without four fields, or an empty question or answer (file and line).
    """
    for number, line in enumerate(passes.lines(file), 1):
        place, fields = f"{file.path}: line {number}", line.split("\t")
        if number == 1:
            if fields != HEADER:
                raise UserError(f"{place}: header {line[:80]!r} found, {' '.join(HEADER)} expected, separated by tabs")
            continue
        if len(fields) != len(HEADER):
            raise UserError(f"{place}: {len(fields)} fields found, {len(HEADER)} expected, separated by tabs")
        if not all(field.strip() for field in fields):
            empty = HEADER[[bool(field.strip()) for field in fields].index(False)]
            raise UserError(f"{place}: {empty} is empty")
        name, text, table, answer = fields
        yield Asked(name, unescape(text), table, [unescape(part) for part in answer.split("|")], place)


def unescape(text: str) -> str:
    """A field of these files as it was: \\n, \\p and \\\\ stand for a line end, | and a backslash."""
    return re.sub(r"\\([np\\])", lambda found: {"n": "\n", "p": "|", "\\": "\\"}[found[1]], text)


def _tables(archive: Path, wanted: set[str], longest: int) -> Iterator[tuple[str, Sheet]]:
    for name, read in members(archive):
        if name in wanted:
            content = read(TABLE_BYTES)
            if content is None:
                raise UserError(f"{archive}: {name}: more than {TABLE_BYTES} bytes")
            yield name, read_table(content, f"{archive}: {name}", longest)


def read_table(content: bytes, place: str, longest: int) -> Sheet:
    """A CSV table.

    Raises:
        UserError: not UTF-8, no row, a quote that is not closed, or a row of another width than the header (file and line).
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{place}: line {line}: not UTF-8 (0x{content[error.start]:02x})") from None
    reader = csv.reader(io.StringIO(text, newline=""), escapechar="\\", doublequote=False, strict=True)
    rows: list[list[str]] = []
    try:
        for row in reader:
            if rows and len(row) != len(rows[0]):
                raise UserError(
                    f"{place}: line {reader.line_num}: {len(row)} cells found, the header has {len(rows[0])}"
                )
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{place}: line {reader.line_num}: not a table: {error}") from None
    if len(rows) < 2 or not rows[0]:
        raise UserError(f"{place}: line {len(rows)}: a header and a row at least are expected")
    cells = rows[1 : longest + 1]
    return Sheet(rows[0], cells, [[cell_number(cell) for cell in row] for row in cells], len(rows) > longest + 1)


def cell_number(text: str) -> float | None:
    """The number that a cell is or begins with; a date is its year and the fraction of it that has passed."""
    plain = text.strip().lower()
    if date := _DATE.search(plain):
        day, month, other, year = date.groups()
        if month in _MONTH:
            return round(int(year) + _MONTH[month] / 12 + (int(day or other or 1) - 1) / 372, 4)
    found = _NUMBER.match(plain)
    if not found:
        return None
    digits = found[1].replace(",", "").replace("−", "-")
    return float(digits) if len(digits) < 16 else None


# ---------------------------------------------------------------- samples


def tokens(text: str) -> list[str]:
    """The words and numbers of a text, in small letters."""
    return _WORD.findall(text.lower())


def _vocabulary(questions: list[Asked], sheets: dict[str, Sheet], minimum: int) -> dict[str, int]:
    """Words of the training split and their numbers, <unknown> and <number> first."""
    counts: Counter[str] = Counter()
    for question in questions:
        heads = sheets[question.table].columns if question.table in sheets else []
        counts.update(word for text in (question.text, *heads) for word in tokens(text) if not word[0].isdigit())
    kept = sorted(word for word, count in counts.items() if count >= minimum)
    return {word: number for number, word in enumerate([UNKNOWN, NUMBER, *kept])}


def _samples(
    questions: list[Asked],
    sheets: dict[str, Sheet],
    words: dict[str, int],
    split: str,
    archive: Path,
    skipped: Counter[str],
) -> Iterator[dict[str, Any]]:
    number = 0
    for question in questions:
        if question.table not in sheets:
            raise UserError(f"{question.place}: table {question.table!r} is not in {archive}")
        sheet = sheets[question.table]
        sample = _sample(number, question, sheet, words)
        skipped["cut"] += sheet.cut
        if sample["answer"] is None and not len(sample["cells"]):
            skipped[f"{split}: unreachable"] += 1
            if split == "train":
                continue
        number += 1
        yield sample


def _sample(number: int, question: Asked, sheet: Sheet, words: dict[str, int]) -> dict[str, Any]:
    said = tokens(question.text)
    figures = [i for i, word in enumerate(said) if word[0].isdigit()][:NUMBERS]
    names = [tokens(name) or [UNKNOWN] for name in sheet.columns]
    content = set(said) - _COMMON
    sample = {
        "id": number,
        "question_id": question.id,
        "text": question.text,
        "operations": 1,
        "program": [],
        "numbers": [float(said[i].replace(",", "")) for i in figures],
        "columns": sheet.columns,
        "rows": sheet.numbers,
        "texts": sheet.cells,
        "answers": question.answers,
        "answer": _answer_number(question.answers),
        "name_sizes": [len(name) for name in names],
        "column_matches": [_shared(name, content) for name in names],
        "question": _ids(said, words),
        "names": _ids([word for name in names for word in name], words),
        "places": np.array(figures, np.int64),
        "matches": _matches(said, content, sheet),
        "frequent": _frequent(sheet),
    }
    cells, parts = _said_by(question.answers, sheet)
    return {**sample, "cells": cells, "parts": parts}


def _ids(said: list[str], words: dict[str, int]) -> np.ndarray:
    return np.array(
        [words[NUMBER] if word[0].isdigit() else words.get(word, words[UNKNOWN]) for word in said], np.int64
    )


def _shared(name: list[str], content: set[str]) -> float:
    kept = [word for word in name if word not in _COMMON]
    return round(sum(word in content for word in kept) / len(kept), 3) if kept else 0.0


def _places(sheet: Sheet) -> Iterator[tuple[int, str]]:
    size = len(sheet.columns)
    return ((row * size + column, cell) for row, cells in enumerate(sheet.cells) for column, cell in enumerate(cells))


def _matches(said: list[str], content: set[str], sheet: Sheet) -> np.ndarray:
    """Cells whose words stand in the question one after the other; if none does, those with a content word of it."""
    text = f" {' '.join(said)} "
    whole = [place for place, cell in _places(sheet) if (found := tokens(cell)) and f" {' '.join(found)} " in text]
    if not whole:
        whole = [place for place, cell in _places(sheet) if content & set(tokens(cell))]
    return np.array(whole, np.int64)


def _frequent(sheet: Sheet) -> np.ndarray:
    size, found = len(sheet.columns), []
    for column in range(size):
        texts = [row[column] for row in sheet.cells]
        counts = Counter(texts)
        most = max(counts.values())
        found += [row * size + column for row, text in enumerate(texts) if most > 1 and counts[text] == most]
    return np.array(sorted(found), np.int64)


def _answer_number(answers: list[str]) -> float | None:
    """The answer as a number, if it is one alone."""
    if len(answers) != 1:
        return None
    found = _NUMBER.fullmatch(answers[0].strip())
    return cell_number(answers[0]) if found else None


def _said_by(answers: list[str], sheet: Sheet) -> tuple[np.ndarray, np.ndarray]:
    """The cells that say a part of the answer and which part; none unless every part is said."""
    wanted = {_plain(answer): part for part, answer in enumerate(answers, 1)}
    found = [(place, wanted[text]) for place, cell in _places(sheet) if (text := _plain(cell)) in wanted]
    if len({part for _, part in found}) < len(wanted):
        found = []
    cells, parts = zip(*found, strict=True) if found else ((), ())
    order = {part: number for number, part in enumerate(sorted(set(parts)), 1)}
    return np.array(cells, np.int64), np.array([order[part] for part in parts], np.int64)


def _plain(text: str) -> str:
    """A text without signs and case, to find it in the table."""
    return " ".join(tokens(text)) or text.strip().lower()
