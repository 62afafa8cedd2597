"""Sums in an order of additions that the number of workers does not change: what `train.parts` rests on.

Floating-point addition rounds, so a sum depends on how it is put in brackets. With `parts: P` the global batch is always
cut into P contiguous parts; losses and gradients of the parts are added pairwise, as a binary tree over their numbers:

    ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))            P = 8

Two workers hold parts 0-3 and 4-7, each a branch of the tree; four workers hold two parts each. Every worker adds up its
own branch, then branches are exchanged between neighbours, level by level. Two branches are one addition, in which the
order of the two does not matter, so all workers, however many, end with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unroll.errors import UserError

T = TypeVar("T")

EXCHANGED_NUMBERS = 1 << 22
"""Numbers in one message between two workers: what an exchange needs beside the tensor itself."""


def parts_of_worker(parts: int, workers: int) -> int:
    """How many parts each worker holds.

    Raises:
        UserError: the workers cannot share the parts evenly.
    """
    if parts % workers:
        allowed = ", ".join(str(1 << power) for power in range(parts.bit_length()))
        raise UserError(
            f"train.parts: {parts} parts cannot be shared evenly by {workers} workers (allowed workers: {allowed})"
        )
    return parts // workers


def add_in_tree(values: Iterable[T], add: Callable[[T, T], T]) -> T:
    """The sum of 2^k values, added pairwise; holds at most k + 1 of them at a time."""
    waiting: list[tuple[int, T]] = []  # (level in the tree, branch), levels falling
    for value in values:
        level = 0
        while waiting and waiting[-1][0] == level:
            value = add(waiting.pop()[1], value)
            level += 1
        waiting.append((level, value))
    [(_, total)] = waiting
    return total


def add_gradients_in_tree(losses: Iterator[float], parameters: list[nn.Parameter]) -> float:
    """Draw 2^k losses, each of which leaves its gradients in the parameters; leave the sum there, and give the loss.

    Holds at most k + 1 sets of gradients at a time.
    """

    def branches() -> Iterator[tuple[float, list[Tensor]]]:
        for loss in losses:
            yield loss, [_taken(parameter) for parameter in parameters]

    def add(left: tuple[float, list[Tensor]], right: tuple[float, list[Tensor]]) -> tuple[float, list[Tensor]]:
        torch._foreach_add_(left[1], right[1])
        return left[0] + right[0], left[1]

    total, gradients = add_in_tree(branches(), add)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return total


def _taken(parameter: nn.Parameter) -> Tensor:
    """The gradient, zeros if there is none, taken away from its parameter."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient.to_dense() if gradient.is_sparse else gradient


def add_over_workers_in_tree(tensor: Tensor, rank: int, workers: int) -> None:
    """Replace `tensor` by its sum over 2^k workers, added pairwise.

    For two workers that is an all-reduce. For more, each sends and receives the tensor k times, where the ring of an
    all-reduce takes 2 (2^k - 1) / 2^k: a third more for 4 workers, 1.7 times as much for 8.
    """
    if workers == 2:
        dist.all_reduce(tensor)
        return
    distance = 1
    while distance < workers:
        for piece in tensor.split(EXCHANGED_NUMBERS):
            received = torch.empty_like(piece)
            other = rank ^ distance
            pair = [dist.P2POp(dist.isend, piece, other), dist.P2POp(dist.irecv, received, other)]
            for transfer in dist.batch_isend_irecv(pair):
                transfer.wait()
            piece += received
        distance *= 2
