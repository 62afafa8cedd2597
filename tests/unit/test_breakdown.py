"""Where a system is good: every sentence is counted once, and examples are the sentences they claim to be."""

import numpy as np
import pytest

from unroll.metrics import Statistics
from unroll.metrics._breakdown import by_length, examples
from unroll.metrics._predictions import Sentence


def share(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def of_words(*counts: int) -> list[Sentence]:
    return [Sentence("w " * count, ("a",), "a") for count in counts]


def test_buckets_by_hand() -> None:
    """Both ends of each bucket, an empty source, and scores from sums within the bucket alone."""
    sentences = of_words(8, 9, 12, 13, 24, 25, 400, 0)
    values = np.array([[1, 1], [0, 1], [1, 3], [1, 1], [0, 2], [1, 1], [1, 3], [0, 1]], dtype=np.float64)
    found = by_length(sentences, {"share": (Statistics(values, ""), share)})
    assert [(b["low"], b["high"], b["n"], b["scores"]["share"]) for b in found] == [
        (0, 8, 2, 0.5),
        (9, 12, 2, 0.25),
        (13, 16, 1, 1.0),
        (17, 24, 1, 0.0),
        (25, None, 2, 0.5),
    ]


def test_a_bucket_without_sentences_is_left_out() -> None:
    found = by_length(of_words(3, 30), {})
    assert [(b["low"], b["n"]) for b in found] == [(0, 1), (25, 1)]


def test_examples_are_the_best_middle_and_worst() -> None:
    reference = "a dog runs over the green hill"
    kept = [reference[:length] for length in range(30, 3, -2)]  # worse and worse
    sentences = [Sentence("ein Hund", (reference,), hypothesis) for hypothesis in kept]
    found = examples(sentences)
    assert [e["id"] for e in found if e["rank"] == "best"] == [0, 1, 2]
    assert [e["id"] for e in found if e["rank"] == "worst"] == [13, 12, 11]
    assert [e["id"] for e in found if e["rank"] == "middle"] == [6, 7, 8]
    chrf = [e["chrf"] for e in sorted(found, key=lambda e: e["id"])]
    assert chrf == sorted(chrf, reverse=True)
    assert found[0]["references"] == [reference]
    assert found[0]["hypothesis"] == kept[0]


def test_of_perfect_translations_the_longest_is_shown_first() -> None:
    sentences = [Sentence("w " * n, ("a dog runs",), "a dog runs") for n in (2, 9, 5)]
    assert [e["id"] for e in examples(sentences)] == [1, 2, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_few_sentences_are_each_shown_once(count: int) -> None:
    sentences = [Sentence("ein Hund", ("a dog runs",), "a dog runs"[:n]) for n in range(count)]
    found = [example["id"] for example in examples(sentences)]
    assert sorted(found) == list(range(count))
