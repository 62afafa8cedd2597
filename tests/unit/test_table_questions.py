"""Generated questions about tables, their losses, and the answers that programs give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unroll.config import DatasetEntry, Recipe
from unroll.data.shards import SampleReader, verify
from unroll.datasets import table_questions as tables
from unroll.models.neural_programmer import Answer, Config, Model, Table
from unroll.tasks.table_questions import Task, answer_losses, numeric_operations, right

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
    rows, numbers = [table.every[:, None]] * 2, [torch.zeros(1, 1)] * 3
    for step in sample["program"]:
        name, *rest = step.split()
        operation = torch.eye(len(names))[names.index(name)][None, None]
        column = torch.eye(len(sample["columns"]))[sample["columns"].index(rest[0]) if rest else 0][None, None]
        place = sample["numbers"].index(int(rest[1])) if len(rest) > 1 else 0
        number = torch.eye(tensors["numbers"].shape[1])[place][None, None]
        cells = table.printed(operation, column, rows[-1], names)
        outcome, after = table.apply(operation, column, number, rows, numbers, names, False)
        rows, numbers = [*rows[1:], after], [*numbers[1:], outcome]
    return Answer(numbers[-1][0], cells[0], operation, column, number, after)


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
