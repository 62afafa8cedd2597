"""Generated questions about tables, their losses, and the answers that programs give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unroll.config import DatasetEntry, Recipe
from unroll.data.shards import SampleReader, verify
from unroll.datasets import table_questions as tables
from unroll.errors import UserError
from unroll.models.neural_programmer import Answer, Config, Model, Table
from unroll.pictures import draw_all
from unroll.tasks.table_questions import (
    Draw,
    Task,
    answer_losses,
    drawn_losses,
    joined,
    numeric_operations,
    right,
    searched_losses,
)

OPTIONS: dict[str, Any] = {
    "samples": {"train": 300, "validation": 30, "test": 40},
    "rows": {"train": [3, 9], "validation": [3, 9], "test": [9, 20]},
    "numbers": {"train": [-50, 100], "validation": [0, 9], "test": [0, 9]},
}


def prepare(out: Path, **changes: Any) -> dict[str, Any]:
    entry = DatasetEntry(preparer="table_questions", licence="none", options={**OPTIONS, **changes})
    return tables.prepare(entry, "asked", out.parent, out)


def samples(out: Path, split: str) -> list[dict[str, Any]]:
    reader = SampleReader(out, split)
    return [reader.sample(0, i) for i in range(reader.samples)]


def task(folder: Path, **train: Any) -> Task:
    entry = {"name": "asked", "suite": "tiny", "task": "table_questions", "dataset": "asked", "evaluate": {},
             "model": {"name": "neural_programmer"},
             "train": {"batch_tokens": 300, "steps": 9, "optimizer": {"learning_rate": 0.01}, **train}}  # fmt: skip
    return Task(Recipe.model_validate(entry), folder)


def execute(sample: dict[str, Any], tensors: dict[str, Tensor], names: list[str]) -> Answer:
    """The answer of a sample's own program, each choice given as 1 at its place."""
    table = Table(tensors, names)
    rows, numbers = table.every[:, None], (torch.zeros(1, 1),) * 2
    for step in sample["program"]:
        name, *rest = step.split()
        operation = torch.eye(len(names))[names.index(name)][None, None]
        column = torch.eye(len(sample["columns"]))[sample["columns"].index(rest[0]) if rest else 0][None, None]
        place = sample["numbers"].index(int(rest[1])) if len(rest) > 1 else 0
        number = torch.eye(tensors["numbers"].shape[1])[place][None, None]
        cells = table.printed(operation, column, rows, names)
        outcome, rows, numbers = table.apply(operation, column, number, rows, numbers, names)
    return Answer(outcome[0], cells[0], operation, column, number, rows)


def test_the_program_of_every_question_gives_its_answer(tmp_path: Path) -> None:
    prepared = prepare(tmp_path / "out")
    assert verify(tmp_path / "out") == prepared
    own, model = task(tmp_path / "out"), Model(Config(), prepared["vocabulary"])
    for sample in samples(tmp_path / "out", "train"):
        tensors = own.collate([sample], [])
        says = execute(sample, tensors, model.names)
        assert right(says, tensors, numeric_operations(model)).all(), sample["text"]
        assert float(answer_losses(says.number, says.cells, tensors)) == pytest.approx(0, abs=1e-4), sample["text"]
        line = own.line(sample, 0, says, model.names)
        assert line["hypothesis"] == line["references"][0]


def test_no_program_gives_nothing_and_soft_choices_are_judged_by_their_shares() -> None:
    cells = torch.zeros(3, 2, 2)
    cells[1, 0, 0], cells[2] = 1.0, 0.25
    tensors = {
        "answer": torch.tensor([7.0, 0.0, 0.0]),
        "is_number": torch.tensor([True, False, False]),
        "parts": torch.tensor([[[0, 0], [0, 0]], [[1, 0], [0, 0]], [[1, 0], [0, 1]]]),
    }
    losses = answer_losses(torch.tensor([7.0, 5.0, 5.0]), cells, tensors)
    f1 = 2 * 0.25 / (0.25 + 0.5 + 1)  # two cells say one part, the better of them counts, two say nothing
    assert losses[:2].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert float(losses[2]) == pytest.approx(-torch.tensor(f1).log().item(), abs=1e-3)


def test_an_answer_that_is_number_and_cell_takes_the_easier_way() -> None:
    cells = torch.zeros(1, 2, 1)
    cells[0, 1, 0] = 1.0
    parts = torch.tensor([[[0], [1]]])
    tensors = {"answer": torch.tensor([4.0]), "is_number": torch.tensor([True]), "parts": parts}
    assert float(answer_losses(torch.tensor([90.0]), cells, tensors)) == pytest.approx(0, abs=1e-6)
    assert float(answer_losses(torch.tensor([4.0]), torch.zeros(1, 2, 1), tensors)) == pytest.approx(0, abs=1e-6)


def test_only_drawn_programs_with_the_right_answer_are_learnt(tmp_path: Path) -> None:
    prepared = prepare(tmp_path / "out")
    own, model = task(tmp_path / "out"), Model(Config(embedding=6, width=5), prepared["vocabulary"])
    tensors = own.collate(samples(tmp_path / "out", "train")[:12], [])
    torch.manual_seed(1)
    says = model.draw(tensors, 40, 0.5)
    many = {name: tensors[name].repeat_interleave(40, 0) for name in ("answer", "is_number", "parts")}
    good = right(says, many, numeric_operations(model)).view(12, 40)
    torch.manual_seed(1)
    losses = drawn_losses(model, tensors, Draw(count=40, explore=0.5))
    assert good.any()
    assert ((losses > 0) == good.any(1)).all()
    best = says.log_probability.masked_fill(~good, -torch.inf).amax(1)[good.any(1)]
    assert (losses[good.any(1)] >= -best - 1e-4).all()
    losses.sum().backward()
    assert model.operations.grad is not None


def test_search_goes_to_the_questions_that_are_answered_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(tmp_path / "out")
    torch.manual_seed(3)
    own, model = task(tmp_path / "out"), Model(Config(embedding=6, width=5), prepared["vocabulary"])
    tensors = own.collate(samples(tmp_path / "out", "train")[:12], [])
    fine = torch.arange(12) < 9
    monkeypatch.setattr("unroll.tasks.table_questions.right", lambda says, part, numeric: fine[: len(says.number)])
    asked: list[tuple[int, int, float]] = []

    def drawn_losses(model: Model, part: dict[str, torch.Tensor], draw: Draw) -> torch.Tensor:
        asked.append((len(part["lengths"]), draw.count, draw.explore))
        return part["answer"] + 1

    monkeypatch.setattr("unroll.tasks.table_questions.drawn_losses", drawn_losses)
    losses = searched_losses(model, tensors, Draw(count=4, explore=0.5, search=60, most=15, sure=3))
    assert asked == [(9, 3, 0.0), (3, 15, 0.5)]
    torch.testing.assert_close(losses, tensors["answer"] + 1)


def test_a_drawn_program_gives_what_it_gives_when_it_is_run_alone(tmp_path: Path) -> None:
    """The programs of one question, side by side, do not touch each other."""
    prepared = prepare(tmp_path / "out")
    own, model = task(tmp_path / "out"), Model(Config(embedding=6, width=5), prepared["vocabulary"]).eval()
    tensors = own.collate(samples(tmp_path / "out", "train")[:5], [])
    says = model.draw(tensors, 7, 1.0)
    for row in range(5):
        for program in range(7):
            at = row * 7 + program
            alone = {name: tensor[row : row + 1] for name, tensor in tensors.items()}
            table = Table(alone, model.names)
            rows, numbers = table.every[:, None], (torch.zeros(1, 1),) * 2
            for step in range(4):
                chosen = [says.operations, says.columns, says.numbers]
                operation, column, number = (part[at, step][None, None] for part in chosen)
                outcome, rows, numbers = table.apply(operation, column, number, rows, numbers, model.names)
            torch.testing.assert_close(says.number[at], outcome[0, 0])
            torch.testing.assert_close(says.rows[at, -1], rows[0, 0])


def test_a_seed_decides_everything_and_every_level_is_asked(tmp_path: Path) -> None:
    prepare(tmp_path / "one")
    prepare(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    asked = samples(tmp_path / "one", "train")
    assert {sample["operations"] for sample in asked} == {1, 2, 3}
    words = {step.split()[0] for sample in asked for step in sample["program"]}
    assert words == set(Config().operations) - {"reset"}


def test_predictions_and_pictures_of_every_question(tmp_path: Path) -> None:
    prepared = prepare(tmp_path / "out")
    own, model = task(tmp_path / "out"), Model(Config(embedding=6, width=5), prepared["vocabulary"]).eval()
    (tmp_path / "said").mkdir()
    own.predict(model, tmp_path / "said", 1, torch.device("cpu"))
    lines = [json.loads(line) for line in (tmp_path / "said/translations.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(40))
    assert all(len(line["program"]) == 4 for line in lines)
    assert draw_all(tmp_path / "said", tmp_path) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {"train": [3, 9]}}, "same splits"),
        ({"rows": {split: [1, 1] for split in OPTIONS["samples"]}}, "from 2 to 1000"),
        ({"numbers": {split: [5, 5] for split in OPTIONS["samples"]}}, "least, largest"),
        ({"columns": [1, 3]}, "from 2 to 30"),
        ({"operations": 4}, "operations"),
    ],
)
def test_bad_options_get_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        prepare(tmp_path / "out", **changes)
    assert "datasets.asked" in str(error.value)
    assert "\n" not in str(error.value)


def test_answers_are_joined_as_the_official_files_do() -> None:
    assert joined(["a|b", "c\\d", "e\nf"]) == "a\\pb|c\\\\d|e\\nf"
