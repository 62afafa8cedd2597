"""The task of separate samples: plan, batches and validation. A file beside it adds what is predicted, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unroll.config import Recipe, Training
from unroll.data.curriculum import Curriculum, CurriculumPlan
from unroll.data.loader import Batch, SampleLoader
from unroll.data.plan import SamplePlan
from unroll.data.shards import SampleReader, load_manifest
from unroll.errors import UserError
from unroll.tasks.base import Loss, State
from unroll.training.context import WorkerContext

WINDOW_SHARDS = 8


class SampleTask:
    """What tasks on separate samples share. Such a task adds `collate`, `loss` and `predict`, and says in `vocabulary`
    what its model is built with; `validate` gives the mean of `penalty`, the loss unless a task says otherwise."""

    validation_score = "loss"

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.manifest = load_manifest(folder)
        self.description: dict[str, Any] = {}

    @property
    def training(self) -> Training:
        assert isinstance(self.recipe.train, Training)
        return self.recipe.train

    @property
    def curriculum(self) -> Curriculum | None:
        """What the training begins with; all samples at once if there is none."""
        return None

    def collate(self, samples: list[dict[str, Any]], keys: list[int]) -> dict[str, Tensor]:
        """The tensors of a batch; of no samples, when a worker has none."""
        raise NotImplementedError

    def loss(self, model: Any, batch: Batch, carry: State | None) -> Loss:
        """The loss of one batch, a sum."""
        raise NotImplementedError

    def penalty(self, model: Any, batch: Batch) -> float:
        """What the validation adds up: lower is better."""
        return float(self.loss(model, batch, None).total)

    def plan(self, split: str, seed: int) -> tuple[SampleReader, SamplePlan]:
        """Which samples form step n; of the training split, those that the curriculum lets in."""
        tokens = self.training.batch_tokens
        if tokens is None:
            raise UserError(f"recipes.{self.recipe.name}.train.batch_tokens: missing; samples are batched by length")
        reader = SampleReader(self.folder, split)
        what = (reader.shard_counts, reader.lengths, tokens, WINDOW_SHARDS, seed)
        if split == "train" and self.curriculum is not None:
            return reader, CurriculumPlan(self.curriculum, *what)
        return reader, SamplePlan(*what)

    def total_steps(self, seed: int) -> int:
        """Number of updates of the whole run."""
        if self.training.steps is not None:
            return self.training.steps
        assert self.training.epochs is not None
        _, plan = self.plan("train", seed)
        return sum(len(plan.batches(window)) for window in range(self.training.epochs * plan.windows_per_epoch))

    def loader(self, seed: int, context: WorkerContext, position: dict[str, int] | None) -> SampleLoader:
        """The batches of this worker from `position` on, for ever: one list a step, one batch for each pass."""
        reader, plan = self.plan("train", seed)
        passes = context.passes(self.training.parts)
        return SampleLoader(reader, plan, self.collate, context.rank, context.size, passes, position)

    @torch.no_grad()
    def validate(self, model: Any, context: WorkerContext) -> float:
        """The mean penalty on the validation split."""
        reader, plan = self.plan("validation", 0)
        parts = self.training.parts
        sums = [[0.0, 0.0] for _ in range(context.passes(parts))]
        steps = sum(len(plan.batches(window)) for window in range(plan.windows_per_epoch))
        with SampleLoader(reader, plan, self.collate, context.rank, context.size, len(sums)) as loader:
            for _, batches in zip(range(steps), loader, strict=False):
                for total, batch in zip(sums, batches, strict=True):
                    if batch.weight:
                        total[0] += self.penalty(model, batch.to(context.device))
                        total[1] += batch.weight
        penalty, weight = context.sum_of_slices(sums, parts)
        return penalty / weight
