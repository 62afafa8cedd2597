"""What models that run programs must keep: padding, batch and steps change nothing, and every parameter learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unroll.config import check, load_part

NPI = load_part("models", "npi", "test")
PROGRAMMER = load_part("models", "neural_programmer", "test")
SIZES = {"programs": 5, "rows": 4, "symbols": 11, "arguments": 3}
WORDS = 9


def build(module: Any, number: int, vocabulary: Any) -> Any:
    torch.manual_seed(3)
    model = module.Model(check(module.Config, module.TINY[number], "test"), vocabulary).double()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    return model.eval()


def calls(count: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(7)
    return (
        torch.randint(5, (count,), generator=draw),
        torch.randint(11, (count, 3), generator=draw),
        torch.randint(11, (count, steps, 4), generator=draw),
    )


@pytest.mark.parametrize("number", range(len(NPI.TINY)))
@torch.no_grad()
def test_a_call_is_the_same_in_one_pass_step_by_step_and_alone(number: int) -> None:
    model = build(NPI, number, SIZES)
    program, arguments, seen = calls(4, 6)
    whole = model(program, arguments, seen, model.initial_state(4))
    state = model.initial_state(4)
    for step in range(6):
        says = model(program, arguments, seen[:, step : step + 1], state)
        state = says.state
        for name in ("end", "programs", "arguments"):
            torch.testing.assert_close(getattr(says, name)[:, 0], getattr(whole, name)[:, step])
    alone = model(program[2:3], arguments[2:3], seen[2:3, :4], model.initial_state(1))
    torch.testing.assert_close(alone.programs[0], whole.programs[2, :4])


@pytest.mark.parametrize("number", range(len(NPI.TINY)))
def test_every_parameter_of_the_interpreter_learns(number: int) -> None:
    model = build(NPI, number, SIZES).train()
    says = model(*calls(6, 5), model.initial_state(6))
    (says.end.sum() + says.programs[..., 1].sum() + says.arguments[..., 2].sum()).backward()
    assert not [
        key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]


def tables(sizes: list[tuple[int, int, int, int]], extra: int = 0) -> dict[str, Tensor]:
    """Tables of (rows, columns) with questions of so many words and numbers, each drawn from its own place alone."""
    count = len(sizes)
    n, c, s, k = (max([1] + [size[i] for size in sizes]) + extra for i in range(4))
    out: dict[str, Tensor] = {
        "question": torch.randint(WORDS, (count, s)),
        "lengths": torch.tensor([size[2] for size in sizes]),
        "numbers": torch.zeros(count, k, dtype=torch.float64),
        "places": torch.zeros(count, k, dtype=torch.int64),
        "number_mask": torch.zeros(count, k, dtype=torch.bool),
        "values": torch.zeros(count, n, c, dtype=torch.float64),
        "numeric": torch.zeros(count, n, c, dtype=torch.bool),
        "row_mask": torch.zeros(count, n, dtype=torch.bool),
        "column_mask": torch.zeros(count, c, dtype=torch.bool),
        "names": torch.full((count, c, 2), -1),
        "matches": torch.zeros(count, n, c, dtype=torch.bool),
        "frequent": torch.zeros(count, n, c, dtype=torch.bool),
        "column_matches": torch.zeros(count, c, dtype=torch.float64),
    }
    for row, (rows, columns, words, numbers) in enumerate(sizes):
        draw = torch.Generator().manual_seed(1000 * rows + 100 * columns + words)
        out["question"][row, :words] = torch.randint(WORDS, (words,), generator=draw)
        out["numbers"][row, :numbers] = torch.randperm(9, generator=draw)[:numbers].double() - 4
        out["places"][row, :numbers] = torch.randint(words, (numbers,), generator=draw)
        out["number_mask"][row, :numbers] = True
        out["values"][row, :rows, :columns] = torch.randint(-9, 9, (rows, columns), generator=draw).double()
        out["numeric"][row, :rows, :columns] = torch.rand(rows, columns, generator=draw) < 0.9
        out["row_mask"][row, :rows], out["column_mask"][row, :columns] = True, True
        out["names"][row, :columns, 0] = torch.randint(WORDS, (columns,), generator=draw)
        for name in ("matches", "frequent"):
            out[name][row, :rows, :columns] = torch.rand(rows, columns, generator=draw) < 0.4
        out["column_matches"][row, :columns] = torch.rand(columns, generator=draw).double()
    return out


SHAPES = [(4, 3, 5, 2), (7, 2, 9, 1), (3, 5, 4, 0)]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("number", range(len(PROGRAMMER.TINY)))
@torch.no_grad()
def test_neither_batch_nor_padding_changes_an_answer(number: int, hard: bool) -> None:
    model = build(PROGRAMMER, number, WORDS)
    together = model(tables(SHAPES, extra=2), hard=hard)
    for row, (rows, columns, _, numbers) in enumerate(SHAPES):
        alone = model(tables(SHAPES[row : row + 1]), hard=hard)
        torch.testing.assert_close(together.number[row], alone.number[0])
        torch.testing.assert_close(together.cells[row, :rows, :columns], alone.cells[0])
        assert not together.cells[row, rows:].any()
        assert not together.cells[row, :, columns:].any()
        torch.testing.assert_close(together.operations[row], alone.operations[0])
        torch.testing.assert_close(together.columns[row, :, :columns], alone.columns[0])
        torch.testing.assert_close(together.numbers[row, :, :numbers], alone.numbers[0, :, :numbers])
        assert not together.rows[row, :, rows:].any()


@pytest.mark.parametrize("number", range(len(PROGRAMMER.TINY)))
def test_choices_are_shares_and_every_parameter_learns(number: int) -> None:
    model = build(PROGRAMMER, number, WORDS).train()
    says = model(tables(SHAPES))
    ones = torch.ones(3, model.steps, dtype=torch.float64)
    torch.testing.assert_close(says.operations.sum(-1), ones)
    torch.testing.assert_close(says.columns.sum(-1), ones)
    torch.testing.assert_close(says.numbers.sum(-1)[:2], ones[:2])
    assert not says.numbers[2].any()
    (says.number.sum() + (says.cells**2).sum()).backward()
    assert not [
        key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]


def run(program: list[tuple[str, int, int]], values: list[list[float]], numbers: list[float]) -> Any:
    """Apply a program of (operation, column, number) to one table, all choices hard."""
    names = list(dict.fromkeys(name for name, _, _ in program))
    table = torch.tensor([values], dtype=torch.float64)
    batch = {
        "values": table,
        "numeric": torch.ones(table.shape, dtype=torch.bool),
        "row_mask": torch.ones(table.shape[:2], dtype=torch.bool),
        "numbers": torch.tensor([numbers or [0.0]], dtype=torch.float64),
        "matches": table == 2,
        "frequent": table == 3,
    }
    built = PROGRAMMER.Table(batch, names)
    rows, results = built.every[:, None], (torch.zeros(1, 1, dtype=torch.float64),) * 2
    for name, column, number in program:
        one = [
            torch.nn.functional.one_hot(torch.tensor([[i]]), n).double()
            for i, n in ((names.index(name), len(names)), (column, table.shape[2]), (number, batch["numbers"].shape[1]))
        ]
        cells = built.printed(one[0], one[1], rows, names)
        outcome, rows, results = built.apply(*one, rows, results, names)
    return float(outcome), cells[0, 0].nonzero().tolist(), rows[0, 0].tolist()


TABLE = [[5.0, 1.0], [2.0, 7.0], [9.0, 7.0], [3.0, -4.0]]


def test_operations_by_hand() -> None:
    assert run([("sum", 1, 0)], TABLE, [])[0] == 11
    assert run([("greater", 0, 0), ("count", 0, 0)], TABLE, [2.5])[0] == 3
    assert run([("greater_equal", 0, 0), ("count", 0, 0)], TABLE, [3.0])[0] == 3
    assert run([("lesser_equal", 0, 0), ("count", 0, 0)], TABLE, [3.0])[0] == 2
    assert run([("greater", 0, 0), ("lesser", 1, 1), ("sum", 0, 0)], TABLE, [2.5, 5])[0] == 8
    assert run([("greater", 0, 0), ("or_lesser", 1, 1), ("count", 0, 0)], TABLE, [8, -3])[0] == 2
    assert run([("lesser", 0, 0), ("or_greater", 0, 1), ("sum", 0, 0)], TABLE, [2.5, 4])[0] == 16
    assert run([("largest", 1, 0), ("print", 0, 0)], TABLE, [])[1] == [[1, 0], [2, 0]]
    assert run([("lesser", 0, 0), ("smallest", 1, 0), ("print", 0, 0)], TABLE, [4.0])[1] == [[3, 0]]
    assert run([("sum", 0, 0), ("greater", 0, 0), ("sum", 1, 0), ("difference", 0, 0)], TABLE, [4.0])[0] == 11
    assert run([("sum", 0, 0), ("sum", 1, 0), ("reset", 0, 0), ("difference", 0, 0)], TABLE, [])[0] == 8
    assert run([("greater", 0, 0), ("first", 0, 0)], TABLE, [4.0])[2] == [1, 0, 0, 0]
    assert run([("greater", 0, 0), ("last", 0, 0)], TABLE, [4.0])[2] == [0, 0, 1, 0]
    assert run([("greater", 0, 0), ("previous", 0, 0)], TABLE, [8.0])[2] == [0, 1, 0, 0]
    assert run([("greater", 0, 0), ("next", 0, 0)], TABLE, [8.0])[2] == [0, 0, 0, 1]
    assert run([("greater", 0, 0), ("reset", 0, 0)], TABLE, [8.0])[2] == [1, 1, 1, 1]
    assert run([("match", 0, 0)], TABLE, [])[2] == [0, 1, 0, 0]
    assert run([("frequent", 0, 0)], TABLE, [])[2] == [0, 0, 0, 1]
