"""Scores of generated sequences: values by hand, and one line for damaged predictions."""

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from unroll.errors import UserError
from unroll.metrics import Score, ponder_correlation
from unroll.metrics.bootstrap import paired_test
from unroll.metrics.ponder_correlation import ranks
from unroll.tasks.algorithms import write_lines

NAMES = ["bits_per_sequence", "nats_per_prediction", "mean_squared_error", "target_errors", "ponder_steps"]


def line(number: int, loss: float, split: str = "test", **other: Any) -> dict[str, Any]:
    return {"id": number, "split": split, "length": 3, "steps": 7, "predictions": 4, "loss": loss, "errors": 1.0,
            "difficulty": float(number), "ponder": 2.5 + number, **other}  # fmt: skip


def folder(path: Path, *lines: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    write_lines(path / "sequences.jsonl", list(lines))
    return path


def compute(name: str, predictions: Path, **options: Any) -> Score:
    found: Score = importlib.import_module(f"unroll.metrics.{name}").compute(predictions, options)
    return found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bits_per_sequence", 5 / math.log(2)), ("nats_per_prediction", 10 / 8), ("mean_squared_error", 10 / 8),
        ("target_errors", 25.0), ("ponder_steps", 3.0), ("bits_per_longer_sequence", 20 / math.log(2)),
    ],
)  # fmt: skip
def test_values_by_hand_whatever_the_order_of_the_lines(tmp_path: Path, name: str, value: float) -> None:
    lines = [line(0, 6.0), line(1, 4.0), line(2, 20.0, "longer")]
    for order in (lines, [lines[1], lines[2], lines[0]]):
        score = compute(name, folder(tmp_path / "p", *order))
        assert score.value == pytest.approx(value)
        assert score.n == (1 if "longer" in name else 2)


@pytest.mark.parametrize("name", NAMES)
def test_systems_on_the_same_sequences_are_tested(tmp_path: Path, name: str) -> None:
    module = importlib.import_module(f"unroll.metrics.{name}")
    one, two = (
        module.statistics(folder(tmp_path / n, *(line(i, loss + i) for i in range(9))), {})
        for n, loss in (("a", 1), ("b", 3))
    )
    assert one.comparable(two)
    p = paired_test(one.values, two.values, module.score)
    assert p < 0.01 if "errors" not in name and "ponder" not in name else p == 1.0
    other = module.statistics(folder(tmp_path / "c", *(line(i, 1.0, difficulty=9.0) for i in range(9))), {})
    assert not one.comparable(other)


def test_the_correlation_is_spearmans(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    difficulty, ponder = generator.integers(1, 6, 40), generator.integers(1, 4, 40)
    lines = [
        line(i, 1.0, difficulty=float(d), ponder=float(p))
        for i, (d, p) in enumerate(zip(difficulty, ponder, strict=True))
    ]
    score = compute("ponder_correlation", folder(tmp_path / "p", *lines))
    assert score.value == pytest.approx(spearmanr(difficulty, ponder).statistic)
    assert score.low <= score.value <= score.high
    levels = compute("ponder_correlation", tmp_path / "p", levels=True)
    means = [ponder[difficulty == level].mean() for level in range(1, 6)]
    assert levels.value == pytest.approx(spearmanr(range(1, 6), means).statistic)
    assert levels.n == 5
    np.testing.assert_allclose(ranks(np.array([3.0, 1.0, 3.0, 2.0])), [2.5, 0.0, 2.5, 1.0])
    same = folder(tmp_path / "same", *(line(i, 1.0, ponder=2.0) for i in range(5)))
    assert compute("ponder_correlation", same).value == 0.0
    assert ponder_correlation.lower_is_better is False


@pytest.mark.parametrize(
    ("lines", "name", "message"),
    [
        ([line(0, math.nan)], "bits_per_sequence", "sequences.jsonl:1: 'loss' is nan, a finite number is expected"),
        ([line(0, 1.0), line(0, 1.0)], "bits_per_sequence", "sequences.jsonl:2: id 0 is there twice"),
        ([line(1, 1.0)], "target_errors", "ids are not 0, 1, 2, ...; the predictions are incomplete"),
        ([line(0, 1.0)], "bits_per_longer_sequence", "no longer sequences; name a split of them as predict.longer"),
        (
            [{k: v for k, v in line(0, 1.0).items() if k != "ponder"}],
            "ponder_steps",
            "does not decide how long to compute",
        ),
        ([], "mean_squared_error", "0 sequences"),
    ],
)
def test_damaged_predictions_are_one_line(tmp_path: Path, lines: list[Any], name: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        compute(name, folder(tmp_path / "p", *lines))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
