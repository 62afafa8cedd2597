"""Language modelling: predict each token from those before it.

Training reads lanes: row i of the global batch reads its own part of the corpus from front to back, window after window,
and carries the model's state along (truncated backpropagation through time, Williams & Peng 1990). Scoring reads the
whole split as one stream, so that the number does not depend on any batch size.

Loss: sum over predicted tokens of -log p(token | all before it), in nats.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unroll.config import CountingTraining, Recipe, Strict, Training, check
from unroll.data.loader import Batch, StreamLoader, segments
from unroll.data.plan import StreamPlan
from unroll.data.shards import TokenStream, load_manifest
from unroll.data.tokenizers import load as load_tokenizer
from unroll.decoding.sampling import sample
from unroll.errors import UserError
from unroll.progress import progress
from unroll.tasks.base import Loss, State, detach
from unroll.training.context import WorkerContext, row_slices


class Samples(Strict):
    """Text to generate: one for each temperature."""

    prompt: str = "\n"
    length: int = 400
    temperatures: tuple[float, ...] = (0.5, 0.8, 1.0)
    top_k: int | None = None
    top_p: float | None = None


class Prediction(Strict):
    """How a split is scored: as one stream, after `context` tokens of the training text, in `block`-token blocks."""

    split: str = "test"
    context: int = 1000
    block: int = 1000
    window: int = 1024
    samples: Samples = Samples()


class Task:
    """Language modelling on a prepared stream of tokens."""

    validation_score = "loss"

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        self.manifest = load_manifest(folder)
        self.vocabulary: int = self.manifest["vocabulary"]
        self.description: dict[str, Any] = {}

    # --- training ---------------------------------------------------------------------------------------------------

    @property
    def training(self) -> Training:
        assert isinstance(self.recipe.train, Training)
        return self.recipe.train

    def plan(self, seed: int) -> StreamPlan:
        """Which tokens form step n of epoch e."""
        train = self.training
        if train.batch is None:
            raise UserError(f"recipes.{self.recipe.name}.train.batch: missing; a stream is read in rows")
        stream = TokenStream(self.folder, "train")
        if stream.tokens <= train.batch:
            raise UserError(f"{self.folder}: {stream.tokens} training tokens are too few for {train.batch} rows")
        return StreamPlan(stream.tokens, train.batch, train.window, seed, train.random_windows)

    def total_steps(self, seed: int) -> int:
        """Number of updates of the whole run."""
        train = self.training
        if train.steps is not None:
            return train.steps
        assert train.epochs is not None
        plan = self.plan(seed)
        return sum(plan.steps(epoch) for epoch in range(train.epochs))

    def loader(self, seed: int, context: WorkerContext, position: dict[str, int] | None) -> StreamLoader:
        """The batches of this worker from `position` on, for ever: one list a step, one batch for each pass."""
        start, slices = position or {"epoch": 0, "step": 0}, row_slices(self.training, context)
        return StreamLoader(TokenStream(self.folder, "train"), self.plan(seed), slices, start)

    def loss(self, model: nn.Module, batch: Batch, carry: State | None) -> Loss:
        """Log-loss of one batch: sum in nats, the objective with the model's penalties, and the state to carry on."""
        tokens, targets = batch.tensors["tokens"], batch.tensors["targets"]  # [B,T] [B,T]
        if carry is None:
            carry = to_device(model.initial_state(len(tokens)), tokens.device)  # type: ignore[operator]
        output = model(tokens, carry)
        total = model.output.total_log_loss(output.hidden.flatten(0, 1), targets.flatten())  # type: ignore[union-attr,operator]
        objective = total + sum(penalty * batch.weight for penalty in output.penalties.values())
        return Loss(objective, total.detach(), detach(output.state), {})

    @torch.no_grad()
    def validate(self, model: nn.Module, context: WorkerContext) -> float:
        """Nats per token on the validation split, read in `validation_rows` lanes shared among the workers."""
        stream = TokenStream(self.folder, "validation")
        rows = min(self.training.validation_rows, stream.tokens - 1)
        plan, parts = StreamPlan(stream.tokens, rows, 256, 0), self.training.parts
        sums = [self._validate_rows(model, stream, plan, part, context) for part in context.slices(rows, parts)]
        nats, weight = context.sum_of_slices(sums, parts)
        return nats / weight

    def _validate_rows(
        self, model: nn.Module, stream: TokenStream, plan: StreamPlan, rows: slice, context: WorkerContext
    ) -> list[float]:
        """[nats, predicted tokens] of some lanes."""
        nats, weight = 0.0, 0.0
        if rows.stop == rows.start:
            return [nats, weight]
        carry: State | None = None
        with StreamLoader(stream, plan, [rows], {"epoch": 0, "step": 0}) as loader:
            for _, [batch] in zip(range(plan.steps(0)), loader, strict=False):
                batch = batch.to(context.device)
                loss = self.loss(model, batch, carry)
                carry = loss.carry
                nats, weight = nats + float(loss.total), weight + batch.weight
        return [nats, weight]

    # --- fitting by counting ----------------------------------------------------------------------------------------

    def fit(self, model: Any) -> None:
        """Fit a counting model in one pass over the training tokens."""
        stream = TokenStream(self.folder, "train")
        with progress("count", stream.tokens) as bar:
            model.fit(stream.chunks(1 << 20), bar.advance)

    # --- predictions ------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, out: Path, seed: int, device: torch.device) -> None:
        """Write `blocks.jsonl` (log-loss by block of text) and `samples.jsonl` into `out`."""
        options: Prediction = check(Prediction, self.recipe.predict, f"recipes.{self.recipe.name}.predict")
        model.eval()
        with (out / "blocks.jsonl").open("w") as file:
            for block in self.score(model, options, device):
                file.write(json.dumps(block) + "\n")
        with (out / "samples.jsonl").open("w") as file:
            for entry in self.generate(model, options.samples, seed, device):
                file.write(json.dumps(entry) + "\n")

    def score(self, model: Any, options: Prediction, device: torch.device) -> Iterator[dict[str, float]]:
        """Log-loss of each block of the split, read as one stream after the last tokens of the training text."""
        tokenizer = load_tokenizer(self.folder / "tokenizer.json")
        lengths = tokenizer.byte_lengths
        losses, targets = np.empty(0), np.empty(0, dtype=np.int64)
        number = 0
        for new_losses, new_targets in self._losses(model, options, device):
            losses, targets = np.concatenate([losses, new_losses]), np.concatenate([targets, new_targets])
            last = not len(new_losses)
            while len(losses) >= options.block or (last and len(losses)):
                part = targets[: options.block]
                yield {
                    "block": number,
                    "nats": float(losses[: options.block].sum()),
                    "tokens": len(part),
                    "bytes": int(lengths[part].sum()),
                    "characters": len(tokenizer.decode(part)),
                }
                losses, targets, number = losses[options.block :], targets[options.block :], number + 1

    @torch.no_grad()
    def _losses(self, model: Any, options: Prediction, device: torch.device) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(-log p, token) of the split's tokens, window by window with the state carried; an empty pair at the end."""
        stream, train = TokenStream(self.folder, options.split), TokenStream(self.folder, "train")
        preceding = train if options.context else None
        state = to_device(model.initial_state(1), device)
        with progress("score", stream.tokens) as bar:
            for part in segments(stream, options.window, context=options.context, preceding=preceding):
                tokens, targets = part.tokens.to(device), part.targets.to(device)  # [1,T] [1,T]
                losses, state = self._token_losses(model, tokens, targets, state)
                scored = part.mask[0].numpy()
                yield losses[scored], part.targets[0].numpy()[scored]
                bar.advance(int(scored.sum()))
        yield np.empty(0), np.empty(0, dtype=np.int64)

    def _token_losses(self, model: Any, inputs: Tensor, targets: Tensor, state: State) -> tuple[np.ndarray, State]:
        """-log p of each target [1,T] -> [T] in float64, and the state after the inputs."""
        if hasattr(model, "log_loss"):
            losses, state = model.log_loss(inputs, targets, state)
            return losses[0].double().cpu().numpy(), state
        output = model(inputs, state)
        losses = model.output.log_loss(output.hidden[0], targets[0])
        return losses.double().cpu().numpy(), output.state

    def generate(self, model: Any, options: Samples, seed: int, device: torch.device) -> Iterator[dict[str, Any]]:
        """Texts that go on from the prompt, one for each temperature."""
        tokenizer = load_tokenizer(self.folder / "tokenizer.json")
        yield from generate(model, tokenizer, options, seed, device)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, options: Samples, seed: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Texts that go on from a prompt: needs the exported model alone, no data set."""
    prompt = torch.from_numpy(np.asarray(tokenizer.encode(options.prompt), dtype=np.int64)).to(device)[None]  # [1,T]
    if prompt.shape[1] == 0:
        raise UserError("prompt: it is empty; at least one token is needed to go on from")
    for temperature in options.temperatures:
        state = to_device(model.initial_state(1), device)
        for position in range(prompt.shape[1] - 1):
            _, state = model.step(prompt[:, position], state)
        generator = torch.Generator(device).manual_seed(seed)
        tokens = sample(model.step, state, prompt[:, -1], options.length, generator,
                        temperature=temperature, top_k=options.top_k, top_p=options.top_p)  # fmt: skip
        yield {
            "temperature": temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "prompt": options.prompt,
            "text": tokenizer.decode(tokens[0].cpu().numpy()),
        }


def to_device(state: State, device: torch.device) -> State:
    return {name: value.to(device) for name, value in state.items()}


def is_counted(recipe: Recipe) -> bool:
    """Whether the recipe's model is fitted by counting."""
    return isinstance(recipe.train, CountingTraining)
