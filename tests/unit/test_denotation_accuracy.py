"""The official rules for answers about tables, on cases that each rule decides."""

import json
from pathlib import Path

import pytest

from unroll.errors import UserError
from unroll.metrics import denotation_accuracy as metric


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("Bangkok, Thailand", "bangkok,  thailand"),
        ("Café", "Cafe"),
        ("Mary’s “house”", 'Mary\'s "house"'),
        ("1990–91", "1990-91"),
        ("Helsinki[3]", "Helsinki"),
        ("Ronaldo†*", "Ronaldo"),
        ("Poland (POL)", "Poland"),
        ('"Angie"', "Angie"),
        ("St. Louis Inc.", "St. Louis Inc"),
        ("12,467", "12467"),
        ("4", "4.0000001"),
        ("2004", "2004-xx-xx"),
        ("June 5, 2004", "2004-06-05"),
        ("5 June 2004", "2004-06-05"),
        ("xx-01-12", "January 12"),
        ("a|b", "b|a"),
        ("a|b|A", "b|a"),
        ("x\\py", "X\\pY"),
    ],
)
def test_the_same_denotation(wanted: str, found: str) -> None:
    assert metric.same_denotation(wanted, found)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("a", "b"),
        ("a|b", "a"),
        ("a", "a|b"),
        ("a", ""),
        ("4", "5"),
        ("1,2", "12"),
        ("xx-01-12", "1990-01-12"),
        ("2004-06-05", "2004-06-06"),
        ("2004-13-05", "2004-06-05"),
        ("nan", "inf"),
        ("(POL)", "Poland"),
    ],
)
def test_another_denotation(wanted: str, found: str) -> None:
    assert not metric.same_denotation(wanted, found)


def test_the_share_of_right_answers(tmp_path: Path) -> None:
    answers = [("4", "4.0"), ("a|b", "b|a"), ("a", "c"), ("Paris (FR)", "paris")]
    lines = [{"id": n, "source": "q", "references": [w], "hypothesis": f} for n, (w, f) in enumerate(answers)]
    (tmp_path / "translations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = metric.compute(tmp_path, {})
    assert (result.value, result.n, result.unit) == (75.0, 4, "% right")
    assert "values:untagged" in result.signature
    sums = metric.statistics(tmp_path, {}).values.sum(0)
    assert float(metric.score(sums)) == 75.0
    with pytest.raises(UserError, match="samples"):
        metric.compute(tmp_path, {"smaples": 3})
