"""Answers about tables without learning to reason: what every system on tables has to beat.

    most_frequent   the number that answers most training questions
    word_overlap    of the row whose cells share most with the question (the first of equals), the cell of the column
                    whose name shares most with it and that is not itself what was asked with

Fitted by counting, in one pass over the training split. No paper; Pasupat & Liang 2015 report 12.7 % for information
retrieval on the test of WikiTableQuestions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unroll.config import Strict


class Config(Strict):
    """`rule`: see above."""

    rule: Literal["most_frequent", "word_overlap"]


TINY: list[dict[str, Any]] = [{"rule": "most_frequent"}, {"rule": "word_overlap"}]


@dataclass
class Answer:
    """What the task reads: see `models/neural_programmer.py`."""

    number: Tensor
    cells: Tensor
    operations: Tensor
    columns: Tensor
    numbers: Tensor


class Model(nn.Module):
    """The rule as a program of one step."""

    names = ("count", "print")

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.rule = config.rule
        self.register_buffer("constant", torch.zeros(()))
        self.parameter_count = 1

    def fit(self, answers: list[float]) -> None:
        """Remember the number that is there most often, the smallest of equals."""
        values, counts = torch.tensor(answers).unique(return_counts=True)
        self.constant = values[counts.argmax()]

    def forward(self, batch: dict[str, Tensor], hard: bool = False) -> Answer:
        """The answers of a batch; there is nothing soft about them."""
        rows, columns = batch["row_mask"], batch["column_mask"]  # [B,N] [B,C]
        shared = batch["matches"].sum(2).masked_fill(~rows, -1)  # [B,N]
        row = shared.argmax(1)  # [B] the first of equals
        used = batch["matches"][torch.arange(len(row)), row]  # [B,C]
        column = (batch["column_matches"] - 2.0 * used).masked_fill(~columns, -9.0).argmax(1)  # [B]
        cells = F.one_hot(row, rows.shape[1])[:, :, None] * F.one_hot(column, columns.shape[1])[:, None]  # [B,N,C]
        choice = torch.tensor([self.rule == "most_frequent", self.rule == "word_overlap"], device=row.device)
        return Answer(
            self.constant.expand(len(row)),
            cells.to(batch["values"].dtype),
            choice.to(batch["values"].dtype).expand(len(row), 1, -1),
            F.one_hot(column, columns.shape[1])[:, None].to(batch["values"].dtype),
            torch.zeros(len(row), 1, batch["numbers"].shape[1]),
        )
