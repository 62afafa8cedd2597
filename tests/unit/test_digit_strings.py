"""Generated digit strings: the exactness that models are asked for means nothing if test strings were trained on."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unroll.config import DatasetEntry, Source
from unroll.data import tokenizers
from unroll.data.shards import SampleReader, verify
from unroll.datasets import digit_strings
from unroll.errors import UserError

SAMPLES = {"train": 600, "validation": 60, "test": 100}


def prepare(out: Path, sources: list[Source] | None = None, **options: Any) -> dict[str, Any]:
    options = {"operation": "reverse", "samples": SAMPLES, "shortest": 1, "longest": 6, **options}
    entry = DatasetEntry(preparer="digit_strings", licence="none", sources=sources or [], options=options)
    return digit_strings.prepare(entry, "digits", out.parent, out)


def samples(out: Path, split: str) -> list[dict[str, Any]]:
    reader = SampleReader(out, split)
    return [reader.sample(0, i) for i in range(reader.samples)]


@pytest.mark.parametrize("operation", ["reverse", "sort"])
def test_targets_are_the_operation_of_their_sources(tmp_path: Path, operation: str) -> None:
    prepared = prepare(tmp_path / "out", operation=operation)
    assert verify(tmp_path / "out") == prepared
    assert {split: entry["samples"] for split, entry in prepared["splits"].items()} == SAMPLES
    tokenizer = tokenizers.load(tmp_path / "out/tokenizer.json")
    assert prepared["vocabulary"] == prepared["source_vocabulary"] == tokenizer.vocabulary_size + 2 == 12
    for sample in samples(tmp_path / "out", "test"):
        expected = sample["source"][::-1] if operation == "reverse" else np.sort(sample["source"])
        assert sample["target"].tolist() == expected.tolist()
        assert tokenizer.decode(sample["source"]) == sample["source_text"]
        assert tokenizer.decode(sample["target"]) == sample["target_text"]


@pytest.mark.parametrize("longest", [3, 6])
def test_no_string_is_in_two_splits(tmp_path: Path, longest: int) -> None:
    prepare(tmp_path / "out", longest=longest)
    strings = {split: {s["source_text"] for s in samples(tmp_path / "out", split)} for split in SAMPLES}
    assert not strings["train"] & strings["test"]
    assert not strings["train"] & strings["validation"]
    assert not strings["validation"] & strings["test"]


def test_lengths_and_digits_are_uniform(tmp_path: Path) -> None:
    prepare(tmp_path / "out", shortest=4, longest=8, samples={**SAMPLES, "train": 3000})
    strings = [sample["source_text"] for sample in samples(tmp_path / "out", "train")]
    lengths = Counter(map(len, strings))
    assert sorted(lengths) == [4, 5, 6, 7, 8]
    assert all(count / 3000 == pytest.approx(0.2, abs=0.03) for count in lengths.values())
    digits = Counter("".join(strings))
    assert all(digits[digit] / digits.total() == pytest.approx(0.1, abs=0.01) for digit in "0123456789")


def test_a_seed_decides_everything(tmp_path: Path) -> None:
    prepare(tmp_path / "one")
    prepare(tmp_path / "two")
    prepare(tmp_path / "other", seed=2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert samples(tmp_path / "one", "train")[:9] != samples(tmp_path / "other", "train")[:9]


def test_splits_do_not_change_each_other(tmp_path: Path) -> None:
    """More training pairs leave the test set as it was, so results stay comparable."""
    prepare(tmp_path / "few")
    prepare(tmp_path / "many", samples={**SAMPLES, "train": 700})
    few, many = ([s["source_text"] for s in samples(tmp_path / name, "test")] for name in ("few", "many"))
    assert few == many


WRONG = [
    ({"operation": "swap"}, "operation: Input should be 'reverse' or 'sort', found 'swap'"),
    ({"samples": {"test": 5}}, "no split is named 'train', found test"),
    ({"samples": {"train": 5, "test": 0}}, "every split needs at least one sample"),
    ({"shortest": 7}, "shortest is above longest"),
    ({"longest": 2}, "too few strings of up to 2 digits"),
    ({"held_out": 0.5}, "held_out leaves no string for training beside 2 other splits"),
    ({"sources": [Source(file="a.txt")]}, "digit strings are generated, no source is allowed"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_options_that_do_not_fit_are_explained(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "out", **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
