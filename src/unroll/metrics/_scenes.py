"""What a caption of a drawn scene says, by the data set's lexicon (`lexicon.json` beside the predictions).

A lexicon is {word or words: [kind, name]} with the kinds size, colour, shape, relation and motion. A mention is a colour
and the shape after it. What is mentioned before a relation stands in it to what is mentioned after; what moves is what is
mentioned last before the motion, or first if nothing is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from unroll.errors import UserError
from unroll.metrics._predictions import SENTENCES, read_lines

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
Lexicon = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Term:
    """A word or words of a caption that mean something: `start` is the number of the first word, `end` is after them."""

    kind: str
    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Mention:
    """A coloured shape that is named: `place` is the number of the shape's word."""

    colour: str
    shape: str
    place: int


def read_scenes(predictions: Path) -> tuple[Lexicon, list[dict[str, Any]]]:
    """The lexicon, and the lines of the predictions in the order of their ids.

    Raises:
        UserError: the data set says nothing of what is in its pictures, or a file is missing or malformed.
    """
    path = predictions / "lexicon.json"
    if not path.exists():
        raise UserError(
            f"{path}: no such file; only captions of generated scenes can be checked against what is in them"
        )
    lexicon = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for number, line in read_lines(predictions / SENTENCES):
        if not isinstance(line.get("truth"), dict) or not isinstance(line.get("hypothesis"), str):
            raise UserError(f"{predictions / SENTENCES}:{number}: truth or hypothesis is missing")
        lines.append(line)
    return lexicon, sorted(lines, key=lambda line: int(line["id"]))


def terms(words: Sequence[str], lexicon: Lexicon) -> list[Term]:
    """What the words mean, longer terms first: "to the left of" is one."""
    longest = max(len(term.split()) for term in lexicon)
    found, start = [], 0
    while start < len(words):
        for count in range(min(longest, len(words) - start), 0, -1):
            meaning = lexicon.get(" ".join(words[start : start + count]))
            if meaning is not None:
                found.append(Term(meaning[0], meaning[1], start, start + count))
                start += count
                break
        else:
            start += 1
    return found


def mentions(found: Sequence[Term]) -> list[Mention]:
    """The coloured shapes among the terms."""
    return [
        Mention(colour.name, shape.name, shape.start)
        for colour, shape in pairwise(found)
        if colour.kind == "colour" and shape.kind == "shape"
    ]


def object_of(mention: Mention, truth: Mapping[str, Any]) -> int | None:
    """The number of the object that has this colour and shape."""
    for number, thing in enumerate(truth["objects"]):
        if (thing["colour"], thing["shape"]) == (mention.colour, mention.shape):
            return number
    return None


def all_right(words: Sequence[str], lexicon: Lexicon, truth: Mapping[str, Any]) -> bool:
    """Whether a caption states anything, and every colour, shape, relation and motion that it states is right."""
    found = terms(words, lexicon)
    named = mentions(found)
    shapes = [term for term in found if term.kind == "shape"]
    if not named or len(named) != len(shapes) or len(named) != sum(term.kind == "colour" for term in found):
        return False  # a colour without a shape, or a shape without a colour, belongs to nothing
    numbers = [object_of(mention, truth) for mention in named]
    if None in numbers or len(set(numbers)) < len(numbers):
        return False
    for term in found:
        before = [number for mention, number in zip(named, numbers, strict=True) if mention.place < term.start]
        after = [number for mention, number in zip(named, numbers, strict=True) if mention.place >= term.end]
        if term.kind == "relation" and not _related(term.name, before, after, truth["relation"]):
            return False
        if term.kind == "motion" and not _moves(term.name, before, after, truth["motion"]):
            return False
    return True


def _related(name: str, before: list[int | None], after: list[int | None], relation: Mapping[str, Any]) -> bool:
    if not before or not after:
        return False
    stated = (name, before[-1], after[0])
    subject, thing = relation["subject"], relation["object"]
    return stated in ((relation["name"], subject, thing), (OPPOSITE[relation["name"]], thing, subject))


def _moves(name: str, before: list[int | None], after: list[int | None], motion: Mapping[str, Any]) -> bool:
    if not before and not after:
        return False
    return (name, before[-1] if before else after[0]) == (motion["name"], motion["mover"])
