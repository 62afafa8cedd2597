"""Adaptive computation time: halting weights by hand, and a remainder that is exact."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unroll.config import check
from unroll.errors import UserError
from unroll.layers.act import Config, Layer
from unroll.models import recurrent_lm, recurrent_network


class Counter(nn.Module):
    """A cell whose output and state count its applications, and which remembers whether it was told of a first one."""

    state_names = ("count",)

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        return {"count": torch.zeros(batch, 1, dtype=torch.float64)}

    def forward(self, inputs: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        count = state["count"] + 1
        return torch.stack([count, inputs[:, 0, -1:]], -1), {"count": count}  # [B,1,2]


def layer_with(probabilities: list[float], maximum: int = 10) -> Layer:
    """A layer that halts with the given probabilities one application after the other."""
    layer = Layer(1, 2, Config(cell="rnn", maximum=maximum))
    layer.cell = Counter()
    logits = torch.tensor(probabilities, dtype=torch.float64).logit()

    class Halt(nn.Module):
        weight = torch.zeros(1, dtype=torch.float64)

        def forward(self, output: Tensor) -> Tensor:
            return logits[output[:, :1].long() - 1]

    layer.halt = Halt()
    return layer


def test_halting_weights_by_hand() -> None:
    """0.3 + 0.5 + 0.4 passes 0.99 at the third step, whose weight is the remainder 0.2."""
    layer = layer_with([0.3, 0.5, 0.4, 0.9])
    output, state, weights, steps = layer.ponder(torch.zeros(1, 1).double(), layer.cell.initial_state(1))
    torch.testing.assert_close(weights[:, 0], torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64))
    assert steps.tolist() == [3]
    mean_count = 0.3 * 1 + 0.5 * 2 + 0.2 * 3
    torch.testing.assert_close(output, torch.tensor([[mean_count, 0.3]], dtype=torch.float64))  # told of the first once
    torch.testing.assert_close(state["count"], torch.tensor([[mean_count]], dtype=torch.float64))
    _, after = layer(torch.zeros(1, 1, 1).double(), layer.initial_state(1))
    torch.testing.assert_close(after["ponder"], torch.tensor([3.2], dtype=torch.float64))  # N + R


def test_the_maximum_ends_with_what_is_left() -> None:
    layer = layer_with([0.1, 0.1, 0.1, 0.1], maximum=2)
    _, _, weights, steps = layer.ponder(torch.zeros(1, 1).double(), layer.cell.initial_state(1))
    torch.testing.assert_close(weights[:, 0], torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert steps.tolist() == [2]


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_halting_weights_sum_to_one(cell: str) -> None:
    layer = Layer(4, 16, Config(cell=cell, maximum=50, epsilon=0.001, halting_bias=-2.0))
    _, _, weights, steps = layer.ponder(3 * torch.randn(200, 4), layer.cell.initial_state(200))
    assert (weights.double().sum(0) - 1).abs().max() < 1e-6
    assert steps.min() < steps.max()  # rows halt by themselves
    assert ((weights > 0).sum(0) == steps).all()


def test_the_ponder_cost_lengthens_or_shortens() -> None:
    """Its gradient is that of the remainder: a step against it makes the first halting probabilities larger."""
    config = recurrent_network.Config(cell="act", width=8, options={"cell": "gru", "halting_bias": -1.0})
    model = recurrent_network.Model(config, {"inputs": 3, "outputs": 1})
    output = model(torch.randn(5, 2, 3), model.initial_state(5))
    spent = output.state["0.ponder"]
    torch.testing.assert_close(output.penalties["ponder"], spent.sum())
    output.penalties["ponder"].backward()
    assert model.layers[0].halt.bias.grad.item() < 0  # a larger bias costs less
    assert model.eval()(torch.randn(5, 2, 3), model.initial_state(5)).penalties == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "act"}, "act cannot run inside act"),
        ({"cell": "gru", "maximum": 0}, "maximum: Input should be greater than or equal to 1"),
        ({"cell": "gru", "epsilon": 1.5}, "epsilon: Input should be less than 1"),
        ({"cell": "ntm", "options": {"slots": 0}}, "options of ntm.slots: Input should be greater than or equal to 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check(recurrent_lm.Config, {"cell": "act", "options": options}, "recipes.r.model")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
