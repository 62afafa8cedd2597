"""Questions about a table, learnt from answers alone: no program is ever shown.

Training: batches of `train.batch` questions, or of about `train.batch_tokens` words of questions of like length (where
they are generated, these are questions of one kind); a curriculum (`train.objective.curriculum`) begins with
questions of few operations. A model (`models/neural_programmer.py`) gives a number and a weight for each cell.

Loss of a question, summed over the batch:
    a number y      Huber((number - y) / (|y| + 1)): counts and sums of thousands pull equally hard
    cells           -log F1, F1 = 2 hit / (printed + K): K parts of the answer, `hit` the sum over them of the weight of
                    the best cell that says so, `printed` the weight of all cells (best cells once)
    either          the smaller of the two, where a number is also found in cells
    drawn           with `draw`, programs are drawn for each question and run exactly; the loss is -log of the marginal
                    probability of those with the right answer (`drawn_losses`; Guu et al. 2017, arXiv:1704.07926); with
                    `draw.search` most of them for questions that are still answered wrongly (`searched_losses`)
`noise`: Gaussian noise of this deviation on every gradient (Neelakantan et al. 2015, arXiv:1511.06807).
Why draw: soft choices learn to answer by mixtures, and what they choose in part at a step where it does no harm destroys
the answer when the largest is taken; a program that was drawn means what it will mean. The papers' soft training is
the default, `draw` what the recipes use.
Deliberate differences to 1511.04834: the number's error is relative, and F1 stands for the log-loss of single cells, as
one wrong cell in a hundred then weighs as much as one in five; the noise does not decay.

Predictions: the largest choice of each step; the answer is a number if the last operation computes one, else the
printed cells, joined by |. `translations.jsonl` has a line a question, with the program.
"""

from __future__ import annotations

import json
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
from unroll.data.loader import Batch
from unroll.data.mixed import MixedPlan
from unroll.data.plan import SamplePlan
from unroll.data.shards import SampleReader
from unroll.errors import UserError
from unroll.progress import progress
from unroll.tasks.base import Loss, State
from unroll.tasks.samples import WINDOW_SHARDS, SampleTask

HUBER = 1.0
LEAST = 1e-4
"""Added to both sides of F1, so that its logarithm ends somewhere."""
CLOSE = 1e-4


class Draw(Strict):
    """`count` programs of each question, each choice drawn evenly with a probability of up to `explore`. With `search`
    the questions that the likeliest choices answer rightly get `sure` programs, none of them explored, and the others as
    many as make `search` of the batch, from `count` to `most` each."""

    count: int = Field(16, ge=1)
    explore: float = Field(0.1, ge=0.0, le=1.0)
    search: int | None = Field(None, ge=1)
    most: int = Field(256, ge=1)
    sure: int = Field(2, ge=1)


class Objective(Strict):
    """What training sees first; programs that are drawn, not mixed; noise on the gradients."""

    curriculum: Curriculum | None = None
    draw: Draw | None = None
    noise: float = Field(0.0, ge=0.0)


class Prediction(Strict):
    """How a split is answered: `batch` questions at a time; the choices for the first `pictures` of each number of
    operations are drawn."""

    split: str = "test"
    batch: int = Field(200, ge=1)
    pictures: int = Field(2, ge=0)


class Task(SampleTask):
    """Question answering on prepared tables."""

    validation_score = "wrong"

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        super().__init__(recipe, folder)
        if "words" not in self.manifest:
            raise UserError(
                f"{folder / 'manifest.json'}: no questions about tables; this task needs a preparer of them"
            )
        self.vocabulary = self.manifest["vocabulary"]

    @cached_property
    def objective(self) -> Objective:
        options: Objective = check(Objective, self.training.objective, f"recipes.{self.recipe.name}.train.objective")
        return options

    @property
    def curriculum(self) -> Curriculum | None:
        """Questions of few operations first, if the recipe says so."""
        return self.objective.curriculum

    # --- training ---------------------------------------------------------------------------------------------------

    def plan(self, split: str, seed: int) -> tuple[SampleReader, SamplePlan]:
        """Which questions form step n: `train.batch` of them, or `train.batch_tokens` words of like length."""
        rows = self.training.batch
        if rows is None:
            return super().plan(split, seed)
        reader = SampleReader(self.folder, split)
        curriculum = self.curriculum if split == "train" else None
        return reader, MixedPlan(rows, curriculum, reader.shard_counts, reader.lengths, WINDOW_SHARDS, seed)

    def collate(self, samples: list[dict[str, Any]], keys: list[int]) -> dict[str, Tensor]:
        """Questions to tensors.

        question [B,S], lengths [B]; numbers [B,K] in the question, their places [B,K] in it, number_mask [B,K];
        values [B,N,C] and whether a cell is one, numeric [B,N,C]; row_mask [B,N], column_mask [B,C]; names [B,C,W] words
        of the columns, -1 where there is none; matches, frequent [B,N,C] and column_matches [B,C] of text;
        answer [B] and is_number [B]; parts [B,N,C], which part of the answer a cell says, from 1 on.
        """
        count = len(samples)
        longest = max((len(s["question"]) for s in samples), default=1)
        numbers = max([len(s["numbers"]) for s in samples] + [1])
        rows, columns = max([len(s["rows"]) for s in samples] + [1]), max([len(s["columns"]) for s in samples] + [1])
        words = max([max(s.get("name_sizes", [1])) for s in samples] + [1])
        table = (count, rows, columns)
        out: dict[str, np.ndarray] = {
            "question": np.zeros((count, longest), np.int64),
            "lengths": np.array([len(s["question"]) for s in samples], np.int64),
            "numbers": np.zeros((count, numbers), np.float32),
            "places": np.zeros((count, numbers), np.int64),
            "number_mask": np.zeros((count, numbers), bool),
            "values": np.full(table, np.nan, np.float32),
            "row_mask": np.zeros((count, rows), bool),
            "column_mask": np.zeros((count, columns), bool),
            "names": np.full((count, columns, words), -1, np.int64),
            "matches": np.zeros(table, bool),
            "frequent": np.zeros(table, bool),
            "column_matches": np.zeros((count, columns), np.float32),
            "answer": np.zeros(count, np.float32),
            "is_number": np.zeros(count, bool),
            "parts": np.zeros(table, np.int64),
        }
        for row, sample in enumerate(samples):
            fill(row, sample, out)
        tensors = {name: torch.from_numpy(array) for name, array in out.items()}
        numeric = ~tensors["values"].isnan()
        return {**tensors, "values": tensors["values"].nan_to_num(), "numeric": numeric}

    def loss(self, model: Any, batch: Batch, carry: State | None) -> Loss:
        """The loss of one batch, a sum over questions; nothing is carried."""
        tensors, draw = batch.tensors, self.objective.draw
        if draw is not None:
            total = (drawn_losses if draw.search is None else searched_losses)(model, tensors, draw).sum()
        else:
            says = model(tensors)
            total = answer_losses(says.number.float(), says.cells.float(), tensors).sum()
        objective = total
        if model.training and self.objective.noise:
            noise = [(torch.randn_like(p) * p).sum() for p in model.parameters()]
            objective = total + batch.weight * self.objective.noise * torch.stack(noise).sum()
        return Loss(objective, total.detach(), None)

    def fit(self, model: Any) -> None:
        """Fit a model by counting: it gets the answers of the training split that are numbers."""
        reader = SampleReader(self.folder, "train")
        places = [(shard, index) for shard, count in enumerate(reader.shard_counts) for index in range(count)]
        answers = [reader.sample(*place)["answer"] for place in places]
        model.fit([answer for answer in answers if answer is not None])

    @torch.no_grad()
    def penalty(self, model: Any, batch: Batch) -> float:
        """How many answers are wrong, in %, with the largest choice at every step."""
        says = model(batch.tensors, hard=True)
        return 100 * float((~right(says, batch.tensors, numeric_operations(model))).sum())

    # --- predictions ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, model: Any, out: Path, seed: int, device: torch.device) -> None:
        """Write `translations.jsonl` (one line a question, in the split's order) and pictures into `out`."""
        options: Prediction = check(Prediction, self.recipe.predict, f"recipes.{self.recipe.name}.predict")
        reader = SampleReader(self.folder, options.split)
        places = [(shard, index) for shard, count in enumerate(reader.shard_counts) for index in range(count)]
        order = np.argsort([len(reader.sample(*place)["rows"]) for place in places], kind="stable").tolist()
        lines: dict[int, dict[str, Any]] = {}
        pictures: dict[int, list[dict[str, Any]]] = {}
        with progress(f"answer {options.split}", reader.samples) as bar:
            for start in range(0, len(order), options.batch):
                samples = [reader.sample(*places[number]) for number in order[start : start + options.batch]]
                tensors = {name: tensor.to(device) for name, tensor in self.collate(samples, []).items()}
                says, soft = model(tensors, hard=True), model(tensors)
                for row, sample in enumerate(samples):
                    lines[sample["id"]] = self.line(sample, row, says, model.names)
                    drawn = pictures.setdefault(sample["operations"], [])
                    if len(drawn) < options.pictures:
                        drawn.append(picture(sample, row, soft, lines[sample["id"]], model.names))
                bar.advance(len(samples))
        ordered = [lines[number] for number in sorted(lines)]
        (out / "translations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ordered))
        shown_first = [drawn for _, kept in sorted(pictures.items()) for drawn in kept]
        (out / "pictures.jsonl").write_text("".join(json.dumps(picture) + "\n" for picture in shown_first))

    def line(self, sample: dict[str, Any], row: int, says: Any, names: list[str]) -> dict[str, Any]:
        """What the predictions file says of one question."""
        last = names[int(says.operations[row, -1].argmax())]
        if last in NUMERIC:
            answers = [shown(float(says.number[row]))]
        else:
            texts = sample.get("texts") or sample["rows"]
            answers = [str(texts[i][j]) for i, j in (says.cells[row] > 0.5).nonzero().tolist()]
        return {
            "id": sample["id"],
            "source": sample["text"],
            "references": [joined(sample["answers"])],
            "hypothesis": joined(answers),
            "program": program(sample, row, says, names),
            "operations": sample["operations"],
        }


NUMERIC = ("count", "sum", "difference")


def numeric_operations(model: Any) -> Tensor:
    """Which operations of a model compute a number: bool [O]."""
    return torch.tensor([name in NUMERIC for name in model.names])


def fill(row: int, sample: dict[str, Any], out: dict[str, np.ndarray]) -> None:
    """Put one sample into row `row` of a batch's arrays."""
    size, table = len(sample["columns"]), np.array(sample["rows"], np.float32)  # null is nan
    out["question"][row, : len(sample["question"])] = sample["question"]
    found = len(sample["numbers"])
    out["numbers"][row, :found], out["number_mask"][row, :found] = sample["numbers"], True
    out["places"][row, :found] = sample["places"]
    out["values"][row, : len(table), :size] = table
    out["row_mask"][row, : len(table)], out["column_mask"][row, :size] = True, True
    sizes = sample.get("name_sizes", [1] * size)
    for column, words in enumerate(np.split(sample["names"], np.cumsum(sizes)[:-1])):
        out["names"][row, column, : len(words)] = words
    for name in ("matches", "frequent"):
        if name in sample:
            out[name][row, sample[name] // size, sample[name] % size] = True
    if "column_matches" in sample:
        out["column_matches"][row, :size] = sample["column_matches"]
    if sample["answer"] is not None:
        out["answer"][row], out["is_number"][row] = sample["answer"], True
    parts = sample.get("parts", np.arange(len(sample["cells"])) + 1)
    out["parts"][row, sample["cells"] // size, sample["cells"] % size] = parts


def answer_losses(number: Tensor, cells: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The loss of each question [B] from the number [B] and the weights of the cells [B,N,C]; 0 if nothing is right."""
    answer, is_number = tensors["answer"], tensors["is_number"]
    error = (number - answer) / (answer.abs() + 1)
    of_number = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=HUBER)  # [B]
    best, wanted, outside = overlap(cells, tensors["parts"])
    hit = best.sum(1)  # [B]
    f1 = (2 * hit + LEAST) / (hit + outside + wanted + LEAST)
    of_cells = -f1.log()
    in_cells = wanted > 0
    either = torch.where(is_number & in_cells, torch.minimum(of_number, of_cells), of_number * is_number)
    return torch.where(in_cells & ~is_number, of_cells, either)


def drawn_losses(model: Any, tensors: dict[str, Tensor], draw: Draw) -> Tensor:
    """-log of the probability of the right ones among the programs drawn for each question [B]: its gradient is theirs,
    each weighted by its share; 0 where none is right."""
    says = model.draw(tensors, draw.count, draw.explore)
    many = {name: tensors[name].repeat_interleave(draw.count, 0) for name in ("answer", "is_number", "parts")}
    good = right(says, many, numeric_operations(model)).view(-1, draw.count)  # [B,G]
    likely = says.log_probability  # [B,G]
    shares = likely.detach().masked_fill(~good, torch.finfo(likely.dtype).min / 2).softmax(-1) * good
    return -(shares * likely).sum(-1)


def searched_losses(model: Any, tensors: dict[str, Tensor], draw: Draw) -> Tensor:
    """`drawn_losses` [B], with more programs where the likeliest one is wrong: search goes where it is needed."""
    assert draw.search is not None
    with torch.no_grad():
        fine = right(model(tensors, hard=True), tensors, numeric_operations(model))  # [B]
    losses = torch.zeros_like(tensors["answer"])
    wrong = int((~fine).sum())
    each = max(draw.count, min(draw.most, draw.search // max(1, wrong)))
    for these, count, explore in ((fine, draw.sure, 0.0), (~fine, each, draw.explore)):
        if these.any():
            part = {name: tensor[these] for name, tensor in tensors.items()}
            found = drawn_losses(model, part, draw.model_copy(update={"count": count, "explore": explore}))
            losses = losses.index_put((these.nonzero()[:, 0],), found.to(losses.dtype))
    return losses


def overlap(cells: Tensor, parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight of the best cell for each part of the answer [B,P], the number of parts [B], and the weight of all
    cells that say no part of it [B]."""
    flat, part = cells.flatten(1), parts.flatten(1)  # [B,N*C]
    count = int(part.max()) + 1
    best = flat.new_zeros(len(flat), count).scatter_reduce(1, part, flat, "amax")  # [B,P+1]
    return best[:, 1:], part.amax(1), (flat * (part == 0)).sum(1)


def right(says: Any, tensors: dict[str, Tensor], numeric: Tensor) -> Tensor:
    """Whether each answer [B] of a hard program is the wanted one."""
    computes = numeric.to(says.number.device)[says.operations[:, -1].argmax(-1)]  # [B]
    answer = tensors["answer"]
    same = tensors["is_number"] & ((says.number - answer).abs() <= CLOSE * (answer.abs() + 1))
    best, wanted, outside = overlap(says.cells, tensors["parts"])
    printed = (wanted > 0) & ((best > 0.5).sum(1) == wanted) & (outside < 0.5)
    return torch.where(computes, same, printed)


def program(sample: dict[str, Any], row: int, says: Any, names: list[str]) -> list[str]:
    """The hard program in words: each step's operation, with the column and the number where it reads them."""
    steps = []
    for step in range(says.operations.shape[1]):
        name = names[int(says.operations[row, step].argmax())]
        words = [name]
        if name not in ("count", "difference", "reset", "first", "last", "previous", "next"):
            words.append(str(sample["columns"][int(says.columns[row, step].argmax())]))
        if ("greater" in name or "lesser" in name) and sample["numbers"]:
            words.append(shown(sample["numbers"][int(says.numbers[row, step].argmax())]))
        steps.append(" ".join(words))
    return steps


def picture(sample: dict[str, Any], row: int, soft: Any, line: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The soft choices of one question: operations and columns against steps."""
    steps = [str(step + 1) for step in range(soft.operations.shape[1])]
    numbers = [shown(number) for number in sample["numbers"]]
    shares = {"operation": (soft.operations, names), "column": (soft.columns, sample["columns"])}
    if numbers:
        shares["number"] = (soft.numbers, numbers)
    panels = [
        {"title": what, "values": weights[row, :, : len(labels)].T.double().numpy(force=True).round(4).tolist(),
         "rows": labels, "columns": steps, "x": "step"}
        for what, (weights, labels) in shares.items()
    ]  # fmt: skip
    said = f"Answer {line['hypothesis']!r:.80}, wanted {line['references'][0]!r:.80}; program {'; '.join(line['program'])}."
    return {
        "kind": "heat_maps",
        "title": sample["text"],
        "text": f"What the network chooses at each step, before the largest is taken. {said}",
        "data": {"panels": panels, "arrange": "columns"},
    }


def shown(number: float) -> str:
    """A number as an answer: whole ones without a point."""
    return str(round(number)) if abs(number - round(number)) < CLOSE else f"{number:.6g}"


def joined(answers: list[str]) -> str:
    """The parts of an answer in one line, as the files of WikiTableQuestions write them: | between them."""
    escaped = [text.replace("\\", "\\\\").replace("\n", "\\n").replace("|", "\\p") for text in answers]
    return "|".join(escaped)
