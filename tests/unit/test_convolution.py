"""Causal convolution: equal to torch's, and seeing exactly the steps that it should."""

import pytest
import torch
import torch.nn.functional as F

from unroll.layers.convolution import CausalConvolution, side_by_side


@pytest.mark.parametrize("kernel", [2, 3, 5])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_equals_conv1d_with_padding_on_the_left(kernel: int, dilation: int, length: int) -> None:
    """Outputs and all gradients are those of torch's conv1d on an input padded with zeros before its start."""
    layer = CausalConvolution(4, 6, kernel, dilation).double()
    inputs = torch.randn(3, length, 4, dtype=torch.float64, requires_grad=True)
    outputs, _ = layer(inputs, layer.initial_state(3, dtype=torch.float64))
    weight = layer.weight.unflatten(1, (kernel, 4)).transpose(1, 2)  # [C',C,k]
    padded = F.pad(inputs.transpose(1, 2), ((kernel - 1) * dilation, 0))
    expected = F.conv1d(padded, weight, layer.bias, dilation=dilation).transpose(1, 2)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(outputs)
    mine = torch.autograd.grad(outputs, [inputs, layer.weight, layer.bias], seed)
    theirs = torch.autograd.grad(expected, [inputs, layer.weight, layer.bias], seed)
    for ours, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_an_output_depends_on_exactly_the_dilated_steps() -> None:
    layer = CausalConvolution(2, 2, 3, 4)
    inputs = torch.randn(1, 20, 2, requires_grad=True)
    outputs, _ = layer(inputs, layer.initial_state(1))
    outputs[0, 15].sum().backward()
    assert inputs.grad is not None
    assert inputs.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [7, 11, 15]


def test_side_by_side_puts_the_oldest_first() -> None:
    steps = torch.arange(7.0).view(1, 7, 1)
    assert side_by_side(steps, 3, 2).tolist() == [[[0, 2, 4], [1, 3, 5], [2, 4, 6]]]


def test_weight_norm_starts_as_the_plain_layer_and_depends_on_direction_alone() -> None:
    """Weight normalisation changes how a layer learns, not what it computes at the start."""
    layer = CausalConvolution(3, 5, 2, weight_norm=True)
    inputs, state = torch.randn(2, 6, 3), layer.initial_state(2)
    plain = F.linear(side_by_side(F.pad(inputs, (0, 0, 1, 0)), 2, 1), layer.weight, layer.bias)
    torch.testing.assert_close(layer(inputs, state)[0], plain)
    with torch.no_grad():
        layer.weight *= 3.0
    torch.testing.assert_close(layer(inputs, state)[0], plain)


def test_state_keeps_its_type_under_autocast() -> None:
    """A carried state is saved in checkpoints and must not change its type from window to window."""
    layer = CausalConvolution(3, 3, 3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, state = layer(torch.randn(2, 1, 3, dtype=torch.bfloat16), layer.initial_state(2))
    assert outputs.dtype == torch.bfloat16
    assert state["past"].dtype == torch.float32
    assert state["past"].shape == (2, 4, 3)
