"""Sums whose order of additions the number of workers does not change."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from unroll.config import Training, check
from unroll.errors import UserError
from unroll.training.context import WorkerContext, row_slices
from unroll.training.sums import add_gradients_in_tree, add_in_tree, parts_of_worker

TRAIN: dict[str, Any] = {"batch": 13, "steps": 1, "optimizer": {"learning_rate": 0.1}}


def bracketed(names: list[str]) -> str:
    return add_in_tree(names, lambda left, right: f"({left}+{right})")


def test_any_share_of_the_parts_is_a_branch_of_the_same_tree() -> None:
    parts = list("abcdefgh")
    assert bracketed(parts) == "(((a+b)+(c+d))+((e+f)+(g+h)))"
    for workers in (1, 2, 4, 8):
        share = parts_of_worker(len(parts), workers)
        branches = [bracketed(parts[first : first + share]) for first in range(0, len(parts), share)]
        assert bracketed(branches) == bracketed(parts)


def test_a_tree_holds_few_values_at_a_time() -> None:
    """A set of gradients is as large as the model."""
    held, most = 0, 0

    def values() -> Iterator[int]:
        nonlocal held, most
        for number in range(64):
            held += 1
            most = max(most, held)
            yield number

    def add(left: int, right: int) -> int:
        nonlocal held
        held -= 1
        return left + right

    assert add_in_tree(values(), add) == sum(range(64))
    assert most == 7  # log2(64) + 1


def test_gradients_are_left_in_the_parameters_zero_where_no_part_has_any() -> None:
    torch.manual_seed(0)
    used, unused = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3))
    parts = torch.randn(4, 5)

    def losses() -> Iterator[float]:
        for number, part in enumerate(parts):
            assert used.grad is None
            if number == 2:  # a part without rows
                yield 0.0
                continue
            loss = (used * part).sum()
            loss.backward()
            yield loss.item()

    total = add_gradients_in_tree(losses(), [used, unused])
    assert total == pytest.approx(float((used * parts[[0, 1, 3]]).sum()), rel=1e-6)
    assert used.grad is not None
    assert unused.grad is not None
    assert torch.equal(used.grad, (parts[0] + parts[1]) + parts[3])
    assert torch.equal(unused.grad, torch.zeros(3))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_parts_are_the_same_rows_for_any_number_of_workers(workers: int) -> None:
    train = check(Training, {**TRAIN, "parts": 4}, "here")
    slices = [part for rank in range(workers) for part in row_slices(train, WorkerContext(rank, workers))]
    assert slices == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 13)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parts": 3}, "a power of two, at most batch, is needed, found 3"),
        ({"parts": 16}, "a power of two, at most batch, is needed, found 16"),
        ({"parts": 4, "rows_per_pass": 2}, "each part is one pass"),
    ],
)
def test_parts_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        check(Training, {**TRAIN, **changes}, "here")
    assert "\n" not in str(error.value)


def test_workers_that_cannot_share_the_parts_are_refused() -> None:
    with pytest.raises(UserError, match=r"4 parts cannot be shared evenly by 3 workers \(allowed workers: 1, 2, 4\)"):
        parts_of_worker(4, 3)
