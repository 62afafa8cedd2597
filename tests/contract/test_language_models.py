"""What every language model in `models/` must do, tried on each file's own `TINY` configurations.

A model is found by its file. A model that is fitted by counting (it has `fit`) is exempt from what concerns gradients
and regularisers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import unroll.models
from unroll.layers.dropout import dropout_place

VOCABULARY, ROWS, LENGTH = 11, 3, 23
ODD_CHUNKS = [1, 2, 7, 1, 5, 4, 3]
Configuration = tuple[str, dict[str, Any]]


def discover() -> list[Configuration]:
    """(file name, tiny configuration) of every model that has `step` and no encoder, i.e. every language model."""
    found = []
    for path in sorted(Path(unroll.models.__path__[0]).glob("[!_]*.py")):
        module = importlib.import_module(f"unroll.models.{path.stem}")
        if hasattr(module.Model, "step") and not hasattr(module.Model, "encode"):
            found += [(path.stem, tiny) for tiny in module.TINY]
    return found


ALL = discover()
NEURAL = [c for c in ALL if not hasattr(importlib.import_module(f"unroll.models.{c[0]}").Model, "fit")]


def name(configuration: Configuration) -> str:
    settings = [f"{key}={value}" for key, value in configuration[1].items() if not isinstance(value, dict)]
    return "-".join([configuration[0], *settings])


every_model = pytest.mark.parametrize("configuration", ALL, ids=name)
every_neural_model = pytest.mark.parametrize("configuration", NEURAL, ids=name)


def build(configuration: Configuration, dtype: torch.dtype = torch.float64) -> Any:
    """The model in evaluation mode, its parameters moved off symmetric or zero starts; a counting model is fitted."""
    torch.manual_seed(1)
    module = importlib.import_module(f"unroll.models.{configuration[0]}")
    model = module.Model(module.Config(**configuration[1]), VOCABULARY)
    if hasattr(model, "fit"):
        text = np.random.default_rng(0).integers(0, VOCABULARY, 500)
        model.fit(iter([text[:100], text[100:]]), lambda count: None)
        return model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def tokens(rows: int = ROWS, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


def run(model: Any, text: Tensor, state: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """What the model makes of each position, for tokens [B,T] from `state`: hidden [B,T,D], or, where there is none,
    the losses [B,T-1,1] of the tokens that come next."""
    state = model.initial_state(len(text)) if state is None else state
    if hasattr(model, "fit"):
        losses, state = model.log_loss(text[:, :-1], text[:, 1:], state)
        return losses.unsqueeze(-1), state
    output = model(text, state)
    return output.hidden, output.state


def test_discovery_finds_the_models() -> None:
    assert len({file for file, _ in ALL}) >= 3
    assert {file for file, _ in NEURAL} >= {"dilated_conv_lm", "feedforward_lm", "recurrent_lm"}


@every_neural_model
def test_shapes_of_outputs_and_state(configuration: Configuration) -> None:
    """Tasks flatten [B,T]; the loop slices and gathers states by row."""
    model = build(configuration)
    for rows, length in [(ROWS, LENGTH), (1, 1), (2, 2)]:
        text = tokens(rows, length)
        before = model.initial_state(rows)
        output = model(text, before)
        assert output.hidden.shape[:2] == (rows, length)
        assert model.output.log_loss(output.hidden.flatten(0, 1), text.flatten()).shape == (rows * length,)
        assert output.penalties == {}
        shapes = {name: (value.shape, value.dtype) for name, value in output.state.items()}
        assert shapes == {name: (value.shape, value.dtype) for name, value in before.items()}
        assert all(len(value) == rows for value in output.state.values())
    assert model.flops_per_token > 0


@every_model
def test_step_gives_a_distribution(configuration: Configuration) -> None:
    model = build(configuration)
    log_probabilities, state = model.step(tokens()[:, 0], model.initial_state(ROWS))
    assert log_probabilities.shape == (ROWS, VOCABULARY)
    torch.testing.assert_close(log_probabilities.exp().sum(-1).double(), torch.ones(ROWS).double(), atol=1e-5, rtol=0)
    assert all(len(value) == ROWS for value in state.values())


@every_neural_model
@torch.no_grad()
def test_one_pass_is_chunks_is_steps(configuration: Configuration) -> None:
    """A text scored in windows, in one go or while it is generated gets one and the same score."""
    model, text = build(configuration), tokens()
    whole, last = run(model, text)
    for sizes in (ODD_CHUNKS, [1] * LENGTH):
        parts, state = [], model.initial_state(ROWS)
        for chunk in text.split(sizes, dim=1):
            hidden, state = run(model, chunk, state)
            parts.append(hidden)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
        for key, value in last.items():
            torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-9)


@every_model
@torch.no_grad()
def test_the_loss_is_that_of_the_steps(configuration: Configuration) -> None:
    """What evaluation reports is what the generator samples from."""
    model, text = build(configuration), tokens()
    if hasattr(model, "fit"):
        losses, _ = model.log_loss(text[:, :-1], text[:, 1:], model.initial_state(ROWS))
    else:
        hidden, _ = run(model, text[:, :-1])
        losses = model.output.log_loss(hidden.flatten(0, 1), text[:, 1:].flatten()).view(ROWS, -1)
    state = model.initial_state(ROWS)
    for position in range(LENGTH - 1):
        log_probabilities, state = model.step(text[:, position], state)
        expected = -log_probabilities.gather(1, text[:, position + 1, None])[:, 0]
        torch.testing.assert_close(losses[:, position].double(), expected.double(), rtol=1e-5, atol=1e-5)


@every_model
@torch.no_grad()
def test_the_future_never_changes_the_past(configuration: Configuration) -> None:
    """A model that sees what it predicts reports a perplexity that nobody can reach."""
    model, text = build(configuration), tokens()
    changed = text.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % VOCABULARY
    seen = 11 if hasattr(model, "fit") else 12
    before, after = run(model, text)[0], run(model, changed)[0]
    torch.testing.assert_close(before[:, :seen], after[:, :seen], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, seen:], after[:, seen:])


@every_model
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(configuration: Configuration) -> None:
    """A text gets the same score alone and in a batch, also when it goes on from a sliced state."""
    model, text = build(configuration), tokens()
    first, state = run(model, text[:, :9])
    second, _ = run(model, text[:, 9:], state)
    for row in range(ROWS):
        mine = slice(row, row + 1)
        torch.testing.assert_close(run(model, text[mine, :9])[0], first[mine], rtol=1e-9, atol=1e-9)
        sliced = {name: value[mine] for name, value in state.items()}
        torch.testing.assert_close(run(model, text[mine, 9:], sliced)[0], second[mine], rtol=1e-9, atol=1e-9)


@every_neural_model
def test_gradient_reaches_every_parameter(configuration: Configuration) -> None:
    """A parameter without gradient is trained by nobody."""
    model, text = build(configuration).train(), tokens(6)
    output = model(text[:, :-1], model.initial_state(6))
    model.output.total_log_loss(output.hidden.flatten(0, 1), text[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@every_model
@torch.no_grad()
def test_weights_saved_and_loaded_give_the_same_output(configuration: Configuration, tmp_path: Path) -> None:
    """An exported model is the trained one."""
    model, text = build(configuration), tokens()
    file = str(tmp_path / "weights.safetensors")
    save_file({key: value.clone() for key, value in model.state_dict().items()}, file)
    module = importlib.import_module(f"unroll.models.{configuration[0]}")
    fresh = module.Model(module.Config(**configuration[1]), VOCABULARY)
    fresh.load_state_dict(load_file(file))
    if configuration in NEURAL:
        fresh.to(torch.float64)
    assert torch.equal(run(fresh.eval(), text)[0], run(model, text)[0])


@every_neural_model
def test_autocast_runs_and_stays_near(configuration: Configuration) -> None:
    """bf16 training computes the same function, with gradients, in states of the parameters' own type."""
    model, text = build(configuration, torch.float32), tokens()
    exact, exact_state = run(model, text)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, state = run(model, text)
        model.output.total_log_loss(hidden.flatten(0, 1), text.flatten()).backward()
    assert (hidden.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert {key: value.dtype for key, value in state.items()} == {k: v.dtype for k, v in exact_state.items()}


def dropouts(configuration: Configuration) -> list[str]:
    """Keys of the configuration that ask for dropout."""
    dropout = configuration[1].get("dropout", 0.0)
    if isinstance(dropout, dict):
        return [key for key, p in dropout.items() if p]
    return [key for key in ("dropout", "token_dropout") if configuration[1].get(key)]


@every_neural_model
@torch.no_grad()
def test_dropout_acts_in_training_and_only_there(configuration: Configuration) -> None:
    """Dropout that drops nothing, and dropout that goes on in evaluation, both pass a training run unnoticed."""
    model, text = build(configuration).train(), tokens()
    first, second = run(model, text)[0], run(model, text)[0]
    assert torch.equal(first, second) == (not dropouts(configuration))
    model.eval()
    assert torch.equal(run(model, text)[0], run(model, text)[0])


@pytest.mark.parametrize("kind", ["embedding", "input", "between", "output", "weight"])
@torch.no_grad()
def test_each_kind_of_dropout_of_a_recurrent_model_acts(kind: str) -> None:
    """Each of the five settings does something of its own (awd-lstm-lm once shipped a weight drop that did nothing)."""
    plain = build(("recurrent_lm", {"layers": 2, "width": 6})).train()
    model = build(("recurrent_lm", {"layers": 2, "width": 6, "dropout": {kind: 0.5}})).train()
    text = tokens()
    assert not torch.allclose(run(model, text)[0], run(plain, text)[0])
    assert torch.equal(run(model.eval(), text)[0], run(plain.eval(), text)[0])


@torch.no_grad()
def test_penalties_are_means_over_the_window_in_training_alone() -> None:
    """AR and TAR as Merity et al. define them, on outputs of one layer of which nothing is dropped."""
    settings = {"layers": 1, "width": 6, "activation_penalty": 2.0, "temporal_penalty": 3.0}
    model, text = build(("recurrent_lm", settings)).train(), tokens()
    output = model(text, model.initial_state(ROWS))
    activation = 2.0 * output.hidden.square().mean()
    temporal = 3.0 * (output.hidden[:, 1:] - output.hidden[:, :-1]).square().mean()
    torch.testing.assert_close(output.penalties["activation"].double(), activation, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.penalties["temporal"].double(), temporal, rtol=1e-5, atol=0)
    assert output.penalties["temporal"] > 0
    assert "temporal" not in model(text[:, :1], model.initial_state(ROWS)).penalties
    assert model.eval()(text, model.initial_state(ROWS)).penalties == {}


@every_neural_model
@torch.no_grad()
def test_two_workers_drop_what_one_drops(configuration: Configuration) -> None:
    """The result of a training step does not depend on how its rows are shared out."""
    model, text = build(configuration).train(), tokens(5)
    with dropout_place(seed=4, step=9, first_row=0, total_rows=5):
        whole, _ = run(model, text)
    parts = []
    for first, last in [(0, 2), (2, 5)]:
        with dropout_place(seed=4, step=9, first_row=first, total_rows=5):
            parts.append(run(model, text[first:last])[0])
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_feedforward_equals_the_equation_of_its_paper() -> None:
    """softmax(b + W x + U tanh(d + H x)) on the n-1 words that end with the present one."""
    model, text = build(("feedforward_lm", {"order": 4, "embedding": 3, "width": 5})), tokens()
    log_probabilities = model.output.log_probabilities(run(model, text)[0])
    for t in (0, 1, 9):
        words = torch.cat([torch.full((ROWS, 3), VOCABULARY), text[:, : t + 1]], 1)[:, -3:]
        x = model.embed.weight[words].flatten(1)  # [B,(n-1)*D]
        u, w = model.output.weight.split([5, 9], dim=1)
        hidden = torch.tanh(model.hidden.bias + x @ model.hidden.weight.T)
        expected = (model.output.bias + x @ w.T + hidden @ u.T).log_softmax(-1)
        torch.testing.assert_close(log_probabilities[:, t].double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_residual_connections_add_a_layer_s_input_from_the_second_on() -> None:
    model, text = build(("recurrent_lm", {"layers": 3, "width": 6, "embedding": 4, "residual": True})), tokens()
    expected = model.layers[0](model.embed(text), model.layers[0].initial_state(ROWS))[0]
    for layer in model.layers[1:]:
        expected = expected + layer(expected, layer.initial_state(ROWS))[0]
    torch.testing.assert_close(run(model, text)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", ["gated", "bytenet", "tcn"])
@torch.no_grad()
def test_blocks_equal_the_equations_of_their_papers(block: str) -> None:
    """Two blocks of each kind, written out with torch's own convolution."""
    settings = {"block": block, "width": 6, "kernel": 3, "dilations": [1, 2], "layer_norm": block == "gated"}
    model, text = build(("dilated_conv_lm", settings)), tokens()
    relu = torch.relu

    def convolve(layer: Any, x: Tensor) -> Tensor:
        weight = (
            layer.weight
            if layer.gain is None
            else layer.gain[:, None] * layer.weight / layer.weight.norm(dim=1)[:, None]
        )
        weight = weight.unflatten(1, (3, -1)).transpose(1, 2)  # [C',C,k]
        padded = torch.nn.functional.pad(x.transpose(1, 2), (2 * layer.dilation, 0))
        return torch.nn.functional.conv1d(padded, weight, layer.bias, dilation=layer.dilation).transpose(1, 2)

    x, skips = model.embed(text), torch.zeros(1, dtype=torch.float64)
    for part in model.blocks:
        if block == "gated":
            content, gate = convolve(part.convolution, part.norm(x)).chunk(2, -1)
            z = torch.tanh(content) * torch.sigmoid(gate)
            x, skips = x + (part.residual(z) if part.residual else 0), skips + part.skip(z)
        elif block == "bytenet":
            inner = part.block
            z = inner.norm_narrow(inner.narrow(relu(inner.norm_in(x))))
            x = x + inner.widen(relu(inner.norm_out(convolve(inner.convolution, relu(z)))))
        else:
            x = relu(x + relu(convolve(part.second, relu(convolve(part.first, x)))))
    expected = {"gated": relu(model.finish(relu(skips))), "bytenet": relu(model.norm(x)), "tcn": x}[block]
    torch.testing.assert_close(run(model, text)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", ["gated", "bytenet", "tcn"])
@torch.no_grad()
def test_dropout_of_a_convolutional_model_acts_at_every_place(block: str) -> None:
    """Embedding, every block and the hidden vector: one mask each, two for a block of the TCN."""
    model = build(("dilated_conv_lm", {"block": block, "width": 6, "dilations": [1, 2, 4], "dropout": 0.5})).train()
    masks: list[int] = []
    for layer in model.modules():
        if type(layer).__name__ == "Dropout":
            layer.register_forward_hook(lambda layer, before, after: masks.append(int((after == 0).sum())))
    hidden, _ = run(model, tokens(20))
    assert len(masks) == (8 if block == "tcn" else 5)
    assert min(masks) > 0.4 * 20 * LENGTH * min(6, model.config.inside)
    assert (hidden == 0).double().mean() > 0.45


@torch.no_grad()
def test_the_receptive_field_is_exact() -> None:
    """A dilated model depends on `receptive_field` tokens, and on no token before them."""
    for configuration in [c for c in NEURAL if c[0] == "dilated_conv_lm"]:
        model = build(configuration)
        field = model.receptive_field
        text = tokens(200, field + 4)
        for back, reaches in [(field - 1, True), (field, False)]:
            changed = text.clone()
            changed[:, -1 - back] = (changed[:, -1 - back] + 1) % VOCABULARY
            same = torch.equal(run(model, changed)[0][:, -1], run(model, text)[0][:, -1])
            assert same != reaches, configuration


@torch.no_grad()
def test_a_dilated_recurrent_layer_equals_the_loop_of_its_paper() -> None:
    """Folding time into the batch computes h_t = cell(x_t, h_{t-d}), step by step."""
    from unroll.layers.recurrent import LSTM
    from unroll.models.recurrent_lm import DilatedLayer

    cell = LSTM(4, 5).double()
    layer = DilatedLayer(cell, 3)
    inputs = torch.randn(2, 14, 4, dtype=torch.float64)
    outputs, _ = layer(inputs, layer.initial_state(2))
    states = [cell.initial_state(2) for _ in range(3)]
    for t in range(14):
        expected, state = cell(inputs[:, t : t + 1], states[t])
        states.append(state)
        torch.testing.assert_close(outputs[:, t : t + 1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("recurrent_lm", {"cell": "lstm", "reset": "after"}, "reset: only cell gru has it"),
        ("recurrent_lm", {"cell": "gru", "forget_bias": 2.0}, "forget_bias: only cell lstm has it"),
        ("recurrent_lm", {"layers": 2, "dilations": [1]}, "one number >= 1 for each of 2 layers"),
        ("recurrent_lm", {"tied": True, "cutoffs": [5]}, "cannot be tied"),
        ("recurrent_lm", {"tied": True, "residual": True, "embedding": 4, "width": 5}, "embedding and width"),
        ("dilated_conv_lm", {"dilations": [1, 0]}, "found 0, allowed is 1 and more"),
        ("dilated_conv_lm", {"block": "tcn", "layer_norm": True}, "layer_norm"),
        ("dilated_conv_lm", {"tied": True, "cutoffs": [5]}, "cannot be tied"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(file: str, settings: dict[str, Any], message: str) -> None:
    """A setting without effect would be reported as if it had been tried."""
    with pytest.raises(ValueError, match=message):
        importlib.import_module(f"unroll.models.{file}").Config(**settings)
