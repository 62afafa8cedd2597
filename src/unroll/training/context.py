"""What one worker knows of the others: rank, size, device, sums over all, and a stop that all agree on.

One process needs nothing but torch; several use `torch.distributed`, set up by whoever started them (Ray Train or
torchrun). The loop sees no difference.
"""

from __future__ import annotations

import functools
import math
import signal
from collections.abc import Callable, Iterator
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
from unroll.training.sums import add_in_tree, add_over_workers_in_tree, parts_of_worker


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

    def sum(self, values: list[float], in_tree: bool = False) -> list[float]:
        """Element-wise sum over all workers, in float64; `in_tree`: in the order of `sums.py`."""
        return self.sum_later(values, in_tree)()

    def sum_later(self, values: list[float], in_tree: bool = False) -> Callable[[], list[float]]:
        """Begin the `sum`; calling the result waits for it. What is done in between is not held up by slower workers.

        In a tree it is done at once.
        """
        if self.size == 1:
            return lambda: values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if in_tree:
            add_over_workers_in_tree(tensor, self.rank, self.size)
            return tensor.tolist
        work = dist.all_reduce(tensor, async_op=True)

        @functools.cache
        def wait() -> list[float]:
            work.wait()
            return tensor.tolist()

        return wait

    def sum_of_slices(self, values: list[list[float]], parts: int | None) -> list[float]:
        """Element-wise sum over all `slices` of all workers: `values` are those of this worker's slices, in order."""
        own = add_in_tree(values, lambda left, right: [a + b for a, b in zip(left, right, strict=True)])
        return self.sum(own, in_tree=parts is not None)

    def slices(self, total_rows: int, parts: int | None) -> list[slice]:
        """The rows that this worker takes of `total_rows`: one slice, or one for each of its parts if the rows are
        always cut into `parts` (`sums.py`). Slices are empty where rows are fewer.

        Raises:
            UserError: the workers cannot share the parts evenly.
        """
        own = self.passes(parts)
        return [rank_rows(total_rows, self.rank, self.size, number, own) for number in range(own)]

    def passes(self, parts: int | None, rows: int = 0, rows_per_pass: int | None = None) -> int:
        """How many slices this worker takes of a batch: its share of the `parts`, or as many as keep its share of `rows`
        within `rows_per_pass`, else one.

        Raises:
            UserError: the workers cannot share the parts evenly.
        """
        if rows_per_pass is not None:
            return -(-rows // (self.size * rows_per_pass))
        return 1 if parts is None else parts_of_worker(parts, self.size)

    def _reduce(self, tensor: Tensor, in_tree: bool) -> None:
        if in_tree:
            add_over_workers_in_tree(tensor, self.rank, self.size)
        else:
            dist.all_reduce(tensor)

    def sum_gradients(self, parameters: list[torch.nn.Parameter], in_tree: bool = False) -> None:
        """Add the gradients of all workers, as one flat message per type of number. Where none of them has one it is 0 for
        any number of workers: an optimiser passes over what has no gradient, but moves what has a gradient of 0."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            assert parameter.grad is not None
            by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_type.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            self._reduce(flat, in_tree)
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
        UserError: fewer rows than workers, or parts that they cannot share evenly.
    """
    assert train.batch is not None
    if train.parts is not None:
        return context.slices(train.batch, train.parts)
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
