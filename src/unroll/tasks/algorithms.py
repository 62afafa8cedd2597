"""Algorithmic tasks: vectors in, bits, classes or numbers out, generated on the way (`data/algorithms.py`).

Training: step n is a batch of `train.batch` sequences of one size, drawn from (seed, n). Loss, a sum over what is to be
predicted: -log p of bits and classes in nats, squared errors of numbers. It is divided by the number of predictions, or
with `objective: {per: sequence}` by that of sequences. No state is carried: every sequence begins with the initial one.

Predictions: one line a sequence in `sequences.jsonl`, and where the targets are no numbers `translations.jsonl`, in which
a time step is a word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unroll.config import Recipe, Strict, Training, check
from unroll.data.algorithms import Drawn, GeneratedPlan, Operation, Size, fixed_batches, fixed_hash, operation_of
from unroll.data.loader import Batch, GeneratedLoader
from unroll.data.shards import load_manifest
from unroll.errors import UserError
from unroll.progress import progress
from unroll.tasks.base import Loss, State
from unroll.training.context import WorkerContext, row_slices

UNITS = {"bits": "bits_per_sequence", "classes": "bits_per_sequence", "numbers": "mean_squared_error"}


class Objective(Strict):
    """`per`: what the loss sum is divided by. `ponder_cost`: of a step of computation of one sequence, beside the mean loss.
    `drawn`: laid over the options of the operation where training batches are drawn, so that a second phase may practise
    what is still hard."""

    per: Literal["prediction", "sequence"] = "prediction"
    ponder_cost: float = Field(0.0, ge=0.0)
    drawn: dict[str, Any] = Field({})


class Prediction(Strict):
    """Which fixed set is scored, and another one of longer sequences; `rows` at a time, as many as fit in memory.
    `pictures`: how many sequences are drawn of a system that has weightings over a memory."""

    split: str = "test"
    longer: str | None = None
    rows: int = Field(200, ge=1)
    pictures: int = Field(2, ge=0)


class Task:
    """A generated task."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.manifest = load_manifest(folder)
        path = folder / "manifest.json"
        if self.manifest.get("kind") != "generated":
            raise UserError(f"{path}: kind: found {self.manifest.get('kind')!r}, expected 'generated'")
        self.options = self.manifest["options"]
        self.form = self.operation({}).form
        self.vocabulary: dict[str, int] = self.manifest["vocabulary"]
        self.description: dict[str, Any] = {"operation": self.options["operation"]}

    def operation(self, changes: dict[str, Any], place: str = "") -> Operation:
        """What is generated, with changes, stated at `place`, laid over the options of the data set."""
        place = place or f"{self.folder / 'manifest.json'}: options"
        return operation_of(self.options["operation"], {**self.options["options"], **changes}, place)

    # --- training ---------------------------------------------------------------------------------------------------

    @property
    def training(self) -> Training:
        assert isinstance(self.recipe.train, Training)
        return self.recipe.train

    @cached_property
    def objective(self) -> Objective:
        options: Objective = check(Objective, self.training.objective, f"recipes.{self.recipe.name}.train.objective")
        return options

    @property
    def validation_score(self) -> str:
        """What `validate` gives: lower is better."""
        return UNITS[self.form.kind]

    def total_steps(self, seed: int) -> int:
        """Number of updates of the whole run."""
        if self.training.steps is None:
            raise UserError(f"recipes.{self.recipe.name}.train.steps: missing; what is generated has no epochs")
        return self.training.steps

    def loader(self, seed: int, context: WorkerContext, position: dict[str, int] | None) -> GeneratedLoader:
        """The batches of this worker from `position` on, for ever: one list a step, one batch for each pass."""
        if self.training.batch is None:
            raise UserError(f"recipes.{self.recipe.name}.train.batch: missing; sequences are generated in rows")
        place = f"recipes.{self.recipe.name}.train.objective.drawn"
        operation = self.operation(self.objective.drawn, place)
        if operation.form != self.form:
            raise UserError(f"{place}: {operation.form} differs from the form of the data set, {self.form}")
        plan = GeneratedPlan(operation, self.training.batch, seed)
        slices = row_slices(self.training, context)
        return GeneratedLoader(lambda step: tensors_of(plan.batch(step)), self.weight, slices, position)

    def example(self) -> Tensor:
        """Inputs of one sequence [1,T,D], of the size in the middle: what a model is measured on."""
        operation = self.operation({})
        sizes = operation.sizes()
        return tensors_of(operation.draw(np.random.default_rng(0), 1, sizes[len(sizes) // 2]))["inputs"]

    def weight(self, tensors: dict[str, Tensor]) -> float:
        """How much rows count: their predictions, or one each."""
        rows = len(tensors["inputs"])
        if self.objective.per == "sequence":
            return float(rows)
        return float(rows * int(tensors["mask"][:1].sum()) * self.form.groups)

    def loss(self, model: Any, batch: Batch, carry: State | None) -> Loss:
        """Loss of one batch, a sum; nothing is carried."""
        output = self.run(model, batch.tensors["inputs"])
        total = self.losses(output.values, batch.tensors).sum()
        cost, ponder = self.objective.ponder_cost, output.penalties.get("ponder")
        per_row = batch.weight / len(batch.tensors["inputs"])
        return Loss(total if ponder is None else total + cost * per_row * ponder, total.detach(), None)

    def run(self, model: Any, inputs: Tensor) -> Any:
        """What a model makes of whole sequences [B,T,D]."""
        state = {name: value.to(inputs.device) for name, value in model.initial_state(len(inputs)).items()}
        return model(inputs, state)

    def losses(self, values: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """values [B,T,O] -> the loss of each row [B], in nats or squared."""
        scored = tensors["mask"][0]  # [T], the same in every row
        values, targets = values[:, scored].float(), tensors["targets"][:, scored]  # [B,T',O] [B,T',G]
        if self.form.kind == "bits":
            each = F.binary_cross_entropy_with_logits(values, targets, reduction="none")
        elif self.form.kind == "numbers":
            each = (values - targets).square()
        else:
            logits = values.unflatten(-1, (self.form.groups, self.form.classes)).movedim(-1, 1)  # [B,K,T',G]
            each = F.cross_entropy(logits, targets, reduction="none")
        return each.flatten(1).sum(1)

    @torch.no_grad()
    def validate(self, model: Any, context: WorkerContext) -> float:
        """Bits a sequence, or the mean squared error, on the validation set, shared among the workers."""
        sums = [[0.0, 0.0] for _ in range(context.passes(self.training.parts))]
        for _, tensors in self.fixed("validation"):
            rows = len(tensors["inputs"])
            for total, part in zip(sums, context.slices(rows, self.training.parts), strict=True):
                if part.stop > part.start:
                    own = {name: tensor[part].to(context.device) for name, tensor in tensors.items()}
                    total[0] += float(self.losses(self.run(model, own["inputs"]).values, own).sum())
                    total[1] += part.stop - part.start if self.form.kind != "numbers" else self.predictions(own)
        loss, weight = context.sum_of_slices(sums, self.training.parts)
        return loss / weight / (1 if self.form.kind == "numbers" else math.log(2))

    def predictions(self, tensors: dict[str, Tensor]) -> int:
        """How many targets are to be predicted."""
        return int(tensors["mask"].sum()) * self.form.groups

    def fixed(self, split: str) -> Iterator[tuple[Size, dict[str, Tensor]]]:
        """A fixed set, batch by batch of one size each.

        Raises:
            UserError: no such split.
        """
        operation, entry = self._split(split)
        for size, drawn in fixed_batches(operation, entry["samples"], self.options["seed"], split):
            yield size, tensors_of(drawn)

    def _split(self, split: str) -> tuple[Operation, dict[str, Any]]:
        allowed = [name for name in self.manifest["splits"] if name != "train"]
        if split not in allowed:
            raise UserError(
                f"{self.folder / 'manifest.json'}: no fixed split {split!r} (allowed: {', '.join(allowed)})"
            )
        entry = self.manifest["splits"][split]
        return self.operation(entry["options"]), entry

    # --- predictions ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, model: Any, out: Path, seed: int, device: torch.device) -> None:
        """Write `sequences.jsonl`, `pictures.jsonl` and, for bits and classes, `translations.jsonl` into `out`.

        Raises:
            UserError: a fixed set is not what it was when the data set was prepared.
        """
        options: Prediction = check(Prediction, self.recipe.predict, f"recipes.{self.recipe.name}.predict")
        model.eval()
        lines: list[dict[str, Any]] = []
        sentences: list[dict[str, Any]] = []
        for split in [options.split] + ([options.longer] if options.longer else []):
            operation, entry = self._split(split)
            if fixed_hash(operation, entry["samples"], self.options["seed"], split) != entry["sha256"]:
                raise UserError(f"{self.folder / 'manifest.json'}: splits.{split}: its seed now gives other samples than "
                                "when the data set was prepared (other code or NumPy); prepare it again")  # fmt: skip
            with progress(f"predict {split}", entry["samples"]) as bar:
                for size, tensors in self.fixed(split):
                    for start in range(0, len(tensors["inputs"]), options.rows):
                        part = {name: value[start : start + options.rows].to(device) for name, value in tensors.items()}
                        found, said = self.scored(model, part, size[0], split, len(lines))
                        lines += found
                        if split == options.split and self.form.kind != "numbers":
                            sentences += said
                        bar.advance(len(found))
        write_lines(out / "sequences.jsonl", lines)
        if sentences:
            write_lines(out / "translations.jsonl", sentences)
        pictures = [*self.weightings(model, options, device), *curves(lines, options.split, self.form.kind)]
        if pictures:
            write_lines(out / "pictures.jsonl", pictures)

    def scored(
        self, model: Any, tensors: dict[str, Tensor], length: int, split: str, first: int
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Lines for the sequences and for the sentences of one batch; the first is number `first`."""
        inputs, mask = tensors["inputs"], tensors["mask"][0]
        state = {name: value.to(inputs.device) for name, value in model.initial_state(len(inputs)).items()}
        output = model(inputs, state)
        losses = self.losses(output.values, tensors).double().tolist()
        said = self.decide(output.values)[:, mask].cpu().numpy()  # [B,T',G]
        wanted = tensors["targets"][:, mask].cpu().numpy()
        errors = np.abs(said - wanted) if self.form.kind == "numbers" else said != wanted
        ponder = [output.state[name] - state[name] for name in state if name.endswith(".ponder")]
        steps = torch.stack(ponder).sum(0).tolist() if ponder else [None] * len(inputs)
        difficulty = tensors["difficulty"].mean(1).tolist()
        lines, sentences = [], []
        for row, loss in enumerate(losses):
            line = {
                "id": first + row,
                "split": split,
                "length": length,
                "steps": inputs.shape[1],
                "predictions": int(errors[row].size),
                "loss": loss,
                "errors": float(errors[row].sum()),
                "difficulty": difficulty[row],
            }
            lines.append(line if steps[row] is None else {**line, "ponder": steps[row]})
            if self.form.kind != "numbers":
                words = [[word(step, self.form.kind) for step in side[row].astype(int)] for side in (wanted, said)]
                source = " ".join(word(step, "bits") for step in (inputs[row] != 0).int().tolist())
                sentences.append({"id": first + row, "source": source, "references": [" ".join(words[0])],
                                  "hypothesis": " ".join(words[1])})  # fmt: skip
        return lines, sentences

    def weightings(self, model: Any, options: Prediction, device: torch.device) -> Iterator[dict[str, Any]]:
        """What the first sequences of the largest size looked like to a system with weightings over a memory."""
        *_, (size, tensors) = self.fixed(options.split)
        for row in range(min(options.pictures, len(tensors["inputs"]))):
            one = {name: value[row : row + 1].to(device) for name, value in tensors.items()}
            state = {name: value.to(device) for name, value in model.initial_state(1).items()}
            names = [name for name, value in state.items() if name.endswith("weights") and value.dim() == 3]
            if not names or self.form.kind == "numbers":
                return
            said, looked = [], []
            for step in one["inputs"].split(1, dim=1):  # [1,1,D] each
                output = model(step, state)
                state = output.state
                said.append(output.values)
                looked.append(torch.cat([state[name][0] for name in names]))  # [A,N]
            values = torch.cat(said, 1).sigmoid() if self.form.kind == "bits" else self.decide(torch.cat(said, 1))
            yield heat_maps(one, values, torch.stack(looked), size)

    def decide(self, values: Tensor) -> Tensor:
        """The most likely bits or classes, or the numbers: [B,T,O] -> [B,T,G]."""
        if self.form.kind == "bits":
            return (values > 0).float()
        if self.form.kind == "numbers":
            return values
        return values.unflatten(-1, (self.form.groups, self.form.classes)).argmax(-1)


def tensors_of(drawn: Drawn) -> dict[str, Tensor]:
    """inputs [B,T,D], targets [B,T,G], mask [B,T], difficulty [B,T]."""
    mask = np.broadcast_to(drawn.mask, drawn.inputs.shape[:2]).copy()
    arrays = {"inputs": drawn.inputs, "targets": drawn.targets, "mask": mask, "difficulty": drawn.difficulty}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def word(step: Any, kind: str) -> str:
    """One time step as a word: bits as a hexadecimal number, classes with a dot between groups."""
    if kind == "bits":
        return f"{int(''.join(str(int(bit)) for bit in step), 2):x}"
    return ".".join(str(int(value)) for value in step)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def heat_maps(tensors: dict[str, Tensor], values: Tensor, looked: Tensor, size: Size) -> dict[str, Any]:
    """A picture of one sequence: inputs, targets, outputs [1,T,...] and where each head looked [T,A,N], over time.

    The slots stand in a ring, cut open in the middle of the longest row of slots that no head gave a hundredth.
    """
    slots = looked.shape[-1]
    shown = ring((looked > 0.01).flatten(0, 1).any(0).nonzero().flatten().tolist(), slots)
    mask = tensors["mask"][0, :, None]
    panels = [
        ("inputs", tensors["inputs"][0], "channel"),
        ("targets", torch.where(mask, tensors["targets"][0].float(), 0.0), "target"),
        ("outputs", torch.where(mask, values[0].float(), 0.0), "target"),
        *((f"head {head}", looked[:, head, shown], "slot") for head in range(looked.shape[1])),
    ]
    drawn: list[dict[str, Any]] = [
        {"values": np.round(value.t().cpu().numpy().astype(float), 3).tolist(), "title": title, "x": "time", "y": side}
        for title, value, side in panels
    ]
    for panel in drawn[3:]:
        panel["rows"] = [str(slot) for slot in shown]
    text = "What was read and said at each time step, and how much each head looked at each slot (read heads first)."
    return {"kind": "heat_maps", "title": f"Size {' x '.join(map(str, size))}", "text": text,
            "data": {"panels": drawn, "arrange": "rows"}}  # fmt: skip


def ring(used: list[int], slots: int) -> list[int]:
    """The slots from the first used one after the longest gap to the last one before it: [5, 0, 1] of 0, 1, 5 and 6 slots."""
    if not used:
        return list(range(slots))
    gaps = [(used[(n + 1) % len(used)] - slot - 1) % slots for n, slot in enumerate(used)]
    first = used[(gaps.index(max(gaps)) + 1) % len(used)]
    return [(first + n) % slots for n in range(slots - max(gaps))]


def curves(lines: list[dict[str, Any]], split: str, kind: str) -> Iterator[dict[str, Any]]:
    """Pictures of the loss against the length and of ponder steps against difficulty, where there is more than one."""
    own = [line for line in lines if line["split"] == split]
    scale, unit = (1.0, "squared error") if kind == "numbers" else (1 / math.log(2), "bits a sequence")
    lengths = sorted({line["length"] for line in lines})
    if len(lengths) > 1:
        means = [scale * mean(line["loss"] for line in lines if line["length"] == length) for length in lengths]
        longest = max(line["length"] for line in own)
        yield {"kind": "curves", "title": "Error against length", "text": "Mean over the sequences of each length.",
               "data": {"x": "length", "y": unit, "logarithmic": True, "curves": [{"x": lengths, "y": means}],
                        "mark": {"at": longest, "label": "longest in training"}}}  # fmt: skip
    if "ponder" in own[0]:
        levels = sorted({line["difficulty"] for line in own})
        groups = [[line["ponder"] for line in own if line["difficulty"] == level] for level in levels]
        spread = [float(np.std(group)) for group in groups]
        yield {"kind": "curves", "title": "Ponder steps against difficulty", "text": "Mean and deviation of each difficulty.",
               "data": {"x": "difficulty", "y": "ponder steps", "curves": [
                   {"x": levels, "y": [mean(group) for group in groups], "spread": spread}]}}  # fmt: skip


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
