"""Reading of predictions files: JSON Lines, every line checked, every sample there once.

`blocks.jsonl` of a language model: one line per fixed block of text,
`{"block": i, "nats": sum of log-loss, "tokens": n, "bytes": b, "characters": c}`. The lines may come in any order
(ranks write their own parts), but every block from 0 on is there once. A loss may be infinite, written "inf".
`translations.jsonl` of a system that writes a text for each sample: `{"id": i, "source": raw text, "references": [raw
text, ...], "hypothesis": raw text, ...}`, in any order, every id from 0 on once.
`samples.jsonl`: `{"temperature", "top_k", "top_p", "prompt", "text"}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import hash_json
from unroll.errors import UserError

SENTENCES = "translations.jsonl"

_COUNTS = ("block", "tokens", "bytes", "characters")


@dataclass(frozen=True)
class Sentence:
    """One test sample: what a system was given, what it may say (one or more references), and what it said."""

    source: str
    references: tuple[str, ...]
    hypothesis: str


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


def read_sentences(predictions: Path) -> list[Sentence]:
    """The samples of `translations.jsonl` in the order of their ids.

    Raises:
        UserError: file missing, a line malformed (file:line), an id missing or twice there, or no sentence at all.
    """
    path = predictions / SENTENCES
    sentences: dict[int, Sentence] = {}
    for number, entry in read_lines(path):
        place = f"{path}:{number}"
        _check_count(entry, "id", place)
        if entry["id"] in sentences:
            raise UserError(f"{place}: id {entry['id']} is there twice; every sentence stands on one line")
        sentences[entry["id"]] = _sentence(entry, place)
    _check_numbered(sentences, path, "sentence")
    return [sentences[number] for number in range(len(sentences))]


def conditions(sentences: list[Sentence], how: Mapping[str, Any]) -> str:
    """Hash of the references and of how they are used: equal for systems that a paired test may compare."""
    return hash_json([[sentence.references for sentence in sentences], how])


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(f"{place}: not readable: {error}") from None
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


def _sentence(entry: Mapping[str, Any], place: str) -> Sentence:
    references = entry.get("references")
    if not isinstance(references, list) or not references or not all(isinstance(text, str) for text in references):
        raise UserError(f"{place}: 'references' is {references!r:.80}, a list of one or more strings is expected")
    for key in ("source", "hypothesis"):
        if not isinstance(entry.get(key), str):
            raise UserError(f"{place}: {key!r} is {entry.get(key)!r:.80}, a string is expected")
    return Sentence(entry["source"], tuple(references), entry["hypothesis"])


def _check_numbered(samples: Collection[int], path: Path, kind: str) -> None:
    """Samples are numbered from 0 on without a gap."""
    if not samples:
        raise UserError(f"{path}: no {kind}s; at least one is expected")
    if max(samples) != len(samples) - 1:
        missing = next(number for number in range(len(samples)) if number not in samples)
        raise UserError(f"{path}: {kind} {missing} is missing of {max(samples) + 1}; the predictions are incomplete")


def _check_complete(blocks: Mapping[int, tuple[float, int]], path: Path, denominator: str) -> None:
    _check_numbered(blocks, path, "block")
    for block, (_, count) in blocks.items():
        if count == 0:
            raise UserError(f"{path}: block {block} has 0 {denominator}; there is nothing to divide its log-loss by")
