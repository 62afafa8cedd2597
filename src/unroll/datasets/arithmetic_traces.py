"""Generated additions of long numbers with the execution trace that computes them: lessons of a programmer-interpreter.

The scratch pad and the programs are those of Reed & de Freitas 2016, "Neural programmer-interpreters", arXiv:1511.06279,
section 3.1. The pad has four rows of cells, FIRST, SECOND, CARRY and OUTPUT, each with a pointer that starts at the
lowest digit:

    ADD     while a digit or a carry is under the pointers: ADD1, LSHIFT        (`recursive`: ADD1, LSHIFT, ADD)
    ADD1    ACT(write, OUTPUT, lowest digit of the column's sum), then CARRY if the sum is 10 or more
    CARRY   ACT(move, CARRY, left), ACT(write, CARRY, 1), ACT(move, CARRY, right)
    LSHIFT  ACT(move, row, left) for each of the four rows

`recursive` is the form of Cai et al. 2017, arXiv:1704.06611, which no number is too long for: every call is short.

A trace is a list of steps, each `COLUMNS` small numbers: whether it opens a call, the program that runs and its three
arguments, the four cells under the pointers before the step, and what the program does then: it calls another one, with
three arguments, or it ends. The steps of one call stand together, calls in the order in which they were opened.

A sample is {"id", "first", "second", "target"} as decimal text and the trace, flat, in the field `trace` (of the splits
`train` and `validation` alone: tests give the numbers and nothing else). The plan gets its steps and its digits, which
a curriculum orders by. A hash gives every sum to one split.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from unroll.config import DatasetEntry, Strict, check
from unroll.data.shards import token_type
from unroll.data.sources import Progress, no_progress
from unroll.data.splits import HashSplit, check_names
from unroll.data.writers import SampleWriter, write_manifest
from unroll.errors import UserError
from unroll.files import new_folder

PROGRAMS = ["ADD", "ADD1", "CARRY", "LSHIFT", "ACT"]
ADD, ADD1, CARRY, LSHIFT, ACT = range(5)
ROWS = ["FIRST", "SECOND", "CARRY", "OUTPUT"]
FIRST_ROW, SECOND_ROW, CARRY_ROW, OUTPUT_ROW = range(4)
BLANK = 10
"""An empty cell, and an argument that is not there; 0 to 9 are digits."""
SYMBOLS = 11
WRITE, MOVE = 0, 1
LEFT, RIGHT = 0, 1
ARGUMENTS = 3
COLUMNS = 1 + 1 + ARGUMENTS + len(ROWS) + 1 + ARGUMENTS + 1
DRAWS = 1000

Call = tuple[int, tuple[int, int, int]]
NOTHING = (BLANK, BLANK, BLANK)


class Options(Strict):
    """samples {split: number of sums}, lengths {split: digits of the longer number, shared out evenly}. `long_carries`:
    share of sums whose carry runs through all digits. `held_out`: share of all sums that belongs to each split other
    than train."""

    samples: dict[str, int]
    lengths: dict[str, list[int]]
    recursive: bool = False
    long_carries: float = Field(0.1, ge=0.0, le=1.0)
    held_out: float = Field(0.1, ge=0.001)
    seed: int = 1

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.samples.keys() != self.lengths.keys():
            raise ValueError("samples and lengths must name the same splits")
        if min(self.samples.values(), default=0) < 1:
            raise ValueError("every split needs at least one sample")
        if any(not lengths or min(lengths) < 1 or max(lengths) > 1000 for lengths in self.lengths.values()):
            raise ValueError("lengths: every split needs lengths from 1 to 1000 digits")
        if self.held_out * (len(self.samples) - 1) >= 1:
            raise ValueError(f"held_out leaves no sum for training beside {len(self.samples) - 1} other splits")
        return self


class Pad:
    """The scratch pad of one sum: cells[row][column], column 0 the lowest digit, and a pointer for each row."""

    def __init__(self, first: str, second: str) -> None:
        size = max(len(first), len(second)) + 2
        self.cells = [[BLANK] * size for _ in ROWS]
        self.pointers = [0] * len(ROWS)
        for row, text in ((FIRST_ROW, first), (SECOND_ROW, second)):
            for column, digit in enumerate(reversed(text)):
                self.cells[row][column] = int(digit)

    def seen(self) -> list[int]:
        """The cells under the pointers."""
        return [cells[pointer] for cells, pointer in zip(self.cells, self.pointers, strict=True)]

    def act(self, kind: int, row: int, value: int) -> None:
        """Write a digit, or move a pointer."""
        if kind == WRITE:
            self.cells[row][self.pointers[row]] = value
        else:
            self.pointers[row] += 1 if value == LEFT else -1

    def output(self) -> str:
        """The number on the output row."""
        return "".join(str(cell) for cell in reversed(self.cells[OUTPUT_ROW]) if cell != BLANK)


def body(program: int, pad: Pad, recursive: bool) -> Iterator[Call]:
    """What a program calls, one call after the other; it looks at the pad when it is asked for the next."""
    if program == ADD:
        while any(cell != BLANK for cell in pad.seen()[:OUTPUT_ROW]):
            yield ADD1, NOTHING
            yield LSHIFT, NOTHING
            if recursive:
                yield ADD, NOTHING
                return
    elif program == ADD1:
        total = sum(cell for cell in pad.seen()[:OUTPUT_ROW] if cell != BLANK)
        yield ACT, (WRITE, OUTPUT_ROW, total % 10)
        if total >= 10:
            yield CARRY, NOTHING
    elif program == CARRY:
        yield ACT, (MOVE, CARRY_ROW, LEFT)
        yield ACT, (WRITE, CARRY_ROW, 1)
        yield ACT, (MOVE, CARRY_ROW, RIGHT)
    else:
        for row in range(len(ROWS)):
            yield ACT, (MOVE, row, LEFT)


def trace(first: str, second: str, recursive: bool) -> tuple[np.ndarray, str]:
    """The steps of ADD on a fresh pad, int64 [steps,COLUMNS], and what it wrote."""
    pad = Pad(first, second)
    calls: list[list[list[int]]] = []
    open_calls = [_open((ADD, NOTHING), pad, recursive, calls)]
    while open_calls:
        (program, arguments), steps, following = open_calls[-1]
        seen = pad.seen()
        called = next(following, None)
        name, given = called or (program, NOTHING)
        steps.append([not steps, program, *arguments, *seen, name, *given, called is None])
        if called is None:
            open_calls.pop()
        elif name == ACT:
            pad.act(*given)
        else:
            open_calls.append(_open(called, pad, recursive, calls))
    return np.array([step for steps in calls for step in steps], np.int64), pad.output()


def _open(
    call: Call, pad: Pad, recursive: bool, calls: list[list[list[int]]]
) -> tuple[Call, list[list[int]], Iterator[Call]]:
    calls.append([])
    return call, calls[-1], body(call[0], pad, recursive)


def prepare(entry: DatasetEntry, name: str, root: Path, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Write the prepared folder `out` and give its manifest. `progress` counts sums.

    Raises:
        UserError: options that do not fit, or sources given to a data set that has none.
    """
    place = f"params.yaml: datasets.{name}"
    options: Options = check(Options, entry.options, f"{place}.options")
    check_names(options.samples, f"{place}.options.samples")
    if entry.sources:
        raise UserError(f"{place}.sources: additions are generated, no source is allowed")
    with new_folder(out) as folder:
        splits, done = {}, 0
        for split, count in options.samples.items():
            with SampleWriter(folder, split, SYMBOLS) as writer:
                for number, (first, second) in enumerate(_sums(split, count, options, place)):
                    writer.write(*_sample(number, first, second, split, options))
                    progress(done + number + 1, sum(options.samples.values()))
            splits[split], done = writer.summary, done + count
        manifest = {
            "dataset": name,
            "preparer": "arithmetic_traces",
            "kind": "samples",
            "options": options.model_dump(mode="json"),
            "licence": entry.licence,
            "sources": [],
            "programs": PROGRAMS,
            "primitive": "ACT",
            "rows": ROWS,
            "arguments": ARGUMENTS,
            "vocabulary": SYMBOLS,
            "token_bytes": token_type(SYMBOLS).itemsize,
            "splits": splits,
            "skipped": {},
        }
        return write_manifest(folder, manifest)


def _sample(number: int, first: str, second: str, split: str, options: Options) -> tuple[Any, ...]:
    """A sample and its lengths for the plan: steps of the trace, digits."""
    sample: dict[str, Any] = {"id": number, "first": first, "second": second, "target": str(int(first) + int(second))}
    digits = max(len(first), len(second))
    if split not in ("train", "validation"):
        return sample, digits, digits
    steps, written = trace(first, second, options.recursive)
    assert written == sample["target"]
    return {**sample, "trace": steps.ravel()}, len(steps), digits


def _sums(split: str, count: int, options: Options, place: str) -> Iterator[tuple[str, str]]:
    others = {other: options.held_out for other in options.samples if other != "train"}
    split_of = HashSplit({**others, "train": 1 - sum(others.values())}, salt=f"{options.seed} ")
    generator, lengths = random.Random(f"{options.seed} {split}"), options.lengths[split]
    for number in range(count):
        digits = lengths[number % len(lengths)]
        for _ in range(DRAWS):
            first, second = _draw(generator, digits, options.long_carries)
            if split_of(f"{first}+{second}") == split:
                yield first, second
                break
        else:
            raise UserError(f"{place}.options: found no sum of {digits} digits that belongs to split {split}")


def _draw(generator: random.Random, digits: int, long_carries: float) -> tuple[str, str]:
    """Two numbers, the longer one of so many digits, in any order."""
    longer = str(1 + int(generator.random() * 9)) + "".join(
        str(int(generator.random() * 10)) for _ in range(digits - 1)
    )
    if generator.random() < long_carries:  # all columns add up to 9, and one more
        shorter = str(10**digits - int(longer))
    else:
        size = 1 + int(generator.random() * digits)
        shorter = "".join(str(int(generator.random() * 10)) for _ in range(size)).lstrip("0") or "0"
    return (longer, shorter) if generator.random() < 0.5 else (shorter, longer)
