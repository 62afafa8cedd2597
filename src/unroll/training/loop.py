"""The training loop: one for every system. Next batch, loss, backward, clip, step, validate, save.

A task gives loss sums and weights; both are added up over accumulation and workers and divided once, so that neither
batch shapes, nor accumulation, nor the number of workers changes a result. All randomness of step n is a function of
(seed, n); a resumed run therefore needs no random state and goes on bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from unroll.config import Training
from unroll.data.loader import Batch
from unroll.errors import UserError
from unroll.journal import Journal, system_metrics
from unroll.layers.dropout import dropout_place
from unroll.memory import keep_few_compiled_shapes, return_unused
from unroll.progress import progress
from unroll.tasks.base import Loss, State
from unroll.training import checkpoint
from unroll.training.context import WorkerContext, row_slices
from unroll.training.optimizers import OptimizerPolicy
from unroll.training.sums import add_gradients_in_tree

RETURN_MEMORY_EVERY = 50
"""Steps between returns of unused memory where batches differ in shape."""
LARGE = 2_000_000
"""Parameters of a model for which what was compiled for old shapes is let go: to compile takes as long for a small one,
which would train a third to a half slower."""


class TrainableTask(Protocol):
    """What the loop asks of a task. `validation_score` names what `validate` gives; lower is better."""

    validation_score: str

    def total_steps(self, seed: int) -> int: ...
    def loader(self, seed: int, context: WorkerContext, position: dict[str, int] | None) -> Any: ...
    def loss(self, model: nn.Module, batch: Batch, carry: State | None) -> Loss: ...
    def validate(self, model: nn.Module, context: WorkerContext) -> float: ...


class NonFiniteError(UserError):
    """The loss or the gradient is not a number: every worker stops at the same step, before the update."""


class Preempted(Exception):
    """The run was asked to stop and has saved a checkpoint."""


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint."""

    step: int = 0
    position: dict[str, int] | None = None
    best: float = math.inf
    best_step: int = 0
    validations_without_gain: int = 0
    seconds: float = 0.0
    predictions: float = 0.0


@dataclass
class StepResult:
    """Sums over all workers for one step; `stop` is true on all of them or on none."""

    loss: float
    weight: float
    gradient_norm: float
    learning_rate: float
    stop: bool
    logs: dict[str, float] = field(default_factory=dict)


class Run:
    """One recipe, one seed, one worker's part of it."""

    def __init__(
        self, task: TrainableTask, model: nn.Module, train: Training, seed: int, folder: Path, context: WorkerContext
    ) -> None:
        self.task, self.train, self.seed, self.folder, self.context = task, train, seed, folder, context
        if train.batch_tokens and sum(p.numel() for p in model.parameters()) >= LARGE:
            keep_few_compiled_shapes()
        self.model = model.to(context.device)
        self.total_steps = task.total_steps(seed)
        self.policy = OptimizerPolicy(train.optimizer, self.model, self.total_steps)
        self.progress = Progress()
        self.carries: list[State | None] = []
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=train.precision == "fp16")
        self.journal: Journal | None = None
        self.waited = 0.0

    def run(self) -> Progress:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            UserError: the loss is not finite, or the disk is full.
            Preempted: a stop was asked for; a checkpoint was saved.
        """
        self.resume()
        every = self.train.validate_every or max(1, self.total_steps // 20)
        save_every = self.train.checkpoint_every or every
        with self.context.stop_on_sigterm(), self._journal_file(), self._loader() as loader, self._bar() as bar:
            for batches in loader:
                if self.finished():
                    break
                self.waited = loader.waited
                started = time.perf_counter()
                result = self.step(batches)
                self.progress.seconds += time.perf_counter() - started
                step = self.progress.step
                self.log(result)
                bar.advance(1, loss=result.loss / max(1.0, result.weight))
                if self.train.batch_tokens and step % RETURN_MEMORY_EVERY == 0:
                    return_unused()
                if step % every == 0 or step == self.total_steps:
                    self.validate()
                if step % save_every == 0 or step == self.total_steps or result.stop:
                    self.save()
                if result.stop and not self.finished():
                    raise Preempted(f"stopped at step {step} of {self.total_steps}")
        return self.progress

    def finished(self) -> bool:
        patience = self.train.patience
        out_of_patience = patience is not None and self.progress.validations_without_gain >= patience
        return self.progress.step >= self.total_steps or out_of_patience

    # --- one step ---------------------------------------------------------------------------------------------------

    def step(self, batches: list[Batch]) -> StepResult:
        """One update from this worker's slices of the global batch."""
        self.model.train()
        seed_generators(step_seed(self.seed, self.progress.step, self.context.rank))
        if batches[0].starts_epoch or len(self.carries) != len(batches):
            self.carries = [None] * len(batches)
        totals = self.context.sum_later([sum(b.weight for b in batches), float(self.context.wants_stop())])
        self.policy.optimizer.zero_grad(set_to_none=True)
        losses, parameters, in_tree = self.losses(batches, totals), self.policy.parameters, self.train.parts is not None
        loss_sum = add_gradients_in_tree(losses, parameters) if in_tree else sum(losses, 0.0)
        all_losses = self.context.sum_later([loss_sum], in_tree)
        self.context.sum_gradients(parameters, in_tree)
        [loss_sum], [weight, stop] = all_losses(), totals()
        self.scaler.unscale_(self.policy.optimizer)
        norm = float(self.policy.clip())
        self._refuse_non_finite(loss_sum, norm, batches)
        rate = self._update(batches[0].window_scale)
        self.progress.step += 1
        self.progress.position = batches[-1].position
        self.progress.predictions += weight
        return StepResult(loss_sum, weight, norm, rate, stop > 0)

    def losses(self, batches: list[Batch], totals: Callable[[], list[float]]) -> Iterator[float]:
        """Forward and backward of one slice after the other; gives the loss sum of each. `totals`: the weight first."""
        for number, batch in enumerate(batches):
            if not batch.weight:
                yield 0.0
                continue
            if self.train.parts is not None:
                part = self.context.rank * len(batches) + number
                seed_generators(step_seed(self.seed, self.progress.step, part))
            loss = self.backward(batch.to(self.context.device), self.carries[number], totals)
            self.carries[number] = loss.carry
            yield float(loss.total)

    def backward(self, batch: Batch, carry: State | None, totals: Callable[[], list[float]]) -> Loss:
        """Loss and gradients of one slice; gradients add up over slices."""
        with dropout_place(
            self.seed, self.progress.step, batch.first_row, batch.total_rows, keyed=self.train.dropout_by_place
        ):
            with autocast(self.train, self.context.device):
                loss = self.task.loss(self.model, batch, carry)
            weight, *_ = totals()
            self.scaler.scale(loss.objective / weight).backward()
        return loss

    def _update(self, window_scale: float) -> float:
        if not self.scaler.is_enabled():
            return self.policy.step(self.progress.step, window_scale)
        rate = self.policy.learning_rate(self.progress.step, window_scale)
        for group in self.policy.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.policy.optimizer)
        self.scaler.update()
        self.policy.average()
        return rate

    def _refuse_non_finite(self, loss: float, norm: float, batches: list[Batch]) -> None:
        """Every worker sees the same sums, so all of them stop, before the update."""
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
            return
        what = "loss" if not math.isfinite(loss) else "gradient"
        names = "; ".join(batch.description for batch in batches)
        raise NonFiniteError(
            f"step {self.progress.step}: the {what} is not finite ({loss if what == 'loss' else norm}) on {names}; "
            "the weights were not updated; lower the learning rate or set optimizer.clip"
        )

    # --- between steps ----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Score the validation split with the averaged weights; keep the best."""
        self.model.eval()
        with self.policy.averaged_weights(), autocast(self.train, self.context.device):
            score = self.task.validate(self.model, self.context)
            if score < self.progress.best:
                self.progress.best, self.progress.best_step = score, self.progress.step
                self.progress.validations_without_gain = 0
                if self.context.is_first and self.train.select == "best":
                    checkpoint.save_model(self.folder / "best", self.model.state_dict(), {"step": self.progress.step})
            else:
                self.progress.validations_without_gain += 1
        self.policy.validated(score)
        self._journal({f"validation/{self.task.validation_score}": score})

    def log(self, result: StepResult) -> None:
        """Journal the step. Activation norms need another pass over memory, so all is logged every few steps."""
        if self.progress.step % self.train.log_every and self.progress.step != self.total_steps:
            return
        rate = self.progress.predictions / max(1e-9, self.progress.seconds)
        values = {
            "train/loss": result.loss / max(1.0, result.weight),
            "train/gradient_norm": result.gradient_norm,
            "train/learning_rate": result.learning_rate,
            "train/tokens_per_second": rate,
            **{f"train/{name}": value for name, value in self._activation_norms().items()},
            **system_metrics(),
        }
        self._journal(values)

    def _activation_norms(self) -> dict[str, float]:
        """Root mean square of the carried state, tensor by tensor: the activations that reach the next window."""
        carry = (self.carries and self.carries[0]) or {}
        floating = {name: value for name, value in carry.items() if value.is_floating_point() and value.numel()}
        return {f"rms_{name}": float(value.float().pow(2).mean().sqrt()) for name, value in floating.items()}

    def _journal(self, values: dict[str, float]) -> None:
        if self.journal is not None:
            self.journal.metrics(self.progress.step, values)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint. Every worker sends its carried rows, the first one writes."""
        carry = self._gather_carry()
        if self.context.is_first:
            state = {**vars(self.progress), "policy": self.policy.state(), "scaler": self.scaler.state_dict()}
            content = checkpoint.Checkpoint(self.model.state_dict(), self.policy.tensors(), carry, state)
            checkpoint.save(self.folder / "checkpoints", content)
        self.context.barrier()

    def resume(self) -> None:
        """Go on from the newest valid checkpoint, if there is one."""
        found, damaged = checkpoint.newest(self.folder / "checkpoints")
        if self.context.is_first:
            for line in damaged:
                print(f"passed over: {line}", flush=True)
        if found is None:
            return
        state = found.state
        checkpoint.load_weights(self.model, found.weights, self.folder)
        self.policy.restore(found.optimizer, state.pop("policy"))
        self.scaler.load_state_dict(state.pop("scaler"))
        self.progress = Progress(**state)
        if found.carry:
            device = self.context.device
            slices = row_slices(self.train, self.context)
            self.carries = [{name: rows[part].to(device) for name, rows in found.carry.items()} for part in slices]
        if self.context.is_first:
            print(f"resumed at step {self.progress.step} of {self.total_steps}", flush=True)

    def _gather_carry(self) -> State:
        """The carried state of the whole global batch, in row order, whatever the number of workers."""
        present = [carry for carry in self.carries if carry is not None]
        if not present:
            return {}
        counts = [sum(s.stop - s.start for s in row_slices(self.train, WorkerContext(rank, self.context.size)))
                  for rank in range(self.context.size)]  # fmt: skip
        return {name: self.context.gather_rows(torch.cat([c[name] for c in present]), counts) for name in present[0]}

    @contextmanager
    def _journal_file(self) -> Iterator[None]:
        if not self.context.is_first:
            yield
            return
        with Journal(self.folder) as self.journal:
            yield

    def _loader(self) -> Any:
        return self.task.loader(self.seed, self.context, self.progress.position)

    def _bar(self) -> Any:
        if not self.context.is_first:
            return nullcontext(_Silent())
        return progress("train", self.total_steps, start=self.progress.step)


class _Silent:
    """The bar of workers that print nothing."""

    def advance(self, count: int, **values: float) -> None:
        return


def seed_generators(seed: int) -> None:
    """`torch.manual_seed`, which also writes down the calling stack for each kind of device that is not there: 0.1 to
    0.4 ms, a tenth of a small model's step."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def step_seed(seed: int, step: int, share: int) -> int:
    """Seed of all in one step that is random and not keyed by its place in the batch; `share`: the worker or the part."""
    return (seed * 1_000_003 + step) * 8_191 + share


def autocast(train: Training, device: torch.device) -> Any:
    """Mixed precision as the recipe says; weights stay in fp32."""
    if train.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if train.precision == "bf16" else torch.float16)


def restore_best(model: nn.Module, folder: Path) -> None:
    """Load the weights of the best validation into the model, if any were kept."""
    path = folder / "best" / "weights.safetensors"
    if path.exists():
        checkpoint.load_weights(model, checkpoint.load_tensors(path), path)
