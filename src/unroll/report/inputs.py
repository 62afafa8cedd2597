"""What the report reads: `results/<suite>/<recipe>.json` and the files in `evaluations/<suite>/<recipe>/`.

Results are required; evaluation files may be missing, and the report then says which. Every string is made safe to show
when it is read: control characters, lone surrogates and marks that turn the reading direction become U+FFFD.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from unroll.config import Reference, nearest
from unroll.errors import UserError
from unroll.metrics import Statistics
from unroll.metrics._predictions import read_lines
from unroll.report.attention import Attention, read_attention
from unroll.report.formatting import clean

PNG = b"\x89PNG\r\n\x1a\n"


class _Loose(BaseModel):
    """A part of a results file; keys that the report does not show are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class MetricValue(_Loose):
    """One metric in a results file: the first seed's, and where there are several seeds also what all of them gave."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int
    unit: str
    signature: str
    per_seed: list[float] | None = None
    mean: float | None = None
    deviation: float | None = None


class Cost(_Loose):
    """What the system took to train, on `device`; None where it was not measured."""

    minutes: float | None = None
    tokens_per_second: float | None = None
    parameters: int | None = None
    flops_per_token: float | None = None
    peak_memory_mb: float | None = None
    energy_joules: float | None = None
    device: str = ""


class Result(_Loose):
    """One `results/<suite>/<recipe>.json`. `primary` names the metric the leaderboard is sorted by.

    `test_set` is what systems must share to stand in one table; empty, it is the data set and the split.
    """

    recipe: str
    task: str
    dataset: str
    model: str | dict[str, Any]
    split: str
    test_set: str = ""
    seeds: list[int]
    commit: str | None
    primary: str
    metrics: dict[str, MetricValue]
    reference: Reference | None = None
    cost: Cost = Cost()
    title: str = ""
    data_hash: str = ""
    configuration: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """What people read: the title, or the recipe's name where there is none."""
        return self.title or self.recipe

    @property
    def tested_on(self) -> tuple[str, str]:
        """Name and split of the test set."""
        if not self.test_set:
            return self.dataset, self.split
        name, _, split = self.test_set.partition("/")
        return name, split

    @property
    def model_name(self) -> str:
        return self.model if isinstance(self.model, str) else str(self.model.get("name", "?"))

    @property
    def score(self) -> MetricValue | None:
        """The primary metric, or None when it was not computed."""
        return self.metrics.get(self.primary)


@dataclass(frozen=True)
class Sample:
    """One generated text and how it was drawn."""

    setting: str
    prompt: str
    text: str


class LengthBucket(_Loose):
    """Scores over the n sentences whose source has `low` to `high` words; `high` is None of the last bucket."""

    low: int
    high: int | None
    n: int
    scores: dict[str, float]

    @property
    def label(self) -> str:
        if self.high is None:
            return f"≥ {self.low}"
        return f"{self.low}–{self.high}" if self.low else f"≤ {self.high}"


class Example(_Loose):
    """One test sentence, what it should have become and what it became; `chrf` of it alone says how good that is."""

    rank: str
    id: int
    chrf: float
    source: str
    references: list[str]
    hypothesis: str


@dataclass(frozen=True)
class Picture:
    """A drawn picture: what it shows, in a few words and in a sentence or two, and the PNG."""

    title: str
    text: str
    png: bytes


@dataclass(frozen=True)
class System:
    """All that the report knows of one recipe. `missing` holds a sentence for each file that is not there."""

    result: Result
    statistics: dict[str, Statistics] = field(default_factory=dict)  # of each metric that has them
    history: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    lengths: list[LengthBucket] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_results(folder: Path) -> list[Result]:
    """The results files of one suite, in the order of their names.

    Raises:
        UserError: no such suite, no results in it, or a file that is not a results file (file, key, what was found).
    """
    if not folder.is_dir():
        suites = sorted(path.name for path in folder.parent.glob("*/"))
        raise UserError(f"{folder}: no results of a suite {folder.name!r}{nearest(folder.name, suites)}")
    results = [_read_result(path) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise UserError(f"{folder}: no results; evaluate the recipes of suite {folder.name!r} first")
    return results


def read_system(result: Result, folder: Path) -> System:
    """One system; what its evaluation folder lacks is said in `missing`.

    Raises:
        UserError: a file that is there but damaged (file and line).
    """
    missing = []
    if result.score is None:
        found = ", ".join(result.metrics) or "no metric at all"
        missing.append(f"No score: the results hold {found}, not {result.primary}. Predict and evaluate it again.")
    if not (folder / "statistics.json").is_file():
        missing.append("Predictions are missing (no statistics.json): it takes part in no significance test.")
    if not any((folder / name).is_file() for name in ("samples.jsonl", "examples.json", "pictures.json")):
        missing.append("No samples (samples.jsonl).")

    def if_there(name: str, read: Callable[[Path], Any], otherwise: Any) -> Any:
        return read(folder / name) if (folder / name).is_file() else otherwise

    return System(
        result,
        statistics=if_there("statistics.json", _read_statistics, {}),
        history=if_there("history.jsonl", lambda path: [clean(entry) for _, entry in read_lines(path)], []),
        samples=if_there("samples.jsonl", _read_samples, []),
        lengths=if_there("lengths.json", lambda path: _read_list(path, LengthBucket), []),
        examples=if_there("examples.json", lambda path: _read_list(path, Example), []),
        attention=if_there("attention.jsonl", read_attention, []),
        pictures=if_there("pictures.json", _read_pictures, []),
        missing=missing,
    )


def number(value: Any) -> float:
    """A number of a JSON file; NaN for whatever is none, and infinity for "inf"."""
    if value == "inf":
        return math.inf
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def _read_result(path: Path) -> Result:
    result: Result = _checked(path, Result)
    if result.recipe != path.stem:
        raise UserError(f"{path}: recipe: found {result.recipe!r}, the file's name says {path.stem!r}")
    return result


def _read_list(path: Path, kind: type[_Loose]) -> list[Any]:
    entries: list[Any] = _checked(path, list[kind])  # type: ignore[valid-type]
    return entries


def _checked(path: Path, kind: Any) -> Any:
    """The content of a JSON file as a `kind`; the first thing wrong with it is named."""
    try:
        return TypeAdapter(kind).validate_python(clean(_read_json(path)))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {place}: {problem['msg']}, found {problem['input']!r:.80}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None


def _read_statistics(path: Path) -> dict[str, Statistics]:
    """What the score of each metric adds up from, block by block or sentence by sentence."""
    content = _read_json(path)
    statistics = {}
    try:
        for metric, entry in content.items():
            values = np.array([[number(value) for value in row] for row in entry["values"]], dtype=np.float64)  # [n,k]
            if values.ndim != 2:
                raise ValueError(f"{metric}: values are no table")
            statistics[metric] = Statistics(values, str(entry["conditions"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: {{metric: {{values, conditions}}}} expected, found {error}; evaluate {path.parent.name} again"
        ) from None
    return statistics


def _read_samples(path: Path) -> list[Sample]:
    samples = []
    for line, entry in read_lines(path):
        if not isinstance(entry.get("text"), str):
            raise UserError(f"{path}:{line}: 'text' is {entry.get('text')!r}, a string is expected")
        entry = clean(entry)
        samples.append(Sample(_setting(entry), str(entry.get("prompt") or ""), entry["text"]))
    return samples


class _Listed(_Loose):
    """A line of `pictures.json`; the file's name is one of `pictures.draw_all`, so it cannot leave the folder."""

    file: str = Field(pattern=r"^[0-9]+-[a-z0-9_]+\.png$")
    title: str
    text: str


def _read_pictures(path: Path) -> list[Picture]:
    pictures = []
    for entry in _read_list(path, _Listed):
        file = path.parent / "pictures" / entry.file
        png = file.read_bytes() if file.is_file() else b""
        if not png.startswith(PNG):
            raise UserError(f"{file}: {'not a PNG' if png else 'missing'}; evaluate {path.parent.name} again")
        pictures.append(Picture(entry.title, entry.text, png))
    return pictures


def _setting(entry: dict[str, Any]) -> str:
    """How a sample was drawn, in words."""
    names = {"temperature": "temperature", "top_k": "top-k", "top_p": "top-p"}
    parts = [f"{name} {entry[key]}" for key, name in names.items() if entry.get(key) is not None]
    return ", ".join(parts) or "sampled"
