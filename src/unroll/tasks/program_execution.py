"""Program execution: learn programs from the traces of their runs, then run them on inputs never seen.

Training: batches of about `train.batch_tokens` steps. All calls of all traces in a batch are the rows of one matrix,
as every call has a state of its own. A curriculum (`train.objective.curriculum`) begins with short inputs: epoch e
takes the sums of at most `start` + e // `epochs` digits (`data/curriculum.py`).

Loss: sum over steps of -log p(end or not) and, where the program goes on, of -log p(program called) and
-log p(each of its arguments), in nats; a step is what the mean is over.

Predictions: the learnt program runs on a scratch pad of its own for each sum of a split, many sums at a time; what it
wrote on the output row is compared with the sum. A run that does not end within `steps_per_digit` x digits + 50 steps,
or leaves the pad, is stopped; what stands on the pad then counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unroll.config import Recipe, Strict, check
from unroll.data.curriculum import Curriculum
from unroll.data.loader import MASKED, Batch
from unroll.data.shards import SampleReader
from unroll.errors import UserError
from unroll.progress import progress
from unroll.tasks.base import Loss, State
from unroll.tasks.samples import SampleTask

WRITE, LEFT = 0, 0
OUTPUT_ROW = 3


class Objective(Strict):
    """What training sees first."""

    curriculum: Curriculum | None = None


class Prediction(Strict):
    """`batch` sums run at a time; the calls of one run of each of the `pictures` shortest lengths are drawn."""

    split: str = "test"
    batch: int = Field(500, ge=1)
    steps_per_digit: int = Field(40, ge=1)
    pictures: int = Field(2, ge=0)


class Task(SampleTask):
    """Program execution on prepared traces."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        super().__init__(recipe, folder)
        if "programs" not in self.manifest:
            raise UserError(f"{folder / 'manifest.json'}: no execution traces; this task needs a preparer of them")
        self.vocabulary = {
            "programs": len(self.manifest["programs"]),
            "rows": len(self.manifest["rows"]),
            "symbols": self.manifest["vocabulary"],
            "arguments": self.manifest["arguments"],
        }
        self.description = {"programs": self.manifest["programs"]}

    # --- training ---------------------------------------------------------------------------------------------------

    @cached_property
    def objective(self) -> Objective:
        options: Objective = check(Objective, self.training.objective, f"recipes.{self.recipe.name}.train.objective")
        return options

    @property
    def curriculum(self) -> Curriculum | None:
        """Short sums first, if the recipe says so."""
        return self.objective.curriculum

    def collate(self, samples: list[dict[str, Any]], keys: list[int]) -> dict[str, Tensor]:
        """Traces to tensors, a row for each call, F in all: `program` [F], `arguments` [F,A], `seen` [F,T,R], and for
        each step `targets` [F,T] (the program called, -1 where there is no step), `given` [F,T,A] and `ends` [F,T]."""
        rows, arguments = self.vocabulary["rows"], self.vocabulary["arguments"]
        columns = 4 + 2 * arguments + rows
        steps = np.concatenate([s["trace"] for s in samples]) if samples else np.empty(0, np.int64)
        steps = steps.reshape(-1, columns)  # [steps,columns]
        opens = np.flatnonzero(steps[:, 0])  # [F]
        call = np.cumsum(steps[:, 0]) - 1  # [steps]
        place = np.arange(len(steps)) - opens[call]  # [steps]
        table = np.zeros((len(opens), int(place.max()) + 1 if len(steps) else 1, columns), np.int64)  # [F,T,columns]
        table[..., 2 + arguments + rows] = MASKED
        table[call, place] = steps
        tensor = torch.from_numpy(table)
        cuts = [1, 1, arguments, rows, 1, arguments, 1]
        _, program, own, seen, targets, given, ends = tensor.split(cuts, -1)
        return {
            "program": program[:, 0, 0],
            "arguments": own[:, 0],
            "seen": seen,
            "targets": targets.squeeze(-1),
            "given": given,
            "ends": ends.squeeze(-1),
        }

    def loss(self, model: Any, batch: Batch, carry: State | None) -> Loss:
        """Log-loss of one batch, a sum over steps in nats; nothing is carried."""
        tensors = batch.tensors
        says = model(
            tensors["program"], tensors["arguments"], tensors["seen"], model.initial_state(len(tensors["program"]))
        )
        real = tensors["targets"] != MASKED  # [F,T]
        ends = tensors["ends"] > 0
        goes_on = real & ~ends
        end = F.binary_cross_entropy_with_logits(says.end[real], ends[real].to(says.end.dtype), reduction="sum")
        program = F.nll_loss(says.programs[goes_on], tensors["targets"][goes_on], reduction="sum")
        argument = F.nll_loss(
            says.arguments[goes_on].flatten(0, 1), tensors["given"][goes_on].flatten(), reduction="sum"
        )
        total = end + program + argument
        return Loss(total, total.detach(), None)

    # --- predictions ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, model: Any, out: Path, seed: int, device: torch.device) -> None:
        """Run every sum of a split; write `translations.jsonl` (a line a sum, in the split's order) and pictures."""
        options: Prediction = check(Prediction, self.recipe.predict, f"recipes.{self.recipe.name}.predict")
        reader = SampleReader(self.folder, options.split)
        lines: dict[int, dict[str, Any]] = {}
        traces: dict[int, dict[str, Any]] = {}
        with progress(f"run {options.split}", reader.samples) as bar:
            for samples in by_length(reader, options.batch):
                machine = Interpreter(model, self.manifest, samples, device)
                machine.run(options.steps_per_digit * machine.digits + 50)
                for number, sample in enumerate(samples):
                    lines[sample["id"]] = self.line(sample, machine, number)
                if machine.digits not in traces:
                    traces[machine.digits] = machine.calls(0)
                bar.advance(len(samples))
        ordered = [lines[number] for number in sorted(lines)]
        (out / "translations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ordered))
        pictures = [by_digits(ordered)] + [
            {
                "kind": "program_trace",
                "title": f"Calls of {digits} digits: {trace['input']}",
                "text": "What the learnt program calls, step by step: a bar is a call, from where it opens to where it "
                "ends; a dot is an action on the pad.",
                "data": trace,
            }
            for digits, trace in sorted(traces.items())[: options.pictures]
        ]
        (out / "pictures.jsonl").write_text("".join(json.dumps(picture) + "\n" for picture in pictures))

    def line(self, sample: dict[str, Any], machine: Interpreter, number: int) -> dict[str, Any]:
        """What the predictions file says of one sum. Digits stand apart, so that lengths are counted in digits."""
        return {
            "id": sample["id"],
            "source": " ".join(f"{sample['first']}+{sample['second']}"),
            "references": [sample["target"]],
            "hypothesis": machine.output(number),
            "digits": machine.digits,
            "steps": int(machine.steps[number]),
            "ended": bool(machine.depth[number] < 0),
        }


def by_length(reader: SampleReader, batch: int) -> Iterator[list[dict[str, Any]]]:
    """The samples of a split, at most `batch` of equal length at a time."""
    places = [(shard, index) for shard, count in enumerate(reader.shard_counts) for index in range(count)]
    lengths = np.concatenate([reader.lengths(shard)[:, -1] for shard in range(len(reader.shard_counts))])
    for length in np.unique(lengths).tolist():
        chosen = np.flatnonzero(lengths == length).tolist()
        for start in range(0, len(chosen), batch):
            yield [reader.sample(*places[number]) for number in chosen[start : start + batch]]


def by_digits(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The picture of exact sums against digits."""
    counts: dict[int, list[int]] = {}
    for line in lines:
        counts.setdefault(line["digits"], []).append(line["hypothesis"] in line["references"])
    points = [{"x": digits, "y": 100 * sum(right) / len(right), "n": len(right)} for digits, right in counts.items()]
    return {
        "kind": "score_by_length",
        "title": "Exact sums by length",
        "text": "Sums that the learnt program computes without an error, by the digits of the longer number.",
        "data": {"x": "digits", "y": "exact sums, %", "points": sorted(points, key=lambda point: point["x"])},
    }


class Interpreter:
    """Runs the learnt program on B scratch pads of equal width at once, each with a stack of open calls of its own.

    All that a step changes are tensors with B rows; Python goes through steps, not through sums.
    """

    def __init__(self, model: Any, manifest: dict[str, Any], samples: list[dict[str, Any]], device: torch.device):
        self.model, self.manifest, self.device, self.samples = model, manifest, device, samples
        self.blank, self.primitive = manifest["vocabulary"] - 1, manifest["programs"].index(manifest["primitive"])
        self.digits = max(max(len(s["first"]), len(s["second"])) for s in samples)
        count, rows, arguments = len(samples), len(manifest["rows"]), manifest["arguments"]
        self.every = torch.arange(count, device=device)
        self.cells = pads(samples, rows, self.digits + 2, self.blank).to(device)  # [B,R,N]
        self.pointers = torch.zeros(count, rows, dtype=torch.int64, device=device)  # [B,R]
        self.depth = torch.zeros(count, dtype=torch.int64, device=device)  # [B] the call that runs; -1: all ended
        self.steps = torch.zeros(count, dtype=torch.int64, device=device)  # [B]
        levels = self.digits + 8
        self.program = torch.zeros(count, levels, dtype=torch.int64, device=device)  # [B,L]
        self.arguments = torch.full((count, levels, arguments), self.blank, device=device)  # [B,L,A]
        fresh = model.initial_state(1)
        self.state = {name: value.new_zeros(count, levels, value.shape[1]) for name, value in fresh.items()}  # [B,L,H]
        self.history: list[list[int]] = []

    def run(self, limit: int) -> None:
        """Step until every sum has ended, or `limit` steps."""
        for _ in range(limit):
            running = self.every[self.depth >= 0]  # [b]
            if not len(running):
                return
            self.step(running)

    def step(self, rows: Tensor) -> None:
        """One step of the calls on top of the stacks of `rows` [b]."""
        level = self.depth[rows]
        seen = self.cells[rows].gather(2, self.pointers[rows][..., None]).squeeze(-1)  # [b,R]
        state = {name: value[rows, level] for name, value in self.state.items()}  # [b,H]
        says = self.model(self.program[rows, level], self.arguments[rows, level], seen[:, None], state)
        for name, value in says.state.items():
            self.state[name][rows, level] = value
        ends = says.end[:, 0] > 0  # [b]
        program, given = says.programs[:, 0].argmax(-1), says.arguments[:, 0].argmax(-1)  # [b] [b,A]
        self.note(rows, ends, program, given)
        self.steps[rows] += 1
        self.depth[rows[ends]] -= 1
        acts = ~ends & (program == self.primitive)
        self.act(rows[acts], given[acts])
        self.open(rows[~ends & ~acts], program[~ends & ~acts], given[~ends & ~acts])

    def act(self, rows: Tensor, given: Tensor) -> None:
        """Write a digit or move a pointer. Pads end on both sides: pointers stay within, other rows do not exist."""
        kind, row, value = given.unbind(-1)
        row = row.clamp_max(self.cells.shape[1] - 1)
        pointer = self.pointers[rows, row]
        writes = kind == WRITE
        self.cells[rows[writes], row[writes], pointer[writes]] = value[writes]
        moved = pointer + torch.where(value == LEFT, 1, -1)
        self.pointers[rows, row] = torch.where(writes, pointer, moved.clamp(0, self.cells.shape[2] - 1))

    def open(self, rows: Tensor, program: Tensor, given: Tensor) -> None:
        """A call on top of the stack, with a fresh state; a stack that is full stays as it is."""
        fits = self.depth[rows] + 1 < self.program.shape[1]
        rows, program, given = rows[fits], program[fits], given[fits]
        self.depth[rows] += 1
        level = self.depth[rows]
        self.program[rows, level], self.arguments[rows, level] = program, given
        for value in self.state.values():
            value[rows, level] = 0.0

    def note(self, rows: Tensor, ends: Tensor, program: Tensor, given: Tensor) -> None:
        """Remember what the first sum does, for its picture."""
        if len(rows) and int(rows[0]) == 0:
            self.history.append([int(ends[0]), int(program[0]), *given[0].tolist()])

    def output(self, number: int) -> str:
        """The number on the output row; ? where a cell between digits is blank."""
        cells = self.cells[number, OUTPUT_ROW].tolist()
        while cells and cells[-1] == self.blank:
            cells.pop()
        return "".join("?" if cell == self.blank else str(cell) for cell in reversed(cells))

    def calls(self, number: int) -> dict[str, Any]:
        """The calls of the first sum: each with its level, the step that opens it and the one that ends it."""
        names, open_calls = self.manifest["programs"], [0]
        found: list[dict[str, Any]] = [{"program": names[0], "arguments": [], "level": 0, "start": 0, "end": None}]
        for step, (ends, program, *given) in enumerate(self.history):
            if ends:
                found[open_calls.pop()]["end"] = step
                continue
            shown = [value for value in given if value != self.blank]
            acts = program == self.primitive
            found.append({"program": names[program], "arguments": shown, "level": len(open_calls), "start": step,
                          "end": step if acts else None})  # fmt: skip
            if not acts:
                open_calls.append(len(found) - 1)
        sample = self.samples[number]
        text = f"{sample['first']} + {sample['second']} = {self.output(number)}"
        return {"input": text, "steps": len(self.history), "programs": names, "rows": self.manifest["rows"],
                "primitive": names[self.primitive], "calls": found}  # fmt: skip


def pads(samples: list[dict[str, Any]], rows: int, width: int, blank: int) -> Tensor:
    """Scratch pads int64 [B,R,N], column 0 the lowest digit."""
    cells = torch.full((len(samples), rows, width), blank)
    for row, name in enumerate(("first", "second")):
        text = "".join(sample[name].rjust(width)[::-1] for sample in samples)
        digits = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(torch.int64)
        cells[:, row] = torch.where(digits == ord(" "), blank, digits - ord("0")).view(-1, width)
    return cells
