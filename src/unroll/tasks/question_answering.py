"""Question answering: the facts of a story and a question in, its answer out (`data/stories.py`).

The answer is a choice among the answers of the training stories and, where names are anonymised, the entities of the
story at hand. `objective.answers: one` takes the likeliest (cross-entropy); `several` takes every candidate that is
likelier than not, at least the likeliest one (a sigmoid for each, binary cross-entropy).

Training: batches of questions about stories of like length, `train.batch_tokens` being questions x (facts of the
longest story + `objective.question_cost`), which stands for what a question costs beside its facts. Or `train.batch`
questions, in equal parts of all tasks unless `objective.share` says otherwise: what each task's own batch would be. With anonymised
names each question is given other numbers for its names in each epoch, so that a number means nothing by itself.
`objective.time_noise` puts empty facts in at random (Sukhbaatar et al. 2015, 4.2), `objective.linear` takes the softmax
out of the attention of a model that can do without; with `train.then` it makes the linear start of that paper.

`objective.support` adds the loss of strong supervision (Weston et al. 2014, arXiv:1410.3916): the last hops should read
the supporting facts, in their order, -log of the attention to them; the hops before are free. Predictions never look at supporting facts.

A split is read once into flat arrays; no batch is made sample by sample.

Predictions: `answers.jsonl`, one line a question: `{"id", "task", "question", "answers", "predicted", "nats"}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unroll.config import Recipe, Strict, Training, check
from unroll.data.loader import MASKED, Batch, SampleLoader
from unroll.data.mixed import StratifiedPlan
from unroll.data.plan import SamplePlan, sample_key
from unroll.data.shards import SampleReader, load_manifest
from unroll.data.stories import ENTITIES, PADDING, StoryTokenizer
from unroll.errors import UserError
from unroll.progress import progress
from unroll.tasks.base import Loss, State
from unroll.training.context import WorkerContext

WINDOW_SHARDS = 8
FAILED = 5.0
"""A task with an error above this, in %, has failed (Weston et al. 2015)."""


class Objective(Strict):
    """What training minimises and on what; see the head of this file. `support`: weight of the loss on supporting facts
    (strong supervision); 0 does not look at them. `share`: how much of a task's questions an epoch takes, all of them
    once unless told; other ones in each epoch if it is less than 1. `validation`: the mean log-loss of a question, or
    the error in %, averaged over tasks. `names`: whether names are given other numbers each time."""

    answers: Literal["one", "several"] = "one"
    question_cost: int = Field(16, ge=1)
    support: float = Field(0.0, ge=0.0)
    share: dict[int, Annotated[float, Field(gt=0.0)]] = Field({})
    time_noise: float = Field(0.0, ge=0.0, lt=1.0)
    linear: bool = False
    names: Literal["shuffled", "fixed"] = "shuffled"
    validation: Literal["loss", "error"] = "loss"


class Prediction(Strict):
    """How a split is answered: `batch` questions of like length at a time; the attention of the first `pictures`
    questions of different tasks is drawn."""

    split: str = "test"
    batch: int = Field(200, ge=1)
    pictures: int = Field(6, ge=0)


class Task:
    """Question answering on prepared stories."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.manifest = load_manifest(folder)
        if "answers" not in self.manifest:
            raise UserError(f"{folder / 'manifest.json'}: no stories; question answering needs a preparer of stories")
        tasks = [int(task) for entry in self.manifest["splits"].values() for task in entry["questions"]]
        self.vocabulary = {
            "words": self.manifest["vocabulary"],
            "answers": self.manifest["answers"],
            "entities": self.manifest["entities"],
            "tasks": max(tasks) + 1,
        }
        kind = "several" if self.training.objective.get("answers") == "several" else "one"
        self.description = {"stories": {"answers": kind, "tasks": self.manifest.get("tasks", {})}}

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
        return self.objective.validation

    def training_plan(self, seed: int) -> tuple[StoryTable, SamplePlan, Shares | None]:
        """Which questions of the training split form step n; with `share` or `train.batch` over rows that are other ones
        in each epoch."""
        reader, cost, tokens = (
            SampleReader(self.folder, "train"),
            self.objective.question_cost,
            self.training.batch_tokens,
        )
        table = StoryTable.of(reader)
        if tokens is not None and not self.objective.share:
            counts = reader.shard_counts
            plan = SamplePlan(counts, lambda shard, _: reader.lengths(shard) + cost, tokens, WINDOW_SHARDS, seed)
            return table, plan, None
        shares = Shares(table.tasks, self.objective.share, seed)
        counts = [len(shares.rows(0))]

        def lengths(_: int, epoch: int) -> np.ndarray:
            return table.fact_counts[shares.rows(epoch)][:, None] + cost

        def tasks(_: int, epoch: int) -> np.ndarray:
            return table.tasks[shares.rows(epoch)]

        if tokens is not None:
            return table, SamplePlan(counts, lengths, tokens, WINDOW_SHARDS, seed), shares
        assert self.training.batch is not None
        return table, StratifiedPlan(self.training.batch, tasks, counts, lengths, WINDOW_SHARDS, seed), shares

    def total_steps(self, seed: int) -> int:
        """Number of updates of the whole run."""
        if self.training.steps is not None:
            return self.training.steps
        assert self.training.epochs is not None
        _, plan, _ = self.training_plan(seed)
        return sum(len(plan.batches(window)) for window in range(self.training.epochs * plan.windows_per_epoch))

    def loader(self, seed: int, context: WorkerContext, position: dict[str, int] | None) -> SampleLoader:
        """The batches of this worker from `position` on, for ever: one list a step, one batch for each pass."""
        table, plan, shares = self.training_plan(seed)
        options = self.objective
        shuffled = options.names == "shuffled"
        collate = Collate(table, self.vocabulary["entities"], shuffled, options.time_noise, seed, shares)
        train = self.training
        passes = context.passes(train.parts, train.batch or 0, train.rows_per_pass if train.batch else None)
        return SampleLoader(table, plan, collate, context.rank, context.size, passes, position)  # type: ignore[arg-type]

    def loss(self, model: Any, batch: Batch, carry: State | None) -> Loss:
        """Log-loss of the answers of one batch, a sum in nats; nothing is carried."""
        inputs = batch.tensors
        options = {"linear": True} if self.objective.linear else {}
        output = model(inputs, **options)
        total = answer_loss(output.scores.float(), inputs["answers"], self.objective.answers).sum()
        objective = total
        if model.training and self.objective.support:
            objective = total + self.objective.support * support_loss(output.attention, inputs["support"])
        return Loss(objective, total.detach(), None)

    @torch.no_grad()
    def validate(self, model: Any, context: WorkerContext) -> float:
        """Mean log-loss of a question, or the error in %, averaged over tasks, of the validation split."""
        options = {"linear": True} if self.objective.linear else {}
        tasks = self.vocabulary["tasks"]
        sums = torch.zeros(2, tasks)  # what is averaged, and how many
        for number, (inputs, _) in enumerate(self.batches("validation", 200, context.device)):
            if number % context.size != context.rank:
                continue
            scores = model(inputs, **options).scores.float()
            kind = self.objective.answers
            value = (
                answer_loss(scores, inputs["answers"], kind)
                if self.objective.validation == "loss"
                else 100.0 * ~right(chosen(scores, kind), inputs["answers"])
            )  # [B]
            sums[0].index_add_(0, inputs["task"].cpu(), value.float().cpu())
            sums[1].index_add_(0, inputs["task"].cpu(), torch.ones(len(value)))
        total, count = torch.tensor(context.sum(sums.flatten().tolist())).view(2, tasks)
        if self.objective.validation == "loss":
            return float(total.sum() / count.sum())
        return float((total[count > 0] / count[count > 0]).mean())

    # --- predictions ------------------------------------------------------------------------------------------------

    def batches(self, split: str, size: int, device: torch.device) -> Iterator[tuple[dict[str, Tensor], list[int]]]:
        """The questions of a split, `size` of like length at a time, and their numbers."""
        table = self._table(split)
        collate = Collate(table, self.vocabulary["entities"])
        order = np.argsort(table.fact_counts, kind="stable").tolist()
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield {name: tensor.to(device) for name, tensor in collate(rows, []).items()}, rows

    def _table(self, split: str) -> StoryTable:
        """A split, kept: validation reads the same one many times."""
        if split not in self._tables:
            self._tables[split] = StoryTable.of(SampleReader(self.folder, split))
        return self._tables[split]

    @cached_property
    def _tables(self) -> dict[str, StoryTable]:
        return {}

    @torch.no_grad()
    def predict(self, model: Any, out: Path, seed: int, device: torch.device) -> None:
        """Write `answers.jsonl`, one line a question in the split's order, and `pictures.jsonl` into `out`."""
        options: Prediction = check(Prediction, self.recipe.predict, f"recipes.{self.recipe.name}.predict")
        tokenizer = StoryTokenizer.load(self.folder / self.manifest["tokenizer"])
        table, kind = self._table(options.split), self.objective.answers
        lines: dict[int, dict[str, Any]] = {}
        pictured = self._pictured(table, options.pictures)
        pictures: dict[int, dict[str, Any]] = {}
        with progress(f"answer {options.split}", len(table)) as bar:
            for inputs, rows in self.batches(options.split, options.batch, device):
                output = model(inputs)
                scores = output.scores.float()
                losses = answer_loss(scores, inputs["answers"], kind).tolist()
                found = by_own_numbers(chosen(scores, kind), inputs)
                for place, (row, nats) in enumerate(zip(rows, losses, strict=True)):
                    answers = torch.nonzero(found[place]).flatten().tolist()
                    lines[row] = self.line(table, row, tokenizer, answers, nats)
                    if row in pictured:
                        weights = output.attention[place].float().cpu().numpy()  # [hops,F]
                        pictures[row] = self.picture(table, row, tokenizer, lines[row], weights)
                bar.advance(len(rows))
        ordered = [lines[row] for row in sorted(lines)]
        (out / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ordered))
        drawn = [self.error_picture(ordered), *(pictures[row] for row in pictured)]
        (out / "pictures.jsonl").write_text("".join(json.dumps(picture) + "\n" for picture in drawn))

    def line(
        self, table: StoryTable, row: int, tokenizer: StoryTokenizer, predicted: list[int], nats: float
    ) -> dict[str, Any]:
        """What the predictions file says of one question."""
        names, answers = table.names[row], table.answers_of(row).tolist()
        return {
            "id": row,
            "task": int(table.tasks[row]),
            "question": tokenizer.text(table.question_of(row), names),
            "answers": [tokenizer.answer_text(answer, names) for answer in answers],
            "predicted": [tokenizer.answer_text(answer, names) for answer in predicted],
            "nats": nats,
        }

    def _pictured(self, table: StoryTable, count: int) -> list[int]:
        """The first question of each task about a story long enough to be a story, `count` of them at most."""
        found: dict[int, int] = {}
        for row in np.flatnonzero((table.fact_counts >= 2) & (table.fact_counts <= 30)).tolist():
            found.setdefault(int(table.tasks[row]), row)
        return list(found.values())[:count]

    def picture(
        self, table: StoryTable, row: int, tokenizer: StoryTokenizer, line: dict[str, Any], weights: np.ndarray
    ) -> dict[str, Any]:
        """A picture of the attention of each hop over the facts."""
        facts = [tokenizer.text(fact, table.names[row]) for fact in table.facts_of(row)]
        title = f"{line['question']}? {', '.join(line['predicted'])}"
        return attention_picture(facts, weights, title, f"task {line['task']}; answer: {', '.join(line['answers'])}")

    def error_picture(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """A picture of the error of each task."""
        wrong: dict[int, list[bool]] = {}
        for line in lines:
            wrong.setdefault(line["task"], []).append(set(line["answers"]) != set(line["predicted"]))
        errors = {str(task): round(100 * float(np.mean(wrong[task])), 2) for task in sorted(wrong)}
        said = ", ".join(f"{task}: {error:.1f}" for task, error in errors.items())
        data = {"errors": errors, "names": self.manifest.get("tasks", {}), "failed": FAILED}
        return {
            "kind": "task_errors",
            "title": "error of each task, %",
            "text": f"task: error in %: {said}",
            "data": data,
        }


def attention_picture(facts: list[str], weights: np.ndarray, title: str, text: str) -> dict[str, Any]:
    """A picture of the weights [hops,F] of facts: one row a fact, one column a hop."""
    panel = {
        "values": np.round(weights[:, : len(facts)].T, 4).tolist(),
        "title": title,
        "rows": facts,
        "columns": [f"hop {number}" for number in range(1, len(weights) + 1)],
        "x": "",
        "y": "",
    }
    return {"kind": "heat_maps", "title": title, "text": text, "data": {"panels": [panel]}}


# ---------------------------------------------------------------- answers


def answer_loss(scores: Tensor, answers: Tensor, kind: str) -> Tensor:
    """Log-loss of each question [B] in nats: scores [B,A], ids of the answers [B,N], -1 where there are fewer."""
    if kind == "one":
        return F.cross_entropy(scores, answers[:, 0], reduction="none")
    return F.binary_cross_entropy_with_logits(scores, marked(answers, scores), reduction="none").sum(-1)


def support_loss(attention: Tensor, support: Tensor) -> Tensor:
    """-log of the attention [B,hops,F] to the supporting facts [B,N] (-1 where there are fewer), one a hop and the last
    one in the last hop: a sum. Questions with more of them than hops are left out."""
    hops = attention.shape[1]
    count = (support >= 0).sum(-1, keepdim=True)  # [B,1]
    places = torch.arange(support.shape[1], device=support.device)
    there = (places < count) & (count <= hops)  # [B,N]
    hop = (hops - count + places).clamp(0, hops - 1)  # [B,N]
    rows = torch.arange(len(support), device=support.device)[:, None]
    read = attention[rows, hop, support.clamp_min(0)]  # [B,N]
    return -(read.clamp_min(1e-6).log() * there).sum()


def chosen(scores: Tensor, kind: str) -> Tensor:
    """The answers that are given, true in [B,A]: the likeliest, and of several all that are likelier than not."""
    best = F.one_hot(scores.argmax(-1), scores.shape[-1]).bool()
    return best if kind == "one" else best | (scores > 0)


def by_own_numbers(found: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Answers [B,A] with the entities as the story numbers them, before `Collate` gave them other numbers."""
    if "numbers" not in inputs:
        return found
    numbers = inputs["numbers"]  # [B,E]
    entities = found[:, 1 : 1 + numbers.shape[1]].gather(1, numbers)
    return torch.cat([found[:, :1], entities, found[:, 1 + numbers.shape[1] :]], 1)


def marked(answers: Tensor, scores: Tensor) -> Tensor:
    """1 in [B,A] for every answer of [B,N], 0 elsewhere."""
    marks = torch.zeros(scores.shape[0], scores.shape[1] + 1, device=scores.device)
    places = torch.where(answers >= 0, answers, scores.shape[1])
    return marks.scatter_(1, places, 1.0)[:, :-1]


def right(found: Tensor, answers: Tensor) -> Tensor:
    """Whether exactly the answers [B,N] were given in [B,A]: bool [B]. Answer 0, unknown in training, never is."""
    return (found == marked(answers, found.float()).bool()).all(-1) & (answers != 0).all(-1)


# ---------------------------------------------------------------- batches


class StoryTable:
    """All questions of a split as flat arrays. It stands in for a reader: the sample of a place is its row here."""

    def __init__(self, samples: list[dict[str, Any]], split: str = "", shard_counts: Sequence[int] = ()) -> None:
        self.split, self.keep = split, 1
        self._first = np.cumsum([0, *shard_counts])
        self.names: list[list[str]] = [sample["names"] for sample in samples]
        self.tasks = np.array([sample["task"] for sample in samples], np.int64)  # [N]
        self.words, self.word_starts = flattened([sample["facts"] for sample in samples])
        self.lengths, self.fact_starts = flattened([sample["fact_lengths"] for sample in samples])
        self.questions, self.question_starts = flattened([sample["question"] for sample in samples])
        self.answers, self.answer_starts = flattened([sample["answers"] for sample in samples])
        self.support, self.support_starts = flattened([sample["support"] for sample in samples])
        self.fact_counts = np.diff(self.fact_starts)  # [N]
        self.fact_words = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])  # first word of each fact

    @classmethod
    def of(cls, reader: SampleReader) -> Self:
        """The whole split of a reader."""
        counts = reader.shard_counts
        samples = [reader.sample(shard, index) for shard, count in enumerate(counts) for index in range(count)]
        return cls(samples, reader.split, counts)

    def __len__(self) -> int:
        return len(self.tasks)

    def sample(self, shard: int, index: int) -> int:
        """The row of a sample."""
        return int(self._first[shard]) + index

    def question_of(self, row: int) -> np.ndarray:
        return self.questions[self.question_starts[row] : self.question_starts[row + 1]]

    def answers_of(self, row: int) -> np.ndarray:
        return self.answers[self.answer_starts[row] : self.answer_starts[row + 1]]

    def facts_of(self, row: int) -> list[np.ndarray]:
        first, last = self.fact_starts[row : row + 2]
        return [self.words[self.fact_words[i] : self.fact_words[i + 1]] for i in range(first, last)]


def flattened(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays one after the other as int32, and where each one starts [N+1]."""
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
    return (np.concatenate(parts) if parts else np.zeros(0)).astype(np.int32), starts


class Shares:
    """The rows of an epoch that takes more of some tasks than of others, every row of a task as often as the next."""

    def __init__(self, tasks: np.ndarray, share: dict[int, float], seed: int) -> None:
        order = np.random.default_rng([seed, 1]).permutation(len(tasks))
        self._rows = [(order[tasks[order] == task], share.get(int(task), 1.0)) for task in np.unique(tasks)]
        self.rows = lru_cache(maxsize=3)(self._draw)

    def _draw(self, epoch: int) -> np.ndarray:
        parts = []
        for rows, share in self._rows:
            count = max(1, round(share * len(rows)))
            parts.append(rows[(np.arange(count) + epoch * count) % len(rows)])
        return np.concatenate(parts)


class Collate:
    """Rows of a table to tensors: `facts` int64 [B,F,W], `question` [B,Q], `answers` [B,N] and `support` [B,N] (-1 where
    there are fewer), `task` [B], and with entities `numbers` [B,E]: the number that each of them was given. Padding of
    words is 0, a fact of nothing but padding is none. What is random is keyed by sample."""

    def __init__(
        self,
        table: StoryTable,
        entities: int,
        shuffled: bool = False,
        time_noise: float = 0.0,
        seed: int = 0,
        shares: Shares | None = None,
    ) -> None:
        self.table, self.entities, self.shuffled = table, entities, shuffled
        self.time_noise, self.seed, self.shares = time_noise, seed, shares

    def __call__(self, rows: list[int], keys: list[int]) -> dict[str, Tensor]:
        table, at = self.table, np.array(rows, np.int64)
        if self.shares is not None and keys:
            at = self.shares.rows(epoch_of(keys[0]))[at]
        counts = table.fact_counts[at]  # [B]
        fact, row_of_fact, place = spans(table.fact_starts[at], counts)  # all facts of the batch, one after the other
        told = place
        if self.time_noise and len(at):
            place = self._spread(row_of_fact, place, counts, keys)
        lengths = table.lengths[fact].astype(np.int64)
        word, fact_of_word, position = spans(table.fact_words[fact], lengths)
        shape = (len(at), int(place.max(initial=0)) + 1, int(lengths.max(initial=1)))
        facts = np.full(shape, PADDING, np.int64)  # [B,F,W]
        facts[row_of_fact[fact_of_word], place[fact_of_word], position] = table.words[word]
        question = padded(table.questions, table.question_starts, at, PADDING)
        answers = padded(table.answers, table.answer_starts, at, MASKED)
        support = padded(table.support, table.support_starts, at, MASKED)
        places = np.zeros(shape[:2], np.int64)  # [B,F]
        places[row_of_fact, told] = place
        if len(at):
            moved = np.take_along_axis(places, np.maximum(support, 0), 1)
            support = np.where(support < 0, support, moved)
        arrays: dict[str, np.ndarray] = {}
        if self.entities and len(at):
            order = numbering(question, self.entities, keys if self.shuffled else [], self.seed)  # [B,E]
            facts, question = (renamed(ids, order, ENTITIES) for ids in (facts, question))
            answers = renamed(answers, order, 1)
            arrays["numbers"] = order
        arrays |= {"facts": facts, "question": question, "answers": answers, "support": support}
        arrays["task"] = table.tasks[at]
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _spread(self, row: np.ndarray, place: np.ndarray, counts: np.ndarray, keys: list[int]) -> np.ndarray:
        """The places of facts with empty ones put in between, one for every `time_noise` of them on average."""
        size = int(counts.max())
        drawn = hashed(np.array(keys), size, self.seed + 1) / 2.0**64
        noise = (drawn < self.time_noise).cumsum(1)  # [B,F]
        return place + noise[row, place]


def epoch_of(key: int) -> int:
    """The epoch in a number that `sample_key` made."""
    return key // sample_key(1, 0, 0)


def spans(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The numbers starts[i] .. starts[i] + counts[i] - 1 for all i, i for each of them, and its place in its span."""
    owner = np.repeat(np.arange(len(starts)), counts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return starts[owner] + place, owner, place


def padded(values: np.ndarray, starts: np.ndarray, rows: np.ndarray, fill: int) -> np.ndarray:
    """Spans of a flat array as rows of equal length: int64 [B,N]."""
    counts = starts[rows + 1] - starts[rows]
    found, owner, place = spans(starts[rows], counts)
    array = np.full((len(rows), int(counts.max(initial=1))), fill, np.int64)
    array[owner, place] = values[found]
    return array


def hashed(keys: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` uniform uint64 for each key [B]: [B,count] (SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        numbers: Any = keys.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
        numbers = (numbers + np.uint64(seed)) * np.uint64(0xD1B54A32D192ED03) + np.arange(1, count + 1, dtype=np.uint64)
        numbers = numbers * np.uint64(0x9E3779B97F4A7C15)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hashes: np.ndarray = numbers ^ (numbers >> np.uint64(31))
        return hashes


def numbering(question: np.ndarray, count: int, keys: list[int], seed: int) -> np.ndarray:
    """The new number of each of `count` entities: int64 [B,E]. Those of the question [B,Q] come first, the others in a
    random order given by the keys, or as they are without keys."""
    rank = np.broadcast_to(np.arange(count, 2 * count, dtype=np.uint64), (len(question), count)).copy()  # [B,E]
    if keys:
        rank = hashed(np.array(keys), count, seed) | np.uint64(2**32)
    row, place = np.nonzero((question >= ENTITIES) & (question < ENTITIES + count))
    rank[row[::-1], question[row, place][::-1] - ENTITIES] = place[::-1]  # of a name said twice the first place counts
    return rank.argsort(1, kind="stable").argsort(1, kind="stable")


def renamed(ids: np.ndarray, order: np.ndarray, first: int) -> np.ndarray:
    """Ids [B,...] with entity e, whose id is `first` + e, as entity order[row, e]."""
    count = order.shape[1]
    flat = ids.reshape(len(ids), -1)
    entity = np.clip(flat - first, 0, count - 1)
    new = np.take_along_axis(order, entity, 1) + first
    return np.where((flat >= first) & (flat < first + count), new, flat).reshape(ids.shape)
