"""The task of answering questions: batches, names, supporting facts, validation, predictions, metrics, resuming, asking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unroll.config import DatasetEntry, Recipe, Training, load_part
from unroll.data.loader import MASKED
from unroll.data.shards import SampleReader
from unroll.data.stories import ENTITIES, StoryTokenizer
from unroll.datasets import generated_stories
from unroll.errors import UserError
from unroll.pictures import draw_all
from unroll.place import Place
from unroll.stages.ask import Asker, read_facts, text
from unroll.tasks.question_answering import (
    Collate,
    Shares,
    StoryTable,
    answer_loss,
    by_own_numbers,
    chosen,
    numbering,
    right,
    support_loss,
)
from unroll.training.context import WorkerContext
from unroll.training.loop import Run
from unroll.training.runs import build

PER_TASK = {"hops": 2, "width": 6, "memory": 8, "per_task": True}
BILBO = Path(__file__).parents[1] / "bilbo.txt"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("project")
    options = {"samples": {"train": 200, "validation": 40, "test": 30}, "names": 100, "longest": 8, "lists": True}
    entry = DatasetEntry(preparer="generated_stories", licence="none", options=options)
    generated_stories.prepare(entry, "stories", root, root / "data" / "prepared" / "stories")
    return Place(root)


def recipe(objective: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any) -> Recipe:
    training = {"batch_tokens": 300, "steps": 6, "optimizer": {"learning_rate": 0.01}, **train}
    return Recipe(
        name="stories",
        suite="demo",
        task="question_answering",
        dataset="stories",
        model=model or {"name": "story_reader", "hops": 2, "width": 16, "embedding": 8, "inner": 8},
        train=Training(**training, objective=objective or {}),
        predict={"split": "test", "batch": 7, "pictures": 2},
        evaluate={"metrics": ["accuracy"]},
    )


def table_of(place: Place, split: str = "train") -> StoryTable:
    return StoryTable.of(SampleReader(place.data("stories"), split))


def test_a_batch_holds_the_words_of_its_stories(place: Place) -> None:
    table = table_of(place)
    inputs = Collate(table, 0)([5, 0, 17], [])
    for place_, row in enumerate((5, 0, 17)):
        for number, fact in enumerate(table.facts_of(row)):
            found = inputs["facts"][place_, number]
            assert found[: len(fact)].tolist() == fact.tolist()
            assert not found[len(fact) :].any()
        assert not inputs["facts"][place_, len(table.facts_of(row)) :].any()
        answers = table.answers_of(row).tolist()
        assert inputs["answers"][place_].tolist()[: len(answers)] == answers
        assert set(inputs["answers"][place_].tolist()[len(answers) :]) <= {MASKED}


def test_names_get_other_numbers_and_the_story_stays_the_same(place: Place) -> None:
    table = table_of(place)
    rows, keys = list(range(20)), list(range(100, 120))
    plain = Collate(table, 0)(rows, [])
    renamed = Collate(table, 40, shuffled=True, seed=3)(rows, keys)
    numbers = renamed["numbers"]  # [B,E]
    assert all(sorted(row) == list(range(40)) for row in numbers.tolist())
    is_name = (plain["facts"] >= ENTITIES) & (plain["facts"] < ENTITIES + 40)
    assert torch.equal(renamed["facts"][~is_name], plain["facts"][~is_name])
    row = torch.nonzero(is_name)[:, 0]
    assert torch.equal(renamed["facts"][is_name] - ENTITIES, numbers[row, plain["facts"][is_name] - ENTITIES])
    again = Collate(table, 40, shuffled=True, seed=3)(rows, keys)
    other = Collate(table, 40, shuffled=True, seed=3)(rows, list(range(20)))
    assert torch.equal(again["facts"], renamed["facts"])
    assert not torch.equal(other["facts"], renamed["facts"])


def test_the_names_of_the_question_come_first() -> None:
    question = np.array([[9, ENTITIES + 3, 0, ENTITIES + 1], [ENTITIES + 2, 9, ENTITIES + 2, 9]])
    for keys in ([], [7, 8]):
        numbers = numbering(question, 5, keys, 1)
        assert numbers[0, [3, 1]].tolist() == [0, 1]
        assert numbers[1, 2] == 0
        assert all(sorted(row) == [0, 1, 2, 3, 4] for row in numbers.tolist())


def test_answers_come_back_in_the_numbers_of_the_story(place: Place) -> None:
    table = table_of(place)
    rows = list(range(30))
    inputs = Collate(table, 40, shuffled=True)(rows, rows)
    scores = torch.zeros(30, table.answers.max() + 45)
    for number, answers in enumerate(inputs["answers"].tolist()):
        scores[number, [a for a in answers if a >= 0]] = 1.0
    found = by_own_numbers(chosen(scores, "several"), inputs)
    for number, row in enumerate(rows):
        assert torch.nonzero(found[number]).flatten().tolist() == sorted(table.answers_of(row).tolist())


def test_supporting_facts_move_with_the_empty_facts_that_are_put_in(place: Place) -> None:
    table = table_of(place)
    rows = list(range(40))
    plain, noisy = Collate(table, 0)(rows, rows), Collate(table, 0, time_noise=0.4)(rows, rows)
    assert noisy["facts"].shape[1] > plain["facts"].shape[1]
    for row in rows:
        for before, after in zip(plain["support"][row].tolist(), noisy["support"][row].tolist(), strict=True):
            if before >= 0:
                assert torch.equal(plain["facts"][row, before], noisy["facts"][row, after])


def test_support_is_read_in_the_last_hops() -> None:
    attention = torch.full((3, 2, 4), 0.01)
    attention[0, 1, 3] = 0.5  # one fact: in the last hop
    attention[1, 0, 2], attention[1, 1, 0] = 0.5, 0.25  # two: one a hop
    support = torch.tensor([[3, -1, -1], [2, 0, -1], [0, 1, 2]])  # three: more than hops, left out
    assert float(support_loss(attention, support)) == pytest.approx(-np.log(0.5) * 2 - np.log(0.25))


def test_shares_take_every_question_of_a_task_as_often_as_the_next() -> None:
    tasks = np.array([1] * 40 + [2] * 10)
    shares = Shares(tasks, {1: 0.25, 2: 2.0}, seed=1)
    rows = np.concatenate([shares.rows(epoch) for epoch in range(4)])
    assert len(shares.rows(0)) == 10 + 20
    assert sorted(rows[tasks[rows] == 1].tolist()) == list(range(40))
    assert (np.bincount(rows[tasks[rows] == 2])[40:] == 8).all()


def test_one_and_several_answers() -> None:
    scores = torch.tensor([[-3.0, 2.0, 1.0, -1.0], [-1.0, -2.0, -0.5, -3.0]])
    answers = torch.tensor([[1, 2], [2, MASKED]])
    assert chosen(scores, "one").tolist() == [[False, True, False, False], [False, False, True, False]]
    assert right(chosen(scores, "several"), answers).tolist() == [True, True]
    assert right(chosen(scores, "one"), answers).tolist() == [False, True]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        scores[0], torch.tensor([0.0, 1, 1, 0]), reduction="sum"
    )
    assert answer_loss(scores, answers, "several")[0] == pytest.approx(float(expected))
    assert not right(torch.tensor([[True, False]]), torch.tensor([[0]]))  # an answer unknown in training is never right


@pytest.mark.parametrize(
    ("objective", "train"),
    [
        ({}, {}),
        ({"answers": "several"}, {}),
        ({"support": 0.5, "share": {1: 0.5}, "time_noise": 0.1}, {}),
        ({"share": {1: 0.5}}, {"batch_tokens": None, "batch": 12}),
    ],
)
def test_two_workers_have_the_loss_of_one(place: Place, objective: dict[str, Any], train: dict[str, Any]) -> None:
    task, model = build(recipe(objective, **train), place)
    model = model.double().eval()
    with task.loader(1, WorkerContext(), None) as one:
        [whole] = next(one)
    halves = []
    for rank in range(2):
        with task.loader(1, WorkerContext(rank, 2), None) as loader:
            [half] = next(loader)
            halves.append(float(task.loss(model, half, None).total))
    assert sum(halves) == pytest.approx(float(task.loss(model, whole, None).total), rel=1e-6)


def test_slices_of_a_batch_have_the_loss_of_the_whole(place: Place) -> None:
    sums = []
    for rows in (None, 5):
        made = recipe(
            {"share": {1: 0.5}}, {"name": "memory_network", **PER_TASK}, batch_tokens=None, batch=12, rows_per_pass=rows
        )
        torch.manual_seed(1)
        task, model = build(made, place)
        with task.loader(1, WorkerContext(), None) as loader:
            batches = next(loader)
        assert len(batches) == (1 if rows is None else 3)
        sums.append(sum(float(task.loss(model.double().eval(), batch, None).total) for batch in batches))
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


@pytest.mark.parametrize("name", ["story_reader", "memory_network", "entity_network"])
def test_a_resumed_run_is_the_run_that_never_stopped(place: Place, tmp_path: Path, name: str) -> None:
    module = load_part("models", name, "test")
    settings = recipe({"support": 0.1, "share": {1: 0.5}}, {"name": name, **module.TINY[-1]}, checkpoint_every=3)
    weights = []
    for stops in (False, True):
        folder = tmp_path / str(stops)
        torch.manual_seed(1)
        task, model = build(settings, place)
        context = WorkerContext(stop_file=folder / "stop")
        run = Run(task, model, settings.train, 1, folder, context)
        if stops:
            with task.loader(1, context, None) as loader:
                for batches in loader:
                    run.step(batches)
                    if run.progress.step == 3:
                        run.save()
                        break
            torch.manual_seed(9)
            task, model = build(settings, place)
            run = Run(task, model, settings.train, 1, folder, context)
        assert run.run().step == 6
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_predictions_scores_and_pictures(place: Place, tmp_path: Path) -> None:
    torch.manual_seed(1)
    task, model = build(recipe({"answers": "several"}), place)
    task.predict(model.eval(), tmp_path, 1, torch.device("cpu"))
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(30))
    assert all(line["answers"] and "?" not in line["answers"] for line in lines)
    right_ones = [set(line["answers"]) == set(line["predicted"]) for line in lines]
    for metric in ("accuracy", "mean_error", "failed_tasks"):
        module = load_part("metrics", metric, "test")
        score = module.compute(tmp_path, {})
        assert score.low <= score.value <= score.high
        assert module.statistics(tmp_path, {}).comparable(module.statistics(tmp_path, {}))
    assert load_part("metrics", "accuracy", "test").compute(tmp_path, {}).value == pytest.approx(
        100 * np.mean(right_ones)
    )
    assert draw_all(tmp_path, tmp_path) == 3


def test_mean_error_counts_tasks_alike_and_failed_tasks_those_above_five(tmp_path: Path) -> None:
    lines = [(1, True)] * 19 + [(1, False)] + [(2, True), (2, False)]
    content = [
        {"id": i, "task": task, "answers": ["a"], "predicted": ["a" if good else "b"]}
        for i, (task, good) in enumerate(lines)
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in content[::-1]))
    assert load_part("metrics", "mean_error", "test").compute(tmp_path, {}).value == pytest.approx((5 + 50) / 2)
    assert load_part("metrics", "failed_tasks", "test").compute(tmp_path, {}).value == 1
    path.write_text(json.dumps({"id": 0, "task": 1, "answers": [], "predicted": ["a"]}) + "\n")
    with pytest.raises(UserError, match=r"answers.jsonl:1: 'answers' is \[\], a list of one or more strings"):
        load_part("metrics", "accuracy", "test").compute(tmp_path, {})
    path.write_text(json.dumps(content[1]) + "\n")
    with pytest.raises(UserError, match="question 0 is missing"):
        load_part("metrics", "accuracy", "test").compute(tmp_path, {})


# ---------------------------------------------------------------- asking


def asker(place: Place) -> Asker:
    torch.manual_seed(1)
    _, model = build(recipe(), place)
    return Asker(model, StoryTokenizer.load(place.data("stories") / "stories.json"), "one")


def test_asking_shows_the_facts_of_each_hop(place: Place) -> None:
    facts = read_facts(BILBO)
    assert len(facts) == 12
    reply = asker(place).ask(facts, "Where is the ring?")
    shown = text(reply, 2).splitlines()
    assert shown[0].startswith("Where is the ring? ")
    assert reply.weights is not None
    assert reply.weights.shape == (2, 12)
    assert sum("hop 1" in line for line in shown) <= 2


def test_what_the_story_does_not_mention_is_unknown(place: Place) -> None:
    reply = asker(place).ask(read_facts(BILBO), "Where is Sam now?")
    assert text(reply, 3) == "Where is Sam now? unknown   (the story does not mention Sam)"


def test_models_of_a_task_each_are_not_asked(place: Place) -> None:
    _, model = build(recipe(model={"name": "memory_network", **PER_TASK}), place)
    with pytest.raises(UserError, match=r"model\.per_task: nobody knows which task"):
        Asker(model, StoryTokenizer.load(place.data("stories") / "stories.json"), "one")


def test_a_story_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    for content, message in (
        (b"", "no facts; a story has one sentence at least that is no question"),
        (b"\n\nWhere is the ring?\n", "no facts"),
        (b"Bilbo left.\n\xff\n", "line 2: not UTF-8"),
        (b"Bilbo went home. " * 10_000, "10,000 facts, at most 2,000 are read"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_facts(path)
        assert f"{path}: {message}" in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        read_facts(tmp_path / "absent.txt")
    path.write_text("\nBilbo went home.\n\n\nFrodo sat down. ")
    assert read_facts(path) == ["Bilbo went home.", "Frodo sat down."]


def test_what_does_not_fit_is_one_line(place: Place) -> None:
    task, _ = build(recipe({"suport": 1.0}), place)
    with pytest.raises(UserError, match="unknown key 'suport'; did you mean 'support'"):
        task.objective  # noqa: B018
