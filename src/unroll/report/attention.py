"""Pictures of attention: which source token a decoder looked at when it wrote each target token.

`attention.jsonl` of a predictions folder: one line per chosen sentence, `{"id", "source": [tokens], "target": [tokens],
"weights": [[one per source token] per target token], "reason": why it was chosen}`.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from unroll.errors import UserError
from unroll.metrics._predictions import read_lines
from unroll.report.formatting import clean

LARGEST = 120  # tokens on a side; what is larger cannot be read
LONGEST_LABEL = 24  # characters
LEAST_WEIGHT = 0.005  # cells below are left blank

_CELL, _FONT, _MARGIN, _GAP = 22, 13, 10, 7  # CSS pixels
_INK, _PAPER, _HEAT = "#1b1d22", "#ffffff", "#0b5cad"
_SLANT = 50  # degrees of the labels above the columns


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of one sentence. Rows of `weights` add up to 1 where the attention is a distribution."""

    number: int
    source: list[str]
    target: list[str]
    weights: np.ndarray  # [T,S], between 0 and 1
    reason: str

    @property
    def fits(self) -> bool:
        """Whether it is small enough to be drawn."""
        return max(len(self.source), len(self.target)) <= LARGEST


def read_attention(path: Path) -> list[Attention]:
    """The sentences of an `attention.jsonl`, in its order.

    Raises:
        UserError: file missing, or a line malformed (file:line).
    """
    return [_attention(entry, f"{path}:{line}") for line, entry in read_lines(path)]


def attention_svg(source: Sequence[str], target: Sequence[str], weights: np.ndarray | Sequence[Sequence[float]]) -> str:
    """A labelled heat-map as one `<svg>` element: a file of its own, or part of a page.

    Source tokens stand above the columns, target tokens beside the rows, and a cell's colour is the stronger the larger its weight;
    the number shows when the pointer rests on it. Text is escaped, and characters that are not allowed in XML or that
    turn the reading direction become U+FFFD. On a page, the classes `attention`, `paper` and `heat` take its colours.

    Args:
        source, target: token strings, S and T of them; long ones are cut.
        weights: [T,S], between 0 and 1.

    Raises:
        UserError: more than 120 tokens on a side.
        ValueError: the weights have another shape, or are not between 0 and 1.
    """
    if max(len(source), len(target)) > LARGEST:
        raise UserError(f"attention of {len(target)} x {len(source)} tokens: at most {LARGEST} on a side can be drawn")
    table = _table(weights, len(source), len(target))  # [T,S]
    columns, rows = [label(token) for token in source], [label(token) for token in target]
    slant = math.radians(_SLANT)
    widths = [_text_width(text) for text in columns]
    left = _MARGIN + max(map(_text_width, rows), default=0) + _GAP
    top = _MARGIN + max(widths, default=0) * math.sin(slant) + _FONT
    width, height = _CELL * len(columns), _CELL * len(rows)
    reach = max((_CELL * (i + 0.5) + w * math.cos(slant) for i, w in enumerate(widths)), default=0)
    whole = (math.ceil(left + max(width, reach) + _MARGIN + _FONT), math.ceil(top + height + _MARGIN + _CELL + _FONT))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="attention" role="img" width="{whole[0]}" height="{whole[1]}" '
        f'viewBox="0 0 {whole[0]} {whole[1]}" color="{_INK}" font-family="sans-serif" font-size="{_FONT}" '
        f'aria-label="Attention of {len(rows)} target tokens over {len(columns)} source tokens">',
        f'<rect class="paper" width="100%" height="100%" fill="{_PAPER}"/>',
        f'<g transform="translate({left:.1f} {top:.1f})">',
        _cells(table, columns, rows),
        _grid(width, height),
        '<g fill="currentColor">',
        *(_column_label(text, number) for number, text in enumerate(columns)),
        *(_row_label(text, number) for number, text in enumerate(rows)),
        "</g>",
        _scale(height + _MARGIN),
        "</g></svg>",
    ]
    return "\n".join(part for part in parts if part)


def label(token: str) -> str:
    """A token as it is shown: on one line, not empty, not too long."""
    text = clean(token).replace("\n", "↵").replace("\t", "⇥")
    text = text if text.strip() else "␣" * max(1, min(4, len(text)))
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"


def _attention(entry: dict[str, Any], place: str) -> Attention:
    number, reason = entry.get("id"), entry.get("reason", "")
    if type(number) is not int or number < 0:
        raise UserError(f"{place}: 'id' is {number!r:.80}, a whole number from 0 on is expected")
    for key in ("source", "target"):
        if not isinstance(entry.get(key), list) or not all(isinstance(token, str) for token in entry[key]):
            raise UserError(f"{place}: {key!r} is {entry.get(key)!r:.80}, a list of strings is expected")
    try:
        weights = _table(entry.get("weights"), len(entry["source"]), len(entry["target"]))
    except ValueError as error:
        raise UserError(f"{place}: 'weights': {error}") from None
    return Attention(number, clean(entry["source"]), clean(entry["target"]), weights, clean(str(reason)))


def _table(weights: Any, sources: int, targets: int) -> np.ndarray:
    """Weights as an array [T,S].

    Raises:
        ValueError: another shape, or a number that is no weight.
    """
    try:
        table = np.array(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("rows of equally many numbers are expected") from None
    if table.size == 0 and sources * targets == 0:
        return np.zeros((targets, sources))
    if table.shape != (targets, sources):
        raise ValueError(
            f"shape {list(table.shape)} found, one row per target token [{targets}, {sources}] is expected"
        )
    if not ((table >= 0) & (table <= 1.001)).all():  # NaN is refused too
        raise ValueError("numbers between 0 and 1 are expected")
    return np.minimum(table, 1.0)


def _cells(table: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> str:
    cells = []
    for row, column in zip(*np.nonzero(table >= LEAST_WEIGHT), strict=True):
        weight = table[row, column]
        title = escape(f"{columns[column]} → {rows[row]}: {weight:.2f}")
        x, y = _CELL * column, _CELL * row
        cells.append(
            f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill-opacity="{weight:.3g}">'
            f"<title>{title}</title></rect>"
        )
    return f'<g class="heat" fill="{_HEAT}">{"".join(cells)}</g>'


def _grid(width: int, height: int) -> str:
    """Thin lines that lead from a cell to its labels."""
    lines = [f"M{x} 0V{height}" for x in range(0, width + 1, _CELL)]
    lines += [f"M0 {y}H{width}" for y in range(0, height + 1, _CELL)]
    return f'<path d="{"".join(lines)}" fill="none" stroke="currentColor" stroke-opacity="0.14"/>'


def _column_label(text: str, number: int) -> str:
    x = _CELL * (number + 0.5) + 3
    return f'<text transform="translate({x:.1f} {-_GAP}) rotate(-{_SLANT})">{escape(text)}</text>'


def _row_label(text: str, number: int) -> str:
    y = _CELL * (number + 0.5) + 0.35 * _FONT
    return f'<text x="{-_GAP}" y="{y:.1f}" text-anchor="end">{escape(text)}</text>'


def _scale(y: float) -> str:
    """What the shades mean: five of them under the table."""
    steps = (0.1, 0.3, 0.5, 0.75, 1.0)
    boxes = [
        f'<rect x="{14 * i}" y="{y:.1f}" width="14" height="12" fill-opacity="{step}"/>' for i, step in enumerate(steps)
    ]
    y += 11
    return (
        f'<g class="heat" fill="{_HEAT}">{"".join(boxes)}</g><g fill="currentColor">'
        f'<text x="{-_GAP}" y="{y:.1f}" text-anchor="end">0</text><text x="{14 * len(steps) + _GAP}" y="{y:.1f}">1</text></g>'
    )


def _text_width(text: str) -> float:
    """About how wide a text is: no font is at hand, so a little too much."""
    return sum(
        0 if unicodedata.combining(c) else _FONT if unicodedata.east_asian_width(c) in "WF" else 0.6 * _FONT
        for c in text
    )
