"""Generated tables of numbers with questions about them that take up to three operations to answer.

In the manner of the synthetic data of Neelakantan, Le & Sutskever 2016, "Neural programmer", arXiv:1511.04834, section
4.1: columns with names, rows of whole numbers, questions in words with numbers in them, and nothing but the answer to
learn from. An operation is a comparison, a superlative, an aggregation or a difference; two are joined by `and` or `or`.

    1   sum of a column; number of rows; all cells of a column
    2   the same where a column is above or below a number; cell of a column where another one is largest or smallest
    3   the same under two comparisons joined by and/or; superlative under a comparison; difference of two sums,
        the second over all rows or under a comparison

A sample is {"id", "text", "operations", "program", "numbers": [value], "columns": [name], "rows": [[number]], "answer": a
number or null, "answers": [texts]} and, as token ids, `question` and `names`, a word of the vocabulary for each column;
`places` are the places of the numbers in the question, where the word <number> stands, and `cells` the answer's cells,
as row * columns + column. The plan gets tokens of the question and operations, by which a curriculum orders.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from unroll.config import DatasetEntry, Strict, check
from unroll.data.shards import token_type
from unroll.data.sources import Progress, no_progress
from unroll.data.splits import check_names
from unroll.data.writers import SampleWriter, write_manifest
from unroll.errors import UserError
from unroll.files import new_folder

NUMBER = "<number>"
NAMES = [
    "age", "goals", "points", "wins", "losses", "height", "weight", "price", "year", "rank", "seats", "votes", "speed",
    "area", "length", "laps", "games", "stars", "depth", "budget", "income", "floors", "pages", "copies", "runs", "saves",
    "miles", "tons", "shots", "bids",
]  # fmt: skip
TEMPLATES = {
    "sum": ["what is the sum of {0}", "total {0}", "add up the {0}"],
    "count": ["how many rows are there", "count the rows", "number of rows"],
    "print": ["list the {0}", "what are the {0}", "print all {0}"],
    "greater": ["where {0} is greater than <number>", "with {0} above <number>", "whose {0} is more than <number>"],
    "lesser": ["where {0} is less than <number>", "with {0} below <number>", "whose {0} is under <number>"],
    "and": ["and"],
    "or": ["or"],
    "largest": ["which {0} has the row of largest {1}", "{0} of the maximum {1}", "the {0} with the highest {1}"],
    "smallest": ["which {0} has the row of smallest {1}", "{0} of the minimum {1}", "the {0} with the lowest {1}"],
    "difference": ["difference of the sum of {0} and the sum of {1}", "how much more is total {0} than total {1}"],
}
WORDS = sorted({w for ways in TEMPLATES.values() for way in ways for w in way.split() if "{" not in w} | set(NAMES))
DRAWS = 100


class Options(Strict):
    """samples {split: number of questions}; rows {split: [fewest, most]}; numbers {split: [least, largest]}; columns
    [fewest, most]; `operations`: the most of a question."""

    samples: dict[str, int]
    rows: dict[str, tuple[int, int]]
    numbers: dict[str, tuple[int, int]]
    columns: tuple[int, int] = (2, 5)
    operations: int = Field(3, ge=1, le=3)
    seed: int = 1

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if not self.samples.keys() == self.rows.keys() == self.numbers.keys():
            raise ValueError("samples, rows and numbers must name the same splits")
        if min(self.samples.values(), default=0) < 1:
            raise ValueError("every split needs at least one sample")
        if any(not 2 <= fewest <= most <= 1000 for fewest, most in self.rows.values()):
            raise ValueError("rows: [fewest, most] from 2 to 1000 are needed")
        if any(not -10_000 <= least < largest <= 10_000 for least, largest in self.numbers.values()):
            raise ValueError("numbers: [least, largest] within 10,000 of 0 are needed")
        if not 2 <= self.columns[0] <= self.columns[1] <= len(NAMES):
            raise ValueError(f"columns: [fewest, most] from 2 to {len(NAMES)} are needed")
        return self


class Drawn:
    """A table and a question about it, drawn from a generator."""

    def __init__(self, generator: random.Random, rows: int, columns: int, numbers: tuple[int, int]) -> None:
        self.generator = generator
        names = list(NAMES)
        self.names = [names.pop(self.below(len(names))) for _ in range(columns)]
        least, largest = numbers
        values = [[least + self.below(largest - least + 1) for _ in range(columns)] for _ in range(rows)]
        self.table = np.array(values, np.int64)  # [N,C]
        self.words: list[str] = []
        self.numbers: list[int] = []
        self.program: list[str] = []

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1; only `random` is drawn from, which Python keeps the same."""
        return int(self.generator.random() * count)

    def column(self, *others: int) -> int:
        free = [c for c in range(len(self.names)) if c not in others]
        return free[self.below(len(free))]

    def say(self, what: str, *columns: int) -> None:
        ways = TEMPLATES[what]
        self.words += ways[self.below(len(ways))].format(*(self.names[c] for c in columns)).split()

    def compare(self, joined: str = "") -> np.ndarray:
        """A comparison that holds for some rows and not for others: bool [N]. `joined`: `or_` adds its rows to others."""
        operation, column = ("greater", "lesser")[self.below(2)], self.column()
        values = np.unique(self.table[:, column])
        pivot = int(values[self.below(len(values) - 1)]) if len(values) > 1 else int(values[0])
        pivot += operation == "lesser"
        self.say(operation, column)
        self.numbers.append(pivot)
        self.program.append(f"{joined}{operation} {self.names[column]} {pivot}")
        held: np.ndarray = self.table[:, column] > pivot if operation == "greater" else self.table[:, column] < pivot
        return held

    def question(self, operations: int) -> tuple[np.ndarray, int, int | None]:
        """Asks: which rows and column the answer stands in, and its value if it is a number that is computed."""
        kind = self.below(3 if operations == 1 else 4 if operations == 2 else 5)
        if operations > 1 and kind == 3:
            return self.superlative(operations)
        if operations == 3 and kind == 4:
            return self.difference()
        aggregate, column = ("sum", "count", "print")[self.below(3)], self.column()
        self.say(aggregate, column)
        rows = np.ones(len(self.table), bool)
        if operations > 1:
            rows = self.compare()
        if operations == 3:
            joined = ("and", "or")[self.below(2)]
            self.say(joined)
            second = self.compare("or_" if joined == "or" else "")
            rows = rows & second if joined == "and" else rows | second
        self.program.append(aggregate if aggregate == "count" else f"{aggregate} {self.names[column]}")
        values = {"sum": int(self.table[rows, column].sum()), "count": int(rows.sum())}
        return rows, column, values.get(aggregate)

    def superlative(self, operations: int) -> tuple[np.ndarray, int, None]:
        name = ("largest", "smallest")[self.below(2)]
        column = self.column()
        by = self.column(column)
        self.say(name, column, by)
        rows = np.ones(len(self.table), bool)
        if operations == 3:
            rows = self.compare()
        if not rows.any():
            return rows, column, None
        values = self.table[rows, by]
        extreme = values.max() if name == "largest" else values.min()
        self.program += [f"{name} {self.names[by]}", f"print {self.names[column]}"]
        return rows & (self.table[:, by] == extreme), column, None

    def difference(self) -> tuple[np.ndarray, int, int]:
        first = self.column()
        second = self.column(first)
        self.say("difference", first, second)
        rows = np.ones(len(self.table), bool)
        self.program.append(f"sum {self.names[first]}")
        if self.below(2):
            rows = self.compare()
        self.program += [f"sum {self.names[second]}", "difference"]
        return rows, second, int(self.table[:, first].sum() - self.table[rows, second].sum())


def prepare(entry: DatasetEntry, name: str, root: Path, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Write the prepared folder `out` and give its manifest. `progress` counts questions.

    Raises:
        UserError: options that do not fit, or sources given to a data set that has none.
    """
    place = f"params.yaml: datasets.{name}"
    options: Options = check(Options, entry.options, f"{place}.options")
    check_names(options.samples, f"{place}.options.samples")
    if entry.sources:
        raise UserError(f"{place}.sources: these tables are generated, no source is allowed")
    with new_folder(out) as folder:
        splits, done = {}, 0
        for split, count in options.samples.items():
            with SampleWriter(folder, split, len(WORDS)) as writer:
                generator = random.Random(f"{options.seed} {split}")
                for number in range(count):
                    sample = _sample(number, generator, split, options)
                    writer.write(sample, len(sample["question"]), sample["operations"])
                    progress(done + number + 1, sum(options.samples.values()))
            splits[split], done = writer.summary, done + count
        manifest = {
            "dataset": name,
            "preparer": "table_questions",
            "kind": "samples",
            "options": options.model_dump(mode="json"),
            "licence": entry.licence,
            "sources": [],
            "words": WORDS,
            "vocabulary": len(WORDS),
            "token_bytes": token_type(len(WORDS)).itemsize,
            "splits": splits,
            "skipped": {},
        }
        return write_manifest(folder, manifest)


def _sample(number: int, generator: random.Random, split: str, options: Options) -> dict[str, Any]:
    fewest, most = options.rows[split]
    operations = 1 + number % options.operations
    for _ in range(DRAWS):
        size = fewest + int(generator.random() * (most - fewest + 1))
        columns = options.columns[0] + int(generator.random() * (options.columns[1] - options.columns[0] + 1))
        drawn = Drawn(generator, size, columns, options.numbers[split])
        rows, column, value = drawn.question(operations)
        if rows.any():
            break
    chosen = np.flatnonzero(rows) if value is None else np.empty(0, np.int64)
    answers = [str(v) for v in drawn.table[chosen, column].tolist()] if value is None else [str(value)]
    ids = {word: i for i, word in enumerate(WORDS)}
    numbers = iter(drawn.numbers)
    told = [str(next(numbers)) if word == NUMBER else word for word in drawn.words]
    return {
        "id": number,
        "text": " ".join(told),
        "operations": operations,
        "program": drawn.program,
        "numbers": drawn.numbers,
        "columns": drawn.names,
        "rows": drawn.table.tolist(),
        "answer": value,
        "answers": answers,
        "question": np.array([ids[word] for word in drawn.words]),
        "names": np.array([ids[name] for name in drawn.names]),
        "places": np.array([i for i, word in enumerate(drawn.words) if word == NUMBER], np.int64),
        "cells": chosen * len(drawn.names) + column,
    }
