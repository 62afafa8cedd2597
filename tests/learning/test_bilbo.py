"""The story of Bilbo, Frodo and the ring (Weston et al. 2014, arXiv:1410.3916, the long form of their figure), end to end:
a model that has read generated stories alone, about other people, answers all three questions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unroll.config import load_recipe
from unroll.data.stories import StoryTokenizer, words_of
from unroll.place import Place
from unroll.stages.ask import Asker, read_facts
from unroll.stages.prepare import prepare
from unroll.training.context import WorkerContext
from unroll.training.runs import load_model, train_one

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
QUESTIONS = {"Where is the ring?": "Mount-Doom", "Where is Bilbo now?": "Grey-havens", "Where is Frodo now?": "Shire"}


def test_bilbo(tmp_path: Path) -> None:
    for name in ("params.yaml", "recipes"):
        (tmp_path / name).symlink_to(PROJECT / name)
    prepare(tmp_path, "stories")
    recipe = load_recipe(tmp_path, "demo_stories")
    place, seed = Place(tmp_path), recipe.seeds[0]
    train_one(recipe, seed, place, WorkerContext(device=torch.device("cpu")))
    folder = place.model(recipe, seed)
    description, model = load_model(folder)
    tokenizer = StoryTokenizer.load(folder / "stories.json")
    facts = read_facts(PROJECT / "tests" / "bilbo.txt")
    people = {"bilbo", "frodo", "gollum", "sauron", "ring", "shire", "mount-doom", "grey-havens"}
    assert not people & set(tokenizer.words)
    assert people <= {word.lower() for fact in facts for word in words_of(fact)}
    asker = Asker(model, tokenizer, description["stories"]["answers"])
    assert {question: asker.ask(facts, question).answers for question in QUESTIONS} == {
        question: [answer] for question, answer in QUESTIONS.items()
    }
