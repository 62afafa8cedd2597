"""The fast CIDEr against pycocoevalcap's."""

from __future__ import annotations

import random

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider as Reference

from unroll.errors import UserError
from unroll.losses.cider import Cider


def captions(generator: random.Random, count: int, longest: int) -> list[list[int]]:
    words = [min(int(generator.paretovariate(0.8)), 60) for _ in range(12)]
    return [generator.choices(words, k=generator.randint(1, longest)) for _ in range(count)]


def padded(rows: list[list[int]], count: int | None = None) -> np.ndarray:
    full = np.full((count or len(rows), max(1, *map(len, rows)) if len(rows) > 1 else max(1, len(rows[0]))), -1)
    for place, row in enumerate(rows):
        full[place, : len(row)] = row
    return full


def text(row: list[int]) -> str:
    return " ".join(map(str, row))


@pytest.mark.parametrize("size", [1, 2, 3, 50, 200, 744])
def test_equals_pycocoevalcap_on_a_thousand_random_cases(size: int) -> None:
    generator = random.Random(size)
    references = [captions(generator, generator.randint(1, 6), 12) for _ in range(size)]
    hypotheses = [captions(generator, 1, 14)[0] for _ in range(size)]
    if size > 2:
        hypotheses[0], hypotheses[1] = references[0][0], []  # a perfect one, an empty one
    given = {number: [text(row) for row in rows] for number, rows in enumerate(references)}
    _, expected = Reference().compute_score(given, {number: [text(row)] for number, row in enumerate(hypotheses)})
    scorer = Cider([padded(rows) for rows in references], 64)
    every = padded([row for rows in references for row in rows])
    laid_out, start = np.full((size * 6, every.shape[1]), -1), 0
    for number, rows in enumerate(references):
        laid_out[number * 6 : number * 6 + len(rows)] = every[start : start + len(rows)]
        start += len(rows)
    found = scorer.scores(padded(hypotheses), laid_out, size)
    assert found[:, 0] == pytest.approx(expected, abs=1e-9)


def test_several_captions_of_an_image_and_words_never_seen() -> None:
    documents = [padded([[1, 2, 3], [1, 2, 4]]), padded([[5, 6, 7], [5, 2]])]
    scorer = Cider(documents, 9)
    found = scorer.scores(padded([[1, 2, 3], [1, 2], [8, 8], [5, 6, 7], [5, 2], []]), padded([[1, 2, 3], [1, 2, 4],
                          [5, 6, 7], [5, 2]]), 2)  # fmt: skip
    assert found.shape == (2, 3)
    assert found[0, 0] > found[0, 1] > found[0, 2] == 0
    assert found[1, 0] > found[1, 2] == 0


def test_too_many_words_are_refused() -> None:
    with pytest.raises(UserError, match="60000 words"):
        Cider([padded([[1]])], 60_000)
