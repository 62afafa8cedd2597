"""RNN, LSTM and GRU against their equations in NumPy, against torch.nn, and against themselves cut in pieces."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unroll.errors import UserError
from unroll.layers.recurrent import GRU, LSTM, RNN, RecurrentLayer, recurrent_layer

CELLS: list[tuple[str, dict[str, Any]]] = [
    ("rnn", {}),
    ("rnn", {"bias": False}),
    ("lstm", {}),
    ("lstm", {"bias": False}),
    ("gru", {"reset": "before"}),
    ("gru", {"reset": "before", "bias": False}),
    ("gru", {"reset": "after"}),
    ("gru", {"reset": "after", "bias": False}),
]
SHAPES = [(1, 1, 3, 5), (1, 7, 4, 4), (3, 1, 5, 2), (5, 13, 3, 7)]  # B, T, D, H
all_cells = pytest.mark.parametrize(("cell", "options"), CELLS)
both_methods = pytest.mark.parametrize("method", ["fast", "loop"])


def random_state(layer: RecurrentLayer, batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.randn_like(value) for name, value in layer.initial_state(batch, dtype=dtype).items()}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def run_with_gradients(
    run: Callable[..., Any], inputs: Tensor, state: dict[str, Tensor], parameters: list[nn.Parameter] | None = None
) -> list[Tensor]:
    """Outputs, final state, and the gradients of a sum that weighs every one of them differently."""
    parameters = list(run.parameters()) if isinstance(run, nn.Module) else parameters
    assert parameters is not None
    inputs = inputs.detach().requires_grad_()
    state = {name: value.detach().requires_grad_() for name, value in state.items()}
    outputs, after = run(inputs, state)
    results = [outputs, *after.values()]
    score = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r)).sum() for r in results)
    assert isinstance(score, Tensor)
    gradients = torch.autograd.grad(score, [inputs, *state.values(), *parameters])
    return [result.detach() for result in (*results, *gradients)]


# --- the equations ----------------------------------------------------------------------------------------------------


@both_methods
@pytest.mark.parametrize("bias", [True, False])
def test_lstm_computes_the_equations_of_the_course(method: str, bias: bool) -> None:
    layer = LSTM(3, 5, bias=bias, method=method).double()
    inputs, state = torch.randn(2, 9, 3).double(), random_state(layer, 2, torch.float64)
    outputs, after = layer(inputs, state)
    W, U = layer.weight_input.detach().numpy(), layer.weight_hidden.detach().numpy()
    b = layer.bias.detach().numpy() if layer.bias is not None else np.zeros(20)
    gate = {name: slice(5 * k, 5 * k + 5) for k, name in enumerate(["i", "f", "candidate", "o"])}
    h, c = state["hidden"].numpy(), state["memory"].numpy()
    for t in range(9):
        x = inputs[:, t].numpy()
        a = {name: x @ W[rows].T + h @ U[rows].T + b[rows] for name, rows in gate.items()}
        c = sigmoid(a["f"]) * c + sigmoid(a["i"]) * np.tanh(a["candidate"])
        h = sigmoid(a["o"]) * np.tanh(c)
        np.testing.assert_allclose(outputs[:, t].detach().numpy(), h, atol=1e-12)
    np.testing.assert_allclose(after["hidden"].detach().numpy(), h, atol=1e-12)
    np.testing.assert_allclose(after["memory"].detach().numpy(), c, atol=1e-12)


@both_methods
def test_gru_without_biases_computes_the_equations_of_the_course(method: str) -> None:
    layer = GRU(3, 5, reset="before", bias=False, method=method).double()
    inputs, state = torch.randn(2, 9, 3).double(), random_state(layer, 2, torch.float64)
    outputs, after = layer(inputs, state)
    W_r, W_z, W = np.split(layer.weight_input.detach().numpy(), 3)
    U_r, U_z, U = np.split(layer.weight_hidden.detach().numpy(), 3)
    h = state["hidden"].numpy()
    for t in range(9):
        x = inputs[:, t].numpy()
        r, z = sigmoid(x @ W_r.T + h @ U_r.T), sigmoid(x @ W_z.T + h @ U_z.T)
        h = (1 - z) * h + z * np.tanh(x @ W.T + (r * h) @ U.T)
        np.testing.assert_allclose(outputs[:, t].detach().numpy(), h, atol=1e-12)
    np.testing.assert_allclose(after["hidden"].detach().numpy(), h, atol=1e-12)


@both_methods
def test_gru_with_reset_after_the_product_computes_its_equations(method: str) -> None:
    layer = GRU(3, 5, reset="after", method=method).double()
    inputs, state = torch.randn(2, 9, 3).double(), random_state(layer, 2, torch.float64)
    outputs, _ = layer(inputs, state)
    assert layer.bias is not None
    assert layer.bias_hidden is not None
    W_r, W_z, W = np.split(layer.weight_input.detach().numpy(), 3)
    U_r, U_z, U = np.split(layer.weight_hidden.detach().numpy(), 3)
    b_r, b_z, b = np.split(layer.bias.detach().numpy(), 3)
    h = state["hidden"].numpy()
    for t in range(9):
        x = inputs[:, t].numpy()
        r, z = sigmoid(x @ W_r.T + h @ U_r.T + b_r), sigmoid(x @ W_z.T + h @ U_z.T + b_z)
        candidate = np.tanh(x @ W.T + b + r * (h @ U.T + layer.bias_hidden.detach().numpy()))
        h = z * h + (1 - z) * candidate
        np.testing.assert_allclose(outputs[:, t].detach().numpy(), h, atol=1e-12)


@all_cells
def test_gradients_are_those_of_finite_differences(cell: str, options: dict[str, Any]) -> None:
    layer = recurrent_layer(cell, 2, 3, **options).double()
    state = random_state(layer, 2, torch.float64)

    def run(inputs: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        before = dict(zip(state, values, strict=False))
        outputs, after = layer(inputs, before, values[-1])
        return outputs, *after.values()

    arguments = [torch.randn(2, 4, 2).double(), *state.values(), layer.weight_hidden.detach()]
    assert torch.autograd.gradcheck(run, [argument.requires_grad_() for argument in arguments])


# --- against torch.nn -------------------------------------------------------------------------------------------------


def torch_twin(layer: RecurrentLayer) -> nn.RNNBase:
    """The layer of torch.nn with our weights; its second bias holds what ours has of it."""
    kind = {RNN: nn.RNN, LSTM: nn.LSTM, GRU: nn.GRU}[type(layer)]
    twin = kind(layer.input_width, layer.width, bias=layer.bias is not None, batch_first=True)
    with torch.no_grad():
        twin.weight_ih_l0.copy_(layer.weight_input)
        twin.weight_hh_l0.copy_(layer.weight_hidden)
        if layer.bias is not None:
            twin.bias_ih_l0.copy_(layer.bias)
            twin.bias_hh_l0.zero_()
            if isinstance(layer, GRU) and layer.bias_hidden is not None:
                twin.bias_hh_l0[-layer.width :].copy_(layer.bias_hidden)
    return twin


@both_methods
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("cell", "options"), [c for c in CELLS if c[1].get("reset") != "before"])
def test_equals_torch_with_copied_weights(
    cell: str, options: dict[str, Any], shape: tuple[int, int, int, int], method: str
) -> None:
    batch, steps, width, hidden = shape
    layer = recurrent_layer(cell, width, hidden, method=method, **options)
    inputs, state = torch.randn(batch, steps, width), random_state(layer, batch)
    ours = run_with_gradients(layer, inputs, state)
    twin = torch_twin(layer)

    def run(inputs: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        before = [value.unsqueeze(0) for value in state.values()]
        outputs, after = twin(inputs, tuple(before) if len(before) > 1 else before[0])
        after = after if isinstance(after, tuple) else (after,)
        return outputs, {name: value.squeeze(0) for name, value in zip(state, after, strict=True)}

    theirs = run_with_gradients(run, inputs, state, list(twin.parameters()))
    if layer.bias is not None:
        second_bias = theirs.pop()
        theirs += [second_bias[-hidden:]] * isinstance(layer, GRU)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-5)


# --- fast = loop ------------------------------------------------------------------------------------------------------


@all_cells
@pytest.mark.parametrize("shape", [*SHAPES, (6, 33, 24, 40)])
def test_the_fast_path_equals_the_loop(cell: str, options: dict[str, Any], shape: tuple[int, int, int, int]) -> None:
    batch, steps, width, hidden = shape
    layer = recurrent_layer(cell, width, hidden, **options)
    inputs, state = torch.randn(batch, steps, width), random_state(layer, batch)
    fast = run_with_gradients(layer, inputs, state)
    layer.method = "loop"
    for mine, other in zip(fast, run_with_gradients(layer, inputs, state), strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@all_cells
@both_methods
def test_bfloat16_autocast_stays_within_its_precision(cell: str, options: dict[str, Any], method: str) -> None:
    layer = recurrent_layer(cell, 24, 40, method=method, **options)
    inputs, state = torch.randn(6, 33, 24), random_state(layer, 6)
    exact = run_with_gradients(layer, inputs, state)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run_with_gradients(layer, inputs, state)
    assert all(relative_error(mine, other) < 0.03 for mine, other in zip(rounded, exact, strict=True))
    assert any(not torch.equal(mine.float(), other) for mine, other in zip(rounded, exact, strict=True))


@all_cells
def test_the_state_keeps_the_parameters_type_under_autocast(cell: str, options: dict[str, Any]) -> None:
    layer = recurrent_layer(cell, 3, 4, **options)
    with torch.autocast("cpu", torch.bfloat16):
        _, after = layer(torch.randn(2, 5, 3), layer.initial_state(2))
    assert {value.dtype for value in after.values()} == {torch.float32}


@pytest.mark.parametrize("autocast", [False, True])
@all_cells
def test_two_runs_give_the_same_bits(cell: str, options: dict[str, Any], autocast: bool) -> None:
    layer = recurrent_layer(cell, 24, 40, **options)
    inputs, state = torch.randn(6, 33, 24), random_state(layer, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        runs = [run_with_gradients(layer, inputs, state) for _ in range(3)]
    for first, second in pairwise(runs):
        assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))


# --- memory -----------------------------------------------------------------------------------------------------------


@both_methods
@pytest.mark.parametrize("autocast", [False, True])
def test_open_forget_gate_and_closed_input_gate_leave_the_memory_unchanged(method: str, autocast: bool) -> None:
    layer = LSTM(3, 8, method=method)
    with torch.no_grad():
        layer.weight_input.zero_()
        layer.weight_hidden.zero_()
        layer.bias.zero_()
        layer.bias[:8] = -200  # i = 0
        layer.bias[8:16] = 200  # f = 1
        layer.weight_input[16:24].normal_()  # candidates that must not get in
    state = random_state(layer, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, after = layer(torch.randn(4, 50, 3), state)
    assert torch.equal(after["memory"], state["memory"])


@both_methods
def test_memory_counts_on_under_bfloat16_autocast(method: str) -> None:
    """Held in bfloat16 it stops at 0.5: an increment of 1/1000 is less than half the distance to the next number."""
    layer = LSTM(1, 1, method=method)
    with torch.no_grad():
        layer.weight_input.zero_()
        layer.weight_hidden.zero_()
        layer.bias.copy_(torch.tensor([-6.9067548, 200.0, 200.0, 200.0]))  # i = 0.001, f = 1, candidate = 1
    with torch.autocast("cpu", torch.bfloat16):
        _, after = layer(torch.zeros(1, 1000, 1), layer.initial_state(1))
    assert after["memory"].item() == pytest.approx(1.0, abs=0.02)


def test_forget_bias_is_an_option() -> None:
    assert LSTM(3, 4).bias[4:8].tolist() == [1.0] * 4
    assert LSTM(3, 4, forget_bias=2.5).bias[4:8].tolist() == [2.5] * 4
    assert LSTM(3, 4, forget_bias=None).bias[4:8].abs().max() <= 0.5
    assert LSTM(3, 4).bias[:4].abs().max() <= 0.5


# --- one pass, chunks, steps, rows ------------------------------------------------------------------------------------


@both_methods
@all_cells
def test_one_pass_equals_chunks_equals_single_steps(cell: str, options: dict[str, Any], method: str) -> None:
    layer = recurrent_layer(cell, 3, 5, method=method, **options)
    inputs, start = torch.randn(2, 11, 3), random_state(layer, 2)
    outputs, after = layer(inputs, start)
    for size in (4, 1):
        state, parts = start, []
        for chunk in inputs.split(size, dim=1):
            part, state = layer(chunk, state)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 1), outputs, atol=1e-6, rtol=1e-6)
        for name in after:
            torch.testing.assert_close(state[name], after[name], atol=1e-6, rtol=1e-6)


@both_methods
@all_cells
def test_a_row_does_not_see_the_others(cell: str, options: dict[str, Any], method: str) -> None:
    layer = recurrent_layer(cell, 3, 5, method=method, **options)
    inputs, state = torch.randn(4, 6, 3), random_state(layer, 4)
    outputs, after = layer(inputs, state)
    row = slice(2, 3)
    alone, alone_after = layer(inputs[row], {name: value[row] for name, value in state.items()})
    torch.testing.assert_close(alone, outputs[row], atol=1e-6, rtol=1e-6)
    for name in after:
        torch.testing.assert_close(alone_after[name], after[name][row], atol=1e-6, rtol=1e-6)


@both_methods
@all_cells
def test_the_future_does_not_change_the_past(cell: str, options: dict[str, Any], method: str) -> None:
    layer = recurrent_layer(cell, 3, 5, method=method, **options)
    inputs, state = torch.randn(2, 8, 3), random_state(layer, 2)
    changed = torch.cat([inputs[:, :5], torch.randn(2, 3, 3)], 1)
    torch.testing.assert_close(layer(inputs, state)[0][:, :5], layer(changed, state)[0][:, :5], atol=1e-6, rtol=1e-6)


# --- weight drop, errors ----------------------------------------------------------------------------------------------


@both_methods
@all_cells
def test_another_recurrent_matrix_can_be_given(cell: str, options: dict[str, Any], method: str) -> None:
    layer = recurrent_layer(cell, 3, 5, method=method, **options)
    inputs, state = torch.randn(2, 6, 3), random_state(layer, 2)
    mask = (torch.rand_like(layer.weight_hidden) < 0.5).float()
    before = layer.weight_hidden.detach().clone()
    outputs, _ = layer(inputs, state, layer.weight_hidden * mask)
    outputs.sum().backward()
    assert layer.weight_hidden.grad is not None
    assert torch.equal(layer.weight_hidden.grad * (1 - mask), torch.zeros_like(mask))
    assert layer.weight_hidden.grad.abs().sum() > 0
    assert torch.equal(layer.weight_hidden, before)
    with torch.no_grad():
        layer.weight_hidden.mul_(mask)
    torch.testing.assert_close(layer(inputs, state)[0], outputs)


def test_wrong_shapes_are_named() -> None:
    layer = LSTM(3, 5)
    with pytest.raises(ValueError, match=r"LSTM: inputs are \(2, 4, 7\), expected \[B,T,3\]"):
        layer(torch.randn(2, 4, 7), layer.initial_state(2))
    with pytest.raises(ValueError, match=r"T >= 1"):
        layer(torch.randn(2, 0, 3), layer.initial_state(2))
    with pytest.raises(ValueError, match=r"LSTM: hidden is \(1, 5\), expected \(2, 5\)"):
        layer(torch.randn(2, 4, 3), layer.initial_state(1))
    with pytest.raises(ValueError, match=r"LSTM: weight_hidden is \(5, 5\), expected \(20, 5\)"):
        layer(torch.randn(2, 4, 3), layer.initial_state(2), torch.zeros(5, 5))


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"cell is 'lstn', allowed: rnn, lstm, gru"):
        recurrent_layer("lstn", 3, 4)
    with pytest.raises(UserError, match=r"reset is 'between', allowed: 'before', 'after'"):
        recurrent_layer("gru", 3, 4, reset="between")


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(("cell", "options"), [case for case in CELLS if case[0] != "rnn"])
@both_methods
def test_masked_steps_leave_the_state_as_it_is(cell: str, options: dict[str, Any], method: Any, bfloat16: bool) -> None:
    torch.manual_seed(3)
    layer = recurrent_layer(cell, 5, 6, method=method, **options)
    inputs, lengths = torch.randn(4, 7, 5), [7, 4, 1, 0]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    state = random_state(layer, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        outputs, after = layer(inputs, state, mask=mask)
        for row, length in enumerate(lengths):
            start = {name: value[row : row + 1] for name, value in state.items()}
            alone, expected = layer(inputs[row : row + 1, :length], start) if length else (torch.empty(1, 0, 6), start)
            tolerance = 0.03 if bfloat16 else 1e-6
            torch.testing.assert_close(outputs[row, :length].float(), alone[0].float(), rtol=0, atol=tolerance)
            for name, value in expected.items():
                torch.testing.assert_close(after[name][row : row + 1], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_padding_in_front_leaves_the_zero_state(cell: str) -> None:
    torch.manual_seed(3)
    layer = recurrent_layer(cell, 5, 6)
    inputs = torch.randn(1, 9, 5)
    mask = torch.arange(9)[None] >= 4
    outputs, after = layer(inputs, layer.initial_state(1), mask=mask)
    alone, expected = layer(inputs[:, 4:], layer.initial_state(1))
    torch.testing.assert_close(outputs[:, 4:], alone)
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value)


def test_a_network_without_gates_cannot_hold_its_state() -> None:
    layer = recurrent_layer("rnn", 5, 6)
    with pytest.raises(UserError, match="no gate that could hold its state over padding; use lstm or gru"):
        layer(torch.randn(2, 3, 5), layer.initial_state(2), mask=torch.tensor([[True, True, False]] * 2))
