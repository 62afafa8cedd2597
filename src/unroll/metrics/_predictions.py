"""Reading of predictions files, and the score that is a ratio of sums over the blocks in them.

`blocks.jsonl` of a language model: one line per fixed block of text,
`{"block": i, "nats": sum of log-loss, "tokens": n, "bytes": b, "characters": c}`. The lines may come in any order
(ranks write their own parts), but every block from 0 on is there once. A loss may be infinite, written "inf".
`samples.jsonl`: `{"temperature", "top_k", "top_p", "prompt", "text"}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import check
from unroll.errors import UserError
from unroll.metrics import Bootstrap, Score
from unroll.metrics.bootstrap import Transform, interval

_COUNTS = ("block", "tokens", "bytes", "characters")


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line of a JSON Lines file.

    Raises:
        UserError: no such file, not UTF-8, or a line that is no JSON object (file:line).
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, _object(line, f"{path}:{number}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the predict stage writes it") from None


def ratio(predictions: Path, denominator: str, scale: float = 1.0) -> np.ndarray:
    """Per block, log-loss in nats times `scale`, and what it is divided by: [blocks,2] in the blocks' order.

    Args:
        predictions: folder that holds `blocks.jsonl`.
        denominator: "tokens", "bytes" or "characters".
        scale: 1 for nats, 1 / ln 2 for bits.

    Raises:
        UserError: file missing, a line malformed (file:line), a block missing, twice there, or empty.
    """
    path = predictions / "blocks.jsonl"
    blocks: dict[int, tuple[float, int]] = {}
    for number, entry in read_lines(path):
        place = f"{path}:{number}"
        for key in _COUNTS:
            _check_count(entry, key, place)
        if entry["block"] in blocks:
            raise UserError(f"{place}: block {entry['block']} is there twice; every block stands on one line")
        blocks[entry["block"]] = (_loss(entry, place) * scale, entry[denominator])
    _check_complete(blocks, path, denominator)
    return np.array([blocks[block] for block in range(len(blocks))], dtype=np.float64)  # [blocks,2]


def ratio_score(
    statistics: np.ndarray, unit: str, options: Mapping[str, Any], transform: Transform | None = None
) -> Score:
    """Score of a ratio of sums over blocks [blocks,2], with its bootstrap interval (None of a single block).

    The value is summed exactly, so neither the order of the blocks nor how the text is cut into them changes it.
    """
    bootstrap: Bootstrap = check(Bootstrap, options, "evaluate options")
    change = transform or (lambda ratios: ratios)
    with np.errstate(over="ignore"):
        value = float(change(np.array(math.fsum(statistics[:, 0]) / math.fsum(statistics[:, 1]))))
    low, high = None, None
    if len(statistics) > 1:
        low, high = interval(statistics[:, 0], statistics[:, 1], change, bootstrap.samples, bootstrap.seed)
    signature = f"blocks:{len(statistics)}|bootstrap:{bootstrap.samples}|seed:{bootstrap.seed}|v:1"
    return Score(value, low, high, len(statistics), unit, signature)


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(entry, dict):
        raise UserError(f"{place}: found {type(entry).__name__}, a JSON object is expected")
    return entry


def _check_count(entry: Mapping[str, Any], key: str, place: str) -> None:
    if key not in entry:
        raise UserError(f"{place}: {key!r} is missing")
    if type(entry[key]) is not int or entry[key] < 0:
        raise UserError(f"{place}: {key!r} is {entry[key]!r}, a whole number from 0 on is expected")


def _loss(entry: Mapping[str, Any], place: str) -> float:
    """The block's log-loss in nats, infinite if the model gave a symbol no probability at all."""
    value = entry.get("nats")
    if value in ("inf", math.inf):
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{place}: 'nats' is {value!r}, a number or \"inf\" is expected")
    return float(value)


def _check_complete(blocks: Mapping[int, tuple[float, int]], path: Path, denominator: str) -> None:
    if not blocks:
        raise UserError(f"{path}: no blocks; at least one is expected")
    if max(blocks) != len(blocks) - 1:
        missing = next(block for block in range(len(blocks)) if block not in blocks)
        raise UserError(f"{path}: block {missing} is missing of {max(blocks) + 1}; the predictions are incomplete")
    for block, (_, count) in blocks.items():
        if count == 0:
            raise UserError(f"{path}: block {block} has 0 {denominator}; there is nothing to divide its log-loss by")
