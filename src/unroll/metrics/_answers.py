"""Reading of `answers.jsonl`: one line a question, `{"id", "task": number, "answers": [text], "predicted": [text]}`.

The lines may come in any order, but every id from 0 on is there once. An answer is right if it is the same set of texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import hash_json
from unroll.errors import UserError
from unroll.metrics._predictions import _check_count, _check_numbered, read_lines


@dataclass(frozen=True)
class Answered:
    """A test set of questions: task of each [n], whether it was answered rightly [n], and a hash of what was asked."""

    tasks: np.ndarray
    right: np.ndarray
    conditions: str

    @property
    def by_task(self) -> np.ndarray:
        """For each question and task 1 if it was answered wrongly, then 1 if it is of that task: [n,2T]."""
        of_task = self.tasks[:, None] == np.unique(self.tasks)  # [n,T]
        return np.concatenate([of_task & ~self.right[:, None], of_task], 1).astype(np.float64)


def read_answers(predictions: Path) -> Answered:
    """The answers in the order of their ids.

    Raises:
        UserError: file missing, a line malformed (file:line), an id missing or twice there, or no question at all.
    """
    path = predictions / "answers.jsonl"
    found: dict[int, tuple[int, list[str], bool]] = {}
    for number, entry in read_lines(path):
        place = f"{path}:{number}"
        for key in ("id", "task"):
            _check_count(entry, key, place)
        if entry["id"] in found:
            raise UserError(f"{place}: id {entry['id']} is there twice; every question stands on one line")
        answers, predicted = (_texts(entry, key, place) for key in ("answers", "predicted"))
        found[entry["id"]] = entry["task"], sorted(answers), set(answers) == set(predicted)
    _check_numbered(found, path, "question")
    lines = [found[number] for number in range(len(found))]
    asked = hash_json([[task, answers] for task, answers, _ in lines])
    return Answered(np.array([line[0] for line in lines]), np.array([line[2] for line in lines]), asked)


def errors(sums: np.ndarray) -> np.ndarray:
    """Error of each task in %: sums [...,2T] -> [...,T]. A task that a resample has no question of counts as 0."""
    wrong, asked = np.split(sums, 2, axis=-1)
    return 100 * wrong / np.maximum(asked, 1)


def _texts(entry: dict[str, Any], key: str, place: str) -> list[str]:
    texts = entry.get(key)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place}: {key!r} is {texts!r:.80}, a list of one or more strings is expected")
    return texts
