"""Denotation accuracy: 100 * questions answered by the wanted set of values / questions, in %.

The rules of the official evaluator of WikiTableQuestions 1.0.2 (Pasupat & Liang 2015, arXiv:1508.00305). An answer is a
set of values, joined by | in `translations.jsonl`; it is right if it has as many values as the wanted one and each wanted
value matches one of them: both are the same text once normalised (marks, quotes, dashes, trailing citations and
parentheses, outer quotation marks, a final point, case and white space removed or unified), or the same number within
1e-6, or the same date in all its parts.

A value is a number, a date yyyy-mm-dd (xx for a part that is not known; a year alone is a number), else text. The official
evaluator reads numbers and dates of wanted values as Stanford CoreNLP tagged them. Those tags are not part of the data here;
in their place digits grouped by commas are read as numbers and days written with an English month as dates. This can
only turn a few right answers into wrong ones or the reverse; the signature says `values:untagged`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import check
from unroll.metrics import Bootstrap, Score, Statistics
from unroll.metrics._predictions import Sentence, conditions, read_sentences
from unroll.metrics.bootstrap import scored

lower_is_better = False

CLOSE = 1e-6
MONTHS = "january february march april may june july august september october november december".split()  # noqa: SIM905
_CITATIONS = re.compile(r"((?<!^)\[[^\]]*\]|\[\d+\]|[•♦†‡*#+])*$")
_PARENTHESES = re.compile(r"(?<!^)( \([^)]*\))*$")
_QUOTED = re.compile(r'^"([^"]*)"$')
_GROUPED = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
_MONTH = "|".join(MONTHS)
_DAYS = (
    re.compile(rf"(?P<month>{_MONTH}) (?P<day>\d{{1,2}}),? (?P<year>\d{{4}})"),
    re.compile(rf"(?P<day>\d{{1,2}}) (?P<month>{_MONTH}),? (?P<year>\d{{4}})"),
    re.compile(rf"(?P<month>{_MONTH}) (?P<day>\d{{1,2}})"),
    re.compile(rf"(?P<day>\d{{1,2}}) (?P<month>{_MONTH})"),
    re.compile(rf"(?P<month>{_MONTH}),? (?P<year>\d{{4}})"),
)

Date = tuple[int | None, int | None, int | None]


@dataclass(frozen=True)
class Value:
    """One value: its normalised text, and its number or date if it is one."""

    text: str
    number: float | None = None
    date: Date | None = None

    def matches(self, other: Value) -> bool:
        """Whether this wanted value is the other one."""
        if self.text == other.text:
            return True
        if self.number is not None and other.number is not None:
            return abs(self.number - other.number) < CLOSE
        return self.date is not None and self.date == other.date


def statistics(predictions: Path, options: Mapping[str, Any]) -> Statistics:
    """Whether each answer is right, and 1: [questions,2]."""
    sentences = read_sentences(predictions)
    return Statistics(_right(sentences), conditions(sentences, {"metric": __name__}))


def score(sums: np.ndarray) -> np.ndarray:
    """The share in % of summed statistics: [...,2] -> [...]."""
    return 100 * sums[..., 0] / sums[..., 1]


def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
    """Right answers in % over all questions; `options` are `samples` and `seed` of the bootstrap.

    Raises:
        UserError: predictions missing, malformed or incomplete; unknown option.
    """
    bootstrap = check(Bootstrap, options, "evaluate options")
    sentences = read_sentences(predictions)
    signature = f"questions:{len(sentences)}|rules:wikitablequestions-1.0.2|values:untagged"
    return scored(_right(sentences), score, "% right", bootstrap, signature)


def _right(sentences: list[Sentence]) -> np.ndarray:
    found = [any(same_denotation(reference, s.hypothesis) for reference in s.references) for s in sentences]
    return np.stack([np.array(found, dtype=np.float64), np.ones(len(found))], axis=1)  # [questions,2]


def same_denotation(wanted: str, found: str) -> bool:
    """Whether two answers, their values joined by |, are the same set."""
    targets, answers = values(wanted), values(found)
    return len(targets) == len(answers) and all(any(t.matches(a) for a in answers) for t in targets)


def values(answer: str) -> list[Value]:
    """The values of an answer, each once; none of an empty one."""
    parts = [part.replace("\\n", "\n").replace("\\p", "|").replace("\\\\", "\\") for part in answer.split("|")]
    found: dict[object, Value] = {}
    for value in (to_value(part) for part in parts if answer):
        key = value.number if value.number is not None else value.date if value.date is not None else value.text
        found.setdefault(key, value)
    return list(found.values())


def to_value(text: str) -> Value:
    """A value as it is written."""
    number = to_number(text)
    if number is not None:
        return Value(normalize(text), number=number)
    date = to_date(text)
    if date is not None and date[1:] == (None, None):
        return Value(normalize(text), number=float(date[0] or 0))
    return Value(normalize(text), date=date)


def to_number(text: str) -> float | None:
    """The number that a text is, with or without commas between groups of three digits."""
    text = text.strip()
    plain = text.replace(",", "") if _GROUPED.fullmatch(text) else text
    try:
        number = float(plain)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in plain else None


def to_date(text: str) -> Date | None:
    """(year, month, day) of yyyy-mm-dd, xx where a part is not known, or of a day with an English month."""
    parts = text.strip().lower().split("-")
    if len(parts) == 3 and all(re.fullmatch(r"\d+|xx|xxxx", part) for part in parts):
        year, month, day = (None if part.startswith("x") else int(part) for part in parts)
        return _date(year, month, day)
    plain = normalize(text)
    for form in _DAYS:
        if found := form.fullmatch(plain):
            named = found.groupdict()
            year = int(named["year"]) if named.get("year") else None
            return _date(year, MONTHS.index(named["month"]) + 1, int(named["day"]) if named.get("day") else None)
    return None


def _date(year: int | None, month: int | None, day: int | None) -> Date | None:
    fits = (month is None or 1 <= month <= 12) and (day is None or 1 <= day <= 31)
    return (year, month, day) if fits and (year, month, day) != (None, None, None) else None


def normalize(text: str) -> str:
    """A text as the evaluator compares it."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn")
    text = re.sub("[‘’´`]", "'", text)
    text = re.sub("[“”]", '"', text)
    text = re.sub("[‐‑‒–—−]", "-", text)
    before = None
    while text != before:
        before = text
        text = _CITATIONS.sub("", text.strip())
        text = _PARENTHESES.sub("", text.strip())
        text = _QUOTED.sub(r"\1", text.strip())
    text = text.removesuffix(".")
    return re.sub(r"\s+", " ", text).lower().strip()
