"""What one worker knows of the others: rank, size, device, sums over all, and a stop that all agree on.

One process needs nothing but torch; several use `torch.distributed`, set up by whoever started them (Ray Train or
torchrun). The loop sees no difference.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from unroll.config import Training
from unroll.data.plan import rank_rows
from unroll.errors import UserError


@dataclass
class WorkerContext:
    """One worker of `size`. `stop_file`: its appearance asks every worker to save and stop."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stop_file: Path | None = None
    stop_signal: bool = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all workers, in float64."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Add the gradients of all workers, as one flat message per type of number."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            assert parameter.grad is not None
            by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_type.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The rows of all workers in rank order; worker r holds `counts[r]` of them. [b,...] -> [B,...]"""
        if self.size == 1:
            return rows
        longest = max(counts)
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def wants_stop(self) -> bool:
        """Whether this worker was asked to stop; the loop adds the answers up, so that all stop at the same step."""
        return self.stop_signal or (self.stop_file is not None and self.is_first and self.stop_file.exists())

    @contextmanager
    def stop_on_sigterm(self) -> Iterator[None]:
        """While inside, SIGTERM asks for a stop instead of ending the process."""

        def ask(signum: int, frame: FrameType | None) -> None:
            self.stop_signal = True

        try:
            before = signal.signal(signal.SIGTERM, ask)
        except ValueError:  # not the main thread (a Ray worker): the driver passes the wish on as `stop_file`
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def row_slices(train: Training, context: WorkerContext) -> list[slice]:
    """The rows of a global batch of a stream that this worker handles, one slice for each pass it accumulates.

    Raises:
        UserError: fewer rows than workers.
    """
    assert train.batch is not None
    if train.batch < context.size:
        raise UserError(
            f"train.batch: {train.batch} rows cannot be shared by {context.size} workers; use fewer workers"
        )
    rows_per_worker = math.ceil(train.batch / context.size)
    accumulation = math.ceil(rows_per_worker / (train.rows_per_pass or rows_per_worker))
    slices = [
        rank_rows(train.batch, context.rank, context.size, number, accumulation) for number in range(accumulation)
    ]
    return [part for part in slices if part.stop > part.start]
