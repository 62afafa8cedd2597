"""`unroll ask`: questions about a story in a text file, answered by a trained recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unroll.config import load_recipe
from unroll.data.stories import Story, StoryTokenizer, sentences_of
from unroll.device import default_device
from unroll.errors import UserError
from unroll.place import Place
from unroll.tasks.question_answering import Collate, StoryTable, attention_picture, by_own_numbers, chosen
from unroll.training.runs import load_model

LONGEST = 2000
"""Facts of a story that is still read: the attention of facts to each other grows with the square of them."""
LEAST_SHOWN = 0.01


@dataclass(frozen=True)
class Reply:
    """An answer: `weights` [hops,F] of the facts, none where the question is about what the story does not mention."""

    question: str
    answers: list[str]
    facts: list[str]
    weights: np.ndarray | None
    remark: str = ""


def ask(root: Path, name: str, story: Path, questions: list[str], picture: Path | None, shown: int) -> None:
    """Print the answer of each question and, hop by hop, the facts with the largest weights.

    Raises:
        UserError: not a trained recipe of this task, a story that cannot be read, has no facts or too many.
    """
    recipe = load_recipe(root, name)
    if recipe.task != "question_answering":
        raise UserError(f"recipes.{name}.task: found {recipe.task!r}, only recipes of question_answering answer")
    folder = Place(root).model(recipe, recipe.seeds[0])
    description, model = load_model(folder)
    facts = read_facts(story)
    asker = Asker(model, StoryTokenizer.load(folder / "stories.json"), description["stories"]["answers"])
    replies = [asker.ask(facts, question, str(story)) for question in questions]
    for reply in replies:
        print(text(reply, shown), flush=True)
    if picture is not None:
        draw(replies, picture)


def read_facts(path: Path) -> list[str]:
    """The facts of a story, one a sentence; empty lines separate nothing, questions are left out.

    Raises:
        UserError: no such file, not UTF-8 (with the line), no facts, or more than are read.
    """
    try:
        content = path.read_bytes()
        sentences = sentences_of(content.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line}: not UTF-8 at byte {error.start}") from None
    facts = [sentence for sentence in sentences if not sentence.endswith("?")]
    if not facts:
        raise UserError(f"{path}: no facts; a story has one sentence at least that is no question")
    if len(facts) > LONGEST:
        raise UserError(f"{path}: {len(facts):,} facts, at most {LONGEST:,} are read; keep the last ones")
    return facts


class Asker:
    """Answers questions with one model; `kind`: one answer, or several.

    Raises:
        UserError: the model is one for each task.
    """

    def __init__(self, model: Any, tokenizer: StoryTokenizer, kind: str) -> None:
        if getattr(model.config, "per_task", False):
            raise UserError("model.per_task: nobody knows which task a new story is of; ask one model for all")
        self.device = default_device()
        self.model, self.tokenizer, self.kind = model.to(self.device).eval(), tokenizer, kind

    @torch.no_grad()
    def ask(self, facts: list[str], question: str, place: str = "story") -> Reply:
        """The answer, or what is unknown: a question about something that is in no fact is not guessed at.

        Raises:
            UserError: no facts, no words, or more names than the model tells apart.
        """
        encoded = self.tokenizer.encode(Story(facts, question, place=place))
        if encoded.unknown_question:
            words = ", ".join(encoded.unknown_question)
            missing = "the story does not mention" if self.tokenizer.entities else "no training story has the word"
            return Reply(question, ["unknown"], facts, None, f"{missing} {words}")
        table = StoryTable([encoded.sample(0, 0, np.array([0]), [])])
        inputs = {
            name: value.to(self.device) for name, value in Collate(table, self.tokenizer.entities)([0], []).items()
        }
        output = self.model(inputs)
        found = by_own_numbers(chosen(output.scores.float(), self.kind), inputs)[0]
        answers = [self.tokenizer.answer_text(a, encoded.names) for a in torch.nonzero(found).flatten().tolist()]
        strange = ", ".join(encoded.unknown_facts[:5])
        remark = f"words of the story that no training story has: {strange}" if strange else ""
        return Reply(question, answers, facts, output.attention[0].float().cpu().numpy(), remark)


def text(reply: Reply, shown: int) -> str:
    """Question and answer in the first line, then the facts of each hop."""
    lines = [f"{reply.question} {', '.join(reply.answers)}" + (f"   ({reply.remark})" if reply.remark else "")]
    for hop, weights in enumerate(reply.weights if reply.weights is not None else [], 1):
        best = [i for i in np.argsort(-weights, kind="stable")[:shown].tolist() if weights[i] >= LEAST_SHOWN]
        lines += [f"  hop {hop}  {weights[i]:.2f}  {reply.facts[i]}" for i in best]
        if not best:
            lines.append(f"  hop {hop}  no fact above {LEAST_SHOWN}")
    return "\n".join(lines)


def draw(replies: list[Reply], out: Path) -> None:
    """The attention of every question as one picture, side by side.

    Raises:
        UserError: nothing to draw, or the file cannot be written.
    """
    from unroll.pictures.heat_maps import draw as heat_maps

    pictures = [
        attention_picture(reply.facts, reply.weights, f"{reply.question} {', '.join(reply.answers)}", "")
        for reply in replies
        if reply.weights is not None
    ]
    if not pictures:
        raise UserError("--picture: nothing to draw; no question was about the story")
    panels = [panel for picture in pictures for panel in picture["data"]["panels"]]
    try:
        heat_maps({"panels": panels}, out.parent, out)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from None
