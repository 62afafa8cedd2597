"""What every sequence layer that is a file of `layers/` must do, tried on each file's own `TINY` configurations, so that it
serves as language model, decoder or network over vectors."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unroll.layers
from unroll.layers.recurrent import sequence_layer
from unroll.models import recurrent_network

ROWS, LENGTH, INPUTS, WIDTH = 3, 11, 4, 6
Configuration = tuple[str, dict[str, Any]]


def discover() -> list[Configuration]:
    found = []
    for path in sorted(Path(unroll.layers.__path__[0]).glob("[!_]*.py")):
        module = importlib.import_module(f"unroll.layers.{path.stem}")
        if hasattr(module, "Layer"):
            found += [(path.stem, tiny) for tiny in module.TINY]
    return found


every_layer = pytest.mark.parametrize("configuration", discover(), ids=lambda c: f"{c[0]}-{c[1]}")


def build(configuration: Configuration) -> Any:
    torch.manual_seed(1)
    layer = sequence_layer(configuration[0], INPUTS, WIDTH, configuration[1])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return layer.double()


def inputs(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, LENGTH, INPUTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_discovery_finds_the_layers() -> None:
    assert "ntm" in {name for name, _ in discover()}


@every_layer
def test_shapes_of_outputs_and_state(configuration: Configuration) -> None:
    layer = build(configuration)
    before = layer.initial_state(ROWS)
    outputs, after = layer(inputs(), before)
    assert outputs.shape == (ROWS, LENGTH, WIDTH)
    shapes = {name: (value.shape, value.dtype) for name, value in after.items()}
    assert shapes == {name: (value.shape, value.dtype) for name, value in before.items()}
    assert all(len(value) == ROWS for value in after.values())


@every_layer
@torch.no_grad()
def test_one_pass_is_chunks_is_steps(configuration: Configuration) -> None:
    layer = build(configuration)
    whole, last = layer(inputs(), layer.initial_state(ROWS))
    for sizes in ([4, 1, 6], [1] * LENGTH):
        parts, state = [], layer.initial_state(ROWS)
        for chunk in inputs().split(sizes, dim=1):
            outputs, state = layer(chunk, state)
            parts.append(outputs)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        for name, value in state.items():
            torch.testing.assert_close(value, last[name], msg=lambda text, name=name: f"{name}: {text}")


@every_layer
@torch.no_grad()
def test_rows_do_not_see_each_other(configuration: Configuration) -> None:
    layer = build(configuration)
    whole, _ = layer(inputs(), layer.initial_state(ROWS))
    alone, _ = layer(inputs()[1:2], layer.initial_state(1))
    torch.testing.assert_close(alone, whole[1:2])


@every_layer
def test_a_gradient_reaches_every_parameter_and_the_state(configuration: Configuration) -> None:
    layer = build(configuration)
    given = inputs().requires_grad_()
    state = layer.initial_state(ROWS)
    outputs, after = layer(given, state)
    (outputs.square().sum() + sum(value.square().sum() for value in after.values())).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert (given.grad.abs().sum((0, 2)) > 0).all()


@every_layer
def test_a_network_of_it_differs_from_a_network_of_two(configuration: Configuration) -> None:
    """Layers stack, with a residual connection too."""
    cell, options = configuration
    for layers in (1, 2):
        config = recurrent_network.Config(cell=cell, options=options, width=WIDTH, layers=layers, residual=True)
        model = recurrent_network.Model(config, {"inputs": INPUTS, "outputs": 2}).double()
        output = model(inputs(), model.initial_state(ROWS))
        assert output.values.shape == (ROWS, LENGTH, 2)
        assert len(output.state) == layers * len(model.layers[0].initial_state(1))
