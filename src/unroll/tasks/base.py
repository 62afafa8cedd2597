"""What a task hands to the training loop, and the state it may carry from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

State = dict[str, Tensor]
"""Carried state: every tensor has the batch rows at dimension 0."""


@dataclass
class Loss:
    """The outcome of one batch. `objective` is what is differentiated (loss and penalties, a sum over predictions),
    `total` the loss alone, `carry` the state for the next batch of the same rows, `logs` sums to be logged."""

    objective: Tensor
    total: Tensor
    carry: State | None
    logs: dict[str, float] = field(default_factory=dict)


def detach(state: State) -> State:
    """The state without its history: backpropagation through time ends here."""
    return {name: value.detach() for name, value in state.items()}
