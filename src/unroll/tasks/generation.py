"""What tasks share in which a model writes a sequence about something: losses, batches, validation, decoding a split.

A source may have several targets (the captions of a picture): the memory has one row a source, tokens and targets have
K rows for each, side by side, as in decoding, so the encoder runs once. Rows without a target pad what has fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from unroll.config import Recipe, Strict, Training, check
from unroll.data.loader import MASKED, Batch, SampleLoader
from unroll.data.plan import SamplePlan
from unroll.data.shards import SampleReader, load_manifest
from unroll.data.tokenizers import Tokenizer
from unroll.data.tokenizers import load as load_tokenizer
from unroll.decoding.conditional import expand_rows
from unroll.errors import UserError
from unroll.layers.dropout import draw_integers, draw_mask, several_for_each_row
from unroll.layers.generator import GeneratorOutput, bos, eos
from unroll.losses.sequence import SequenceObjective, candidate_scores, candidates, plain_losses, sequence_loss
from unroll.tasks.base import Loss, State
from unroll.training.context import WorkerContext

WINDOW_SHARDS = 8

Collate = Callable[[list[dict[str, Any]], list[int]], dict[str, Tensor]]


class GenerationObjective(Strict):
    """What training minimises. `label_smoothing`: see `layers/softmax.py`. `scheduled_sampling` (Bengio et al. 2015,
    arXiv:1506.03099): probability that the model is given its own guess in place of a true token; in the parallel form
    (Duckworth et al. 2019, 1906.04331): the guesses are drawn after a first pass over the true tokens.
    `word_replacement` (Takase & Kiyono 2021, 2104.01853, "Rep(Uni)"): probability that it is given any word in place of a
    true one, so that what it says next comes from the source and not from the word before; candidates are misread alike.
    `sequence`: a loss over whole candidates (`losses/sequence.py`)."""

    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    scheduled_sampling: float = Field(0.0, ge=0.0, lt=1.0)
    word_replacement: float = Field(0.0, ge=0.0, lt=1.0)
    sequence: SequenceObjective | None = None


class GenerationTask:
    """Base of the tasks. A subclass names its kind of objective and says how samples become batches."""

    objective_kind: ClassVar[type[GenerationObjective]] = GenerationObjective
    vocabulary: dict[str, int]

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.manifest = load_manifest(folder)

    # --- training ---------------------------------------------------------------------------------------------------

    @property
    def training(self) -> Training:
        assert isinstance(self.recipe.train, Training)
        return self.recipe.train

    @cached_property
    def objective(self) -> Any:
        return check(self.objective_kind, self.training.objective, f"recipes.{self.recipe.name}.train.objective")

    def collate(self, seed: int | None = None) -> Collate:
        """Samples to tensors; for training with a seed, for anything else, where nothing is drawn, without."""
        raise NotImplementedError

    def plan(self, split: str, seed: int, collate: Collate | None = None) -> tuple[SampleReader, SamplePlan]:
        """Which samples form step n."""
        raise NotImplementedError

    def passes(self, context: WorkerContext) -> int:
        """In how many passes a worker goes through its share of a global batch."""
        raise NotImplementedError

    def total_steps(self, seed: int) -> int:
        """Number of updates of the whole run."""
        if self.training.steps is not None:
            return self.training.steps
        assert self.training.epochs is not None
        _, plan = self.plan("train", seed)
        return sum(len(plan.batches(window)) for window in range(self.training.epochs * plan.windows_per_epoch))

    def loader(self, seed: int, context: WorkerContext, position: dict[str, int] | None) -> SampleLoader:
        """The batches of this worker from `position` on, for ever: one list a step, one batch for each pass."""
        collate = self.collate(seed)
        reader, plan = self.plan("train", seed, collate)
        return SampleLoader(reader, plan, collate, context.rank, context.size, self.passes(context), position)

    def loss(self, model: Any, batch: Batch, carry: State | None) -> Loss:
        """Log-loss of one batch, a sum in nats; nothing is carried."""
        tensors, options = batch.tensors, self.objective
        memory = model.encode(tensors)
        tokens, targets = tensors["tokens"], tensors["targets"]  # [N,T] both
        count = len(tokens) // len(memory["mask"])
        with several_for_each_row(count) if count > 1 else nullcontext():
            if model.training and options.scheduled_sampling:
                tokens = mixed_with_guesses(model, tensors, options.scheduled_sampling, count)
            output = model(
                self.misread(tokens) if model.training else tokens,
                memory,
                expand_rows(model.initial_state(memory), count),
            )
        hidden = output.hidden.flatten(0, 1)  # [N*T,D]
        total = self.log_loss(model, hidden, tokens.flatten(), targets.flatten())
        objective = total
        if model.training:
            if options.sequence:
                share = options.sequence.token_weight
                total = share * total + (1 - share) * self.sequence_loss(model, tensors, memory, options.sequence)
            objective = total + self.extra_losses(model, output, targets)
        return Loss(objective, total.detach(), None)

    def misread(self, tokens: Tensor) -> Tensor:
        """`tokens` [N,T] with some of them replaced, as the objective's `word_replacement` says."""
        probability = self.objective.word_replacement
        return with_any_words(tokens, probability, bos(self.vocabulary["target"])) if probability else tokens

    def log_loss(self, model: Any, hidden: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """The sum of -log p of `targets` [N] given `hidden` [N,D], after `tokens` [N] were read."""
        smoothing = self.objective.label_smoothing if model.training else 0.0
        total: Tensor = model.output.total_log_loss(hidden, targets, smoothing)
        return total

    def token_losses(self, model: Any, hidden: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """`log_loss` of each token of a candidate: [N]."""
        return plain_losses(model, hidden, tokens, targets)

    def extra_losses(self, model: Any, output: GeneratorOutput, targets: Tensor) -> Tensor | float:
        """What is differentiated beside the loss, a sum over target tokens."""
        return 0.0

    def sequence_loss(
        self, model: Any, tensors: dict[str, Tensor], memory: State, options: SequenceObjective
    ) -> Tensor:
        """Loss over candidate targets, each source counted as often as it has target tokens: a sum."""
        model.eval()
        with torch.no_grad():
            fixed = model.encode(tensors)
            found, baseline = candidates(model, fixed, options)  # [B*K,T], [B,T] or none
        model.train()
        if not options.encoder:
            memory = {name: tensor.detach() for name, tensor in memory.items()}
        sources = len(memory["mask"])
        costs = self.costs(found, tensors["targets"], sources)  # [B,K]
        baseline = None if baseline is None else self.costs(baseline, tensors["targets"], sources)  # [B,1]
        scores = candidate_scores(model, memory, found, self.token_losses, self.misread)  # [B,K]
        losses = sequence_loss(scores, costs, options, baseline)  # [B]
        return (losses * (tensors["targets"] >= 0).view(len(losses), -1).sum(1)).sum()

    def costs(self, candidates: Tensor, targets: Tensor, sources: int) -> Tensor:
        """What candidates [B*K,T] of B sources are worth, given all their targets [B*K',T']: [B,K], lower is better."""
        raise NotImplementedError

    def mean_log_loss(self, model: Any, context: WorkerContext) -> float:
        """Nats per target token on the validation split."""
        reader, plan = self.plan("validation", 0)
        collate, parts = self.collate(), self.training.parts
        sums = [[0.0, 0.0] for _ in range(context.passes(parts))]
        steps = sum(len(plan.batches(window)) for window in range(plan.windows_per_epoch))
        with SampleLoader(reader, plan, collate, context.rank, context.size, len(sums)) as loader:
            for _, batches in zip(range(steps), loader, strict=False):
                for total, batch in zip(sums, batches, strict=True):
                    if batch.weight:
                        total[0] += float(self.loss(model, batch.to(context.device), None).total)
                        total[1] += batch.weight
        nats, weight = context.sum_of_slices(sums, parts)
        return nats / weight

    # --- predictions ------------------------------------------------------------------------------------------------

    @cached_property
    def target_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / self.manifest["tokenizer"])

    def text(self, tokens: list[int]) -> str:
        """The sentence of target tokens; EOS and what pads it are left out."""
        kept = [token for token in tokens if token not in (MASKED, eos(self.vocabulary["target"]))]
        return self.target_tokenizer.decode(kept).strip()


def mixed_with_guesses(model: Any, tensors: dict[str, Tensor], probability: float, count: int = 1) -> Tensor:
    """The tokens [N,T] that the model is given, some of them drawn from what it predicts after the true ones."""
    tokens = tensors["tokens"]
    with torch.no_grad():
        memory = model.encode(tensors)
        hidden = model(tokens, memory, expand_rows(model.initial_state(memory), count)).hidden
        scores = model.output.log_probabilities(hidden)[..., : bos(model.vocabulary)]  # [N,T,V-2]
        noise = -torch.empty_like(scores).exponential_().log()  # Gumbel: the largest sum is a draw
        guesses = (scores + noise).argmax(-1)  # [N,T]
    given = torch.cat([tokens[:, :1], guesses[:, :-1]], 1)
    true = draw_mask(tokens.shape, probability, True, tokens.device, torch.float32) > 0
    true[:, 0] = True
    return torch.where(true, tokens, given)


def with_any_words(tokens: Tensor, probability: float, words: int) -> Tensor:
    """`tokens` [N,T], some of them, but never BOS in front, replaced by any of the `words` first ones."""
    true = draw_mask(tokens.shape, probability, True, tokens.device, torch.float32) > 0
    true[:, 0] = True
    return torch.where(true, tokens, draw_integers(tokens.shape, words, tokens.device))


def target_tensors(targets: Sequence[np.ndarray | None], vocabulary: int) -> dict[str, Tensor]:
    """`tokens` int64 [N,T], opened by BOS, and `targets` [N,T], closed by EOS and padded with -1; none: a row of -1."""
    longest = max((len(ids) for ids in targets if ids is not None), default=0) + 1
    tokens = torch.full((len(targets), longest), bos(vocabulary))
    wanted = torch.full((len(targets), longest), MASKED)
    for row, ids in enumerate(targets):
        if ids is None:
            continue
        tokens[row, 1 : len(ids) + 1] = torch.from_numpy(ids)
        wanted[row, : len(ids)] = torch.from_numpy(ids)
        wanted[row, len(ids)] = eos(vocabulary)
    return {"tokens": tokens, "targets": wanted}


def attends(memory: State) -> bool:
    """Whether the model, or one of an ensemble, has attention over this memory."""
    return any(name == "keys" or name.endswith(".keys") for name in memory)


def batch_size(training: Training, name: str, unit: str) -> int:
    """`train.batch` or `train.batch_tokens`, whichever the task batches by.

    Raises:
        UserError: the recipe states the other one.
    """
    size: int | None = getattr(training, unit)
    if size is None:
        raise UserError(f"recipes.{name}.train.{unit}: missing; this task batches by it")
    return size
