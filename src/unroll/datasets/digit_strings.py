"""Generated pairs of digit strings: a string and the same reversed or sorted. The smallest test of a translator.

Lengths are uniform in a range. A hash gives every possible string to one split, so no test string is in training, and
the strings of all lengths are shared out alike. Only `random.Random.random` is drawn from, which Python keeps the same
from version to version. Layout of the samples: `data/pairs.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from unroll.config import DatasetEntry, Strict, check
from unroll.data.pairs import Pair, PairTokenizers, PairWriter
from unroll.data.sources import Progress, no_progress
from unroll.data.splits import HashSplit, check_names
from unroll.data.tokenizers import CharacterTokenizer
from unroll.data.writers import write_manifest
from unroll.errors import UserError
from unroll.files import new_folder

DIGITS = "0123456789"
DRAWS = 1000


class Options(Strict):
    """operation: what the target is. samples {split: number of pairs}. shortest, longest: digits of a string.
    held_out: share of all strings that belongs to each split other than train."""

    operation: Literal["reverse", "sort"]
    samples: dict[str, int]
    shortest: int = Field(1, ge=1)
    longest: int = Field(20, ge=1, le=10_000)
    held_out: float = Field(0.1, ge=0.001)
    seed: int = 1

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.shortest > self.longest:
            raise ValueError("shortest is above longest")
        if min(self.samples.values(), default=0) < 1:
            raise ValueError("every split needs at least one sample")
        if self.held_out * (len(self.samples) - 1) >= 1:
            raise ValueError(f"held_out leaves no string for training beside {len(self.samples) - 1} other splits")
        if self.held_out * 10 ** min(self.longest, 9) < 100:
            raise ValueError(f"there are too few strings of up to {self.longest} digits to hold some out")
        return self


def prepare(entry: DatasetEntry, name: str, root: Path, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Write the prepared folder `out` and give its manifest. `progress` counts pairs.

    Raises:
        UserError: options that do not fit, or sources given to a data set that has none.
    """
    place = f"params.yaml: datasets.{name}"
    options: Options = check(Options, entry.options, f"{place}.options")
    check_names(options.samples, f"{place}.options.samples")
    if entry.sources:
        raise UserError(f"{place}.sources: digit strings are generated, no source is allowed")
    tokenizer = CharacterTokenizer(DIGITS, unknown=False)
    both = PairTokenizers(tokenizer, tokenizer)
    with new_folder(out) as folder:
        splits, done = {}, 0
        for split, count in options.samples.items():
            with PairWriter(folder, split, both) as writer:
                for number, pair in enumerate(_pairs(split, count, options), 1):
                    writer.write(pair)
                    progress(done + number, sum(options.samples.values()))
            splits[split], done = writer.summary, done + count
        manifest = {
            "dataset": name,
            "preparer": "digit_strings",
            "kind": "samples",
            "options": options.model_dump(mode="json"),
            "licence": entry.licence,
            "sources": [],
            **both.save(folder),
            "joint": True,
            "source_language": "digits",
            "target_language": "digits",
            "splits": splits,
            "skipped": {},
        }
        return write_manifest(folder, manifest)


def _pairs(split: str, count: int, options: Options) -> Iterator[Pair]:
    others = {other: options.held_out for other in options.samples if other != "train"}
    split_of = HashSplit({**others, "train": 1 - sum(others.values())}, salt=f"{options.seed} ")
    generator = random.Random(f"{options.seed} {split}")
    while count:
        length = options.shortest + int(generator.random() * (options.longest - options.shortest + 1))
        for _ in range(DRAWS):  # few strings are short: there may be none of this length in the split
            source = "".join(DIGITS[int(generator.random() * 10)] for _ in range(length))
            if split_of(source) == split:
                yield Pair(source, source[::-1] if options.operation == "reverse" else "".join(sorted(source)))
                count -= 1
                break
