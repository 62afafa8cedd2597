"""What every model that answers questions about stories must keep: padding and batch change nothing, all of it learns."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unroll.models
from unroll.config import check, load_part
from unroll.layers.stories import StoryModel

VOCABULARY = {"words": 19, "answers": 9, "entities": 4, "tasks": 3}
STORIES = [
    [[6, 9, 12], [7, 2, 8, 13], [3, 9]],
    [[5, 2]],
    [[7, 7, 7, 8, 18, 2, 1], [4, 15], [11, 2, 3], [12], [9, 16, 4]],
]
QUESTIONS = [[3, 2], [5], [17, 3, 4, 11]]


def discover() -> list[tuple[str, int]]:
    """(file name, number of a tiny configuration) of every model of stories."""
    files = sorted(Path(unroll.models.__path__[0]).glob("[!_]*.py"))
    models = {path.stem: importlib.import_module(f"unroll.models.{path.stem}") for path in files}
    return [
        (name, number)
        for name, part in models.items()
        if hasattr(part, "Model") and issubclass(part.Model, StoryModel)
        for number in range(len(part.TINY))
    ]


CASES = discover()
every_model = pytest.mark.parametrize(("name", "number"), CASES)


def build(name: str, number: int, entities: int = 4) -> Any:
    module = load_part("models", name, "test")
    torch.manual_seed(5)
    model = module.Model(check(module.Config, module.TINY[number], "test"), {**VOCABULARY, "entities": entities})
    model = model.double()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.6, 0.6)
    return model.eval()


def batch(rows: list[int], facts: int = 0, words: int = 0) -> dict[str, Tensor]:
    """Stories as a batch with `facts` and `words` more of padding than is needed."""
    longest = max(len(STORIES[row]) for row in rows) + facts
    widest = max(len(fact) for row in rows for fact in STORIES[row]) + words
    inputs = {
        "facts": torch.zeros(len(rows), longest, widest, dtype=torch.int64),
        "question": torch.zeros(len(rows), max(len(QUESTIONS[row]) for row in rows) + words, dtype=torch.int64),
        "task": torch.tensor(rows),
    }
    for place, row in enumerate(rows):
        for number, fact in enumerate(STORIES[row]):
            inputs["facts"][place, number, : len(fact)] = torch.tensor(fact)
        inputs["question"][place, : len(QUESTIONS[row])] = torch.tensor(QUESTIONS[row])
    return inputs


def test_models_are_found() -> None:
    assert {"memory_network", "entity_network", "story_reader"} <= {name for name, _ in CASES}


@every_model
@torch.no_grad()
def test_neither_batch_nor_padding_changes_an_answer(name: str, number: int) -> None:
    model = build(name, number)
    together = model(batch([0, 1, 2], facts=3, words=2))
    for row in range(3):
        alone = model(batch([row]))
        torch.testing.assert_close(together.scores[row], alone.scores[0], rtol=1e-9, atol=1e-9)
        told = len(STORIES[row])
        torch.testing.assert_close(together.attention[row, :, :told], alone.attention[0], rtol=1e-6, atol=1e-6)
        assert not together.attention[row, :, told:].any()


@every_model
@torch.no_grad()
def test_facts_and_their_order_count(name: str, number: int) -> None:
    model = build(name, number)
    inputs = batch([2])
    scores = model(inputs).scores
    changed = {**inputs, "facts": inputs["facts"].clone()}
    changed["facts"][0, 3, 0] = 14
    assert not torch.allclose(model(changed).scores, scores)
    assert (name, number) == ("story_reader", 2) or not torch.allclose(
        model({**inputs, "facts": inputs["facts"].flip(1)}).scores, scores
    )


@every_model
def test_every_parameter_learns(name: str, number: int) -> None:
    model = build(name, number).train()
    torch.nn.functional.cross_entropy(model(batch([0, 1, 2])).scores, torch.tensor([5, 2, 7])).backward()
    idle = [key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not idle


@every_model
def test_without_entities_every_parameter_learns_too(name: str, number: int) -> None:
    model = build(name, number, entities=0).train()
    torch.nn.functional.cross_entropy(model(batch([0, 1, 2])).scores, torch.tensor([5, 2, 7])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_model
@torch.no_grad()
def test_a_step_at_a_time_is_one_pass(name: str, number: int) -> None:
    """The sequential model alone: its memory after facts in pieces is the memory after all of them."""
    model = build(name, number)
    if not hasattr(model, "read"):
        pytest.skip("not sequential")
    facts = batch([0, 2])["facts"]
    gates, whole = model.read(facts, model.initial_state(2))
    state, found = model.initial_state(2), []
    for piece in facts.split([1, 3, 1], dim=1):
        part, state = model.read(piece, state)
        found.append(part)
    torch.testing.assert_close(state["memory"], whole["memory"])
    torch.testing.assert_close(torch.cat(found, 1), gates)


@torch.no_grad()
def test_a_memory_network_per_task_is_one_network_for_each() -> None:
    """Each row is answered as by the network of its task, in whatever order they stand."""
    memory_network = load_part("models", "memory_network", "test")
    config = check(memory_network.Config, {"hops": 2, "width": 6, "memory": 8, "per_task": True}, "test")
    torch.manual_seed(5)
    together = memory_network.Model(config, VOCABULARY).double().eval()
    alone = memory_network.Model(config.model_copy(update={"per_task": False}), VOCABULARY).double().eval()
    scores = together(batch([2, 0, 1])).scores[[1, 2, 0]]
    for task in range(VOCABULARY["tasks"]):
        for name, part in alone.named_parameters():
            part.copy_(together.get_parameter(f"of_task.{task}.{name}"))
        torch.testing.assert_close(alone(batch([task])).scores[0], scores[task])
