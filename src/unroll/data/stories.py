"""Samples for question answering: the facts of a story before a question, the question, its answers, as word ids.

A sample is `{"id": number in its split, "task": number, "names": [name, ...], "facts": ids of all facts one after the
other, "fact_lengths": words of each fact [F], "question": ids [Q], "answers": ids [A] of the answer list, "support":
numbers of the supporting facts from 0 on}`. The ids are those of the file `stories.json` (`StoryTokenizer`):

    words     0 padding, 1 unknown word, 2 .. E+1 the entities of a story, then the words of the vocabulary
    answers   0 an answer that the training stories do not give, 1 .. E the entities, then the answer list

Entities: with E > 0, a word outside the vocabulary is a name. Names are numbered as they come in a story, so that a
story about people never seen reads like any other (the anonymised entities of Hermann et al. 2015, arXiv:1506.03340);
`names` says who is who. With E = 0 such a word is the unknown word. Words are compared in lower case, without
punctuation; "-", "'" and "." inside a word belong to it (Mount-Doom).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from unroll.data.shards import token_type
from unroll.data.sources import file_sha256
from unroll.data.writers import SampleWriter
from unroll.errors import UserError

FORMAT = "unroll stories 1"
PADDING, UNKNOWN, ENTITIES = 0, 1, 2
"""Ids of words: padding, the unknown word, the first entity."""
NO_ANSWER = 0
WORD = re.compile(r"\w+(?:[-'’.]\w+)*")
SENTENCE = re.compile(r"[^.!?\n]*(?:[.!?](?=\w)[^.!?\n]*)*[.!?\n]?")


@dataclass(frozen=True)
class Story:
    """Facts, a question about them, and its answers; `support` are numbers of facts, `place` names it in errors."""

    facts: Sequence[str]
    question: str
    answers: Sequence[str] = ()
    support: Sequence[int] = ()
    task: int = 0
    place: str = "story"


@dataclass(frozen=True)
class Encoded:
    """A story as ids: each fact and the question hold the words of a sentence; `names` are the entities as written.

    `unknown_facts` and `unknown_question`: words that are in no vocabulary; with entities, names that the question has
    and the story has not.
    """

    facts: list[np.ndarray]
    question: np.ndarray
    names: list[str]
    unknown_facts: list[str] = field(default_factory=list)
    unknown_question: list[str] = field(default_factory=list)

    def sample(self, number: int, task: int, answers: np.ndarray, support: Sequence[int]) -> dict[str, Any]:
        """What is stored of a question."""
        return {
            "id": number,
            "task": task,
            "names": self.names,
            "facts": np.concatenate(self.facts),
            "fact_lengths": np.array([len(fact) for fact in self.facts], np.int64),
            "question": self.question,
            "answers": answers,
            "support": np.array(support, np.int64),
        }


def words_of(sentence: str) -> list[str]:
    """The words of a sentence as they are written."""
    return WORD.findall(sentence)


def sentences_of(text: str) -> list[str]:
    """The sentences of a text: each ends with ".", "!", "?" or its line."""
    return [part.strip() for part in SENTENCE.findall(text) if words_of(part)]


class StoryTokenizer:
    """Words and answers to ids and back. Answers are texts; several words of one answer are joined as they stand."""

    def __init__(self, words: Sequence[str], answers: Sequence[str], entities: int = 0) -> None:
        self.words, self.answers, self.entities = list(words), list(answers), entities
        self._words = {word: ENTITIES + entities + number for number, word in enumerate(self.words)}
        self._answers = {answer: 1 + entities + number for number, answer in enumerate(self.answers)}
        self._sentences: dict[str, np.ndarray] = {}

    @property
    def vocabulary(self) -> dict[str, int]:
        """Numbers of words, answers and entities, for a model."""
        words, answers = ENTITIES + self.entities + len(self.words), 1 + self.entities + len(self.answers)
        return {"words": words, "answers": answers, "entities": self.entities}

    def encode(self, story: Story) -> Encoded:
        """The story as ids.

        Raises:
            UserError: no facts, a question without words, or more names than entities.
        """
        if not story.facts:
            raise UserError(f"{story.place}: the story has no facts before the question {story.question!r}")
        if not words_of(story.question):
            raise UserError(f"{story.place}: the question {story.question!r} has no words")
        for fact in story.facts:
            if not words_of(fact):
                raise UserError(f"{story.place}: the fact {fact!r} has no words")
        if not self.entities:
            facts = [self._plain(fact) for fact in story.facts]
            strange = [
                self._strange(story.facts, facts),
                self._strange([story.question], [self._plain(story.question)]),
            ]
            return Encoded(facts, self._plain(story.question), [], *strange)
        names: dict[str, tuple[int, str]] = {}
        facts = [self._anonymous(fact, names, story.place) for fact in story.facts]
        told = len(names)
        question = self._anonymous(story.question, names, story.place)
        written = [name for _, name in names.values()]
        return Encoded(facts, question, written, [], written[told:])

    def _plain(self, sentence: str) -> np.ndarray:
        ids = self._sentences.get(sentence)
        if ids is None:
            ids = np.array([self._words.get(word.lower(), UNKNOWN) for word in words_of(sentence)], np.int64)
            if len(self._sentences) < 2**18:
                self._sentences[sentence] = ids
        return ids

    def _strange(self, sentences: Sequence[str], ids: Sequence[np.ndarray]) -> list[str]:
        """The words of some sentences that are in no vocabulary, each once."""
        found = [sentence for sentence, each in zip(sentences, ids, strict=True) if (each == UNKNOWN).any()]
        words = [word for sentence in found for word in words_of(sentence) if word.lower() not in self._words]
        return list(dict.fromkeys(words))

    def _anonymous(self, sentence: str, names: dict[str, tuple[int, str]], place: str) -> np.ndarray:
        ids = []
        for word in words_of(sentence):
            low = word.lower()
            known = self._words.get(low)
            if known is None:
                known, _ = names.setdefault(low, (ENTITIES + len(names), word))
                if known >= ENTITIES + self.entities:
                    raise UserError(
                        f"{place}: {word!r} is name number {len(names)}; this vocabulary tells {self.entities} names "
                        "and unknown words of one story apart"
                    )
            ids.append(known)
        return np.array(ids, np.int64)

    def answer_ids(self, answers: Sequence[str], names: Sequence[str]) -> np.ndarray:
        """Ids of answers; what training never answered is `NO_ANSWER`."""
        entities = {name.lower(): 1 + number for number, name in enumerate(names)}
        found = [self._answers.get(answer, entities.get(answer.lower(), NO_ANSWER)) for answer in answers]
        return np.array(found, np.int64)

    def answer_text(self, answer: int, names: Sequence[str]) -> str:
        """The answer of an id as text."""
        if answer > self.entities:
            return self.answers[answer - 1 - self.entities]
        return names[answer - 1] if 1 <= answer <= len(names) else "?"

    def text(self, ids: np.ndarray, names: Sequence[str]) -> str:
        """A sentence of ids as text."""
        first = ENTITIES + self.entities
        words = [
            self.words[i - first]
            if i >= first
            else names[i - ENTITIES]
            if ENTITIES <= i < ENTITIES + len(names)
            else "?"
            for i in ids.tolist()
        ]
        return " ".join(words)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write it into a prepared folder; gives the manifest's part about it."""
        path = folder / "stories.json"
        content = {"format": FORMAT, "words": self.words, "answers": self.answers, "entities": self.entities}
        path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        sizes = self.vocabulary
        return {
            "tokenizer": path.name,
            "tokenizer_sha256": file_sha256(path),
            "vocabulary": sizes["words"],
            "answers": sizes["answers"],
            "entities": sizes["entities"],
            "token_bytes": token_type(max(sizes["words"], sizes["answers"], 2**16 - 1)).itemsize,
        }

    @classmethod
    def load(cls, path: Path) -> Self:
        """The tokenizer of a prepared folder or of an exported model.

        Raises:
            UserError: missing or no such file.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}, expected {FORMAT!r}")
            return cls(content["words"], content["answers"], content["entities"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not the words of stories: {error}") from None


class StoryWriter:
    """Writes the stories of one split. Use as a context manager; `summary` afterwards is its part of the manifest."""

    def __init__(self, folder: Path, split: str, tokenizer: StoryTokenizer) -> None:
        self.tokenizer = tokenizer
        self._writer = SampleWriter(folder, split, 2**16 - 1)
        self._counts = {"facts": 0, "longest_story": 0, "longest_fact": 0, "answers_unknown": 0}
        self._written = 0

    def __enter__(self) -> Self:
        return self

    def write(self, story: Story) -> None:
        """Append a question with the facts before it."""
        encoded = self.tokenizer.encode(story)
        answers = self.tokenizer.answer_ids(story.answers, encoded.names)
        lengths = np.array([len(fact) for fact in encoded.facts], np.int64)  # [F]
        counts = self._counts
        counts["facts"] += len(lengths)
        counts["longest_story"] = max(counts["longest_story"], len(lengths))
        counts["longest_fact"] = max(counts["longest_fact"], int(lengths.max()), len(encoded.question))
        counts["answers_unknown"] += int((answers == NO_ANSWER).any())
        self._writer.write(encoded.sample(self._written, story.task, answers, story.support), len(lengths))
        self._written += 1

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    @property
    def summary(self) -> dict[str, Any]:
        """Counts and shards, for the manifest."""
        return {**self._counts, **self._writer.summary}
