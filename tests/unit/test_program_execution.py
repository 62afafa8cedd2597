"""Traces of additions, and the interpreter that runs learnt programs: the two must speak of the same pad."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unroll.config import DatasetEntry, Recipe
from unroll.data.curriculum import Curriculum, CurriculumPlan
from unroll.data.loader import Batch
from unroll.data.shards import SampleReader, verify
from unroll.datasets import arithmetic_traces as traces
from unroll.errors import UserError
from unroll.tasks.program_execution import Interpreter, Task

OPTIONS: dict[str, Any] = {
    "samples": {"train": 60, "validation": 9, "test": 20},
    "lengths": {"train": [1, 2, 3], "validation": [3], "test": [3, 8]},
}


def prepare(out: Path, **changes: Any) -> dict[str, Any]:
    entry = DatasetEntry(preparer="arithmetic_traces", licence="none", options={**OPTIONS, **changes})
    return traces.prepare(entry, "sums", out.parent, out)


def samples(out: Path, split: str) -> list[dict[str, Any]]:
    reader = SampleReader(out, split)
    return [reader.sample(0, i) for i in range(reader.samples)]


def recipe(**train: Any) -> Recipe:
    optimizer = {"learning_rate": 0.01}
    entry = {"name": "sums", "suite": "tiny", "task": "program_execution", "dataset": "sums", "evaluate": {},
             "model": {"name": "npi"}, "train": {"batch_tokens": 300, "steps": 9, "optimizer": optimizer, **train}}  # fmt: skip
    return Recipe.model_validate(entry)


class Teacher:
    """A model that says what the trace's programs do: from the program and what it sees, it asks `body`."""

    def __init__(self, recursive: bool) -> None:
        self.recursive = recursive

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        return {"step": torch.zeros(batch, 1), "total": torch.zeros(batch, 1)}

    def __call__(self, program: Tensor, arguments: Tensor, seen: Tensor, state: dict[str, Tensor]) -> Any:
        count = len(program)
        end, programs, given = torch.zeros(count, 1), torch.zeros(count, 1, 5), torch.zeros(count, 1, 3, 11)
        after = {name: value.clone() for name, value in state.items()}
        for row in range(count):
            step = int(state["step"][row])
            cells = seen[row, 0].tolist()
            if step == 0:
                after["total"][row] = sum(cell for cell in cells[:3] if cell != traces.BLANK)
            wanted = self.call(int(program[row]), step, cells, int(after["total"][row]))
            end[row] = 1 if wanted is None else -1
            name, values = wanted or (0, traces.NOTHING)
            programs[row, 0, name] = 1
            given[row, 0, range(3), list(values)] = 1
            after["step"][row] = step + 1
        return SimpleNamespace(end=end, programs=programs, arguments=given, state=after)

    def call(self, program: int, step: int, cells: list[int], total: int) -> Any:
        pad = SimpleNamespace(seen=lambda: cells)
        if program == traces.ADD and step % 2 == 0 and (step == 0 or not self.recursive):
            return next(traces.body(program, pad, False), None)
        if program == traces.ADD:
            return [None, (traces.LSHIFT, traces.NOTHING), (traces.ADD, traces.NOTHING), None][
                min(step, 3) if self.recursive else 1
            ]
        if program == traces.ADD1:
            steps = [(traces.ACT, (traces.WRITE, traces.OUTPUT_ROW, total % 10))]
            steps += [(traces.CARRY, traces.NOTHING)] if total >= 10 else []
            return steps[step] if step < len(steps) else None
        calls = list(traces.body(program, pad, False))
        return calls[step] if step < len(calls) else None


@pytest.mark.parametrize("recursive", [False, True])
def test_traces_compute_their_sums(tmp_path: Path, recursive: bool) -> None:
    prepared = prepare(tmp_path / "out", recursive=recursive)
    assert verify(tmp_path / "out") == prepared
    for split in OPTIONS["samples"]:
        for sample in samples(tmp_path / "out", split):
            assert int(sample["first"]) + int(sample["second"]) == int(sample["target"])
            assert ("trace" in sample) == (split != "test")


@pytest.mark.parametrize("recursive", [False, True])
def test_programs_that_follow_the_traces_are_run_without_an_error(tmp_path: Path, recursive: bool) -> None:
    manifest = prepare(tmp_path / "out", recursive=recursive)
    sums = [sample for sample in samples(tmp_path / "out", "test") if len(sample["target"]) >= 8]
    machine = Interpreter(Teacher(recursive), manifest, sums, torch.device("cpu"))
    machine.run(1000)
    assert [machine.output(number) for number in range(len(sums))] == [sample["target"] for sample in sums]
    assert (machine.depth < 0).all()
    calls = machine.calls(0)["calls"]
    assert all(call["end"] is not None for call in calls)
    assert len(calls) == 1 + len([step for step in machine.history if not step[0]])


def test_what_is_run_is_what_was_taught(tmp_path: Path) -> None:
    """The pad of the interpreter shows, step by step, what the trace of the same sum was taught with."""
    manifest = prepare(tmp_path / "out")
    sample = samples(tmp_path / "out", "validation")[0]
    steps = sample["trace"].reshape(-1, traces.COLUMNS)
    machine = Interpreter(Teacher(False), manifest, [sample], torch.device("cpu"))
    seen = []
    original = machine.model.__call__

    def watched(program: Tensor, arguments: Tensor, cells: Tensor, state: dict[str, Tensor]) -> Any:
        seen.append((int(program[0]), *cells[0, 0].tolist()))
        return original(program, arguments, cells, state)

    machine.model = SimpleNamespace(__call__=watched)
    machine.model = watched  # type: ignore[assignment]
    machine.run(1000)
    taught = [(int(step[1]), *step[5:9].tolist()) for step in steps]
    assert sorted(seen) == sorted(taught)


def test_a_run_that_never_ends_is_stopped(tmp_path: Path) -> None:
    manifest = prepare(tmp_path / "out")
    teacher = Teacher(False)
    teacher.call = lambda *_: (traces.ADD, traces.NOTHING)  # type: ignore[method-assign]
    machine = Interpreter(teacher, manifest, samples(tmp_path / "out", "test")[:3], torch.device("cpu"))
    machine.run(100)
    assert (machine.steps == 100).all()
    assert [machine.output(number) for number in range(3)] == ["", "", ""]


def test_no_sum_is_in_two_splits_and_a_seed_decides_everything(tmp_path: Path) -> None:
    prepare(tmp_path / "one", samples={"train": 600, "validation": 90, "test": 200})
    prepare(tmp_path / "two", samples={"train": 600, "validation": 90, "test": 200})
    sums = {s: {(x["first"], x["second"]) for x in samples(tmp_path / "one", s)} for s in OPTIONS["samples"]}
    assert not sums["train"] & sums["test"]
    assert not sums["train"] & sums["validation"]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_calls_of_all_traces_stand_in_rows_of_their_own(tmp_path: Path) -> None:
    prepare(tmp_path / "out")
    task = Task(recipe(), tmp_path / "out")
    chosen = samples(tmp_path / "out", "train")[:5]
    tensors = task.collate(chosen, [])
    steps = np.concatenate([sample["trace"] for sample in chosen]).reshape(-1, traces.COLUMNS)
    real = tensors["targets"] >= 0
    assert int(real.sum()) == len(steps)
    assert (real.sum(1) > 0).all()
    assert int(tensors["ends"].sum()) == len(tensors["program"]) == int(steps[:, 0].sum())
    flat = torch.cat([tensors["seen"][real], tensors["targets"][real][:, None]], 1)
    assert flat.tolist() == steps[:, 5:10].tolist()
    assert task.collate([], [])["targets"].shape == (0, 1)


def test_a_curriculum_lets_in_longer_sums_epoch_by_epoch(tmp_path: Path) -> None:
    prepare(tmp_path / "out")
    task = Task(recipe(objective={"curriculum": {"start": 1, "epochs": 2}}), tmp_path / "out")
    _, plan = task.plan("train", 1)
    assert isinstance(plan, CurriculumPlan)
    reader = SampleReader(tmp_path / "out", "train")
    for epoch in range(7):
        rows = np.concatenate(plan.batches(epoch * plan.windows_per_epoch))
        digits = [reader.lengths(shard)[index, 1] for shard, index in rows.tolist()]
        assert set(digits) == set(range(1, min(3, 1 + epoch // 2) + 1))
    with pytest.raises(UserError, match="start: found 0, the easiest sample has difficulty 1"):
        CurriculumPlan(Curriculum(start=0), reader.shard_counts, reader.lengths, 300, 8, 1)


def test_the_loss_counts_every_step_once(tmp_path: Path) -> None:
    prepare(tmp_path / "out")
    task = Task(recipe(), tmp_path / "out")
    from unroll.models.npi import Config, Model

    model = Model(Config(width=8, seen=6), task.vocabulary)
    chosen = samples(tmp_path / "out", "train")[:6]
    together = float(task.loss(model, batch(task.collate(chosen, [])), None).total)
    alone = sum(float(task.loss(model, batch(task.collate([sample], [])), None).total) for sample in chosen)
    assert together == pytest.approx(alone, rel=1e-5)


def batch(tensors: dict[str, Tensor]) -> Batch:
    return Batch(tensors, float((tensors["targets"] >= 0).sum()), 0, 1, {}, "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": {"train": [1]}}, "same splits"),
        ({"samples": {"train": 0}, "lengths": {"train": [1]}}, "at least one sample"),
        ({"samples": {"train": 5}, "lengths": {"train": [0]}}, "from 1 to 1000"),
        ({"held_out": 0.5}, "held_out leaves no sum"),
        ({"lenghts": {}}, "did you mean 'lengths'"),
    ],
)
def test_bad_options_get_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        prepare(tmp_path / "out", **changes)
    assert "datasets.sums" in str(error.value)
    assert "\n" not in str(error.value)
