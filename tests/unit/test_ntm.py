"""Neural Turing machine: addressing against vectors worked out by hand, and the fast path against autograd."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from unroll.config import check
from unroll.errors import UserError
from unroll.layers import ntm
from unroll.layers.ntm import Config, Layer, address
from unroll.models import recurrent_lm, recurrent_network

T = torch.tensor


def looked(
    memory: Tensor, before: Tensor, key: Tensor, beta: float, gate: float, shifts: Tensor, gamma: float
) -> Tensor:
    """One head on one row."""
    one = [x.double()[None, None] for x in (before, key, shifts)]
    scalars = [T([[value]], dtype=torch.float64) for value in (beta, gate, gamma)]
    return address(memory.double()[None], one[0], one[1], scalars[0], scalars[1], one[2], scalars[2])[0, 0]


STAY = T([0.0, 1.0, 0.0])
MEMORY = T([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])


def test_content_is_a_softmax_over_cosines() -> None:
    """Cosines of (3, 0) with the slots are 1, 0, -1; with beta 2 the weights are e^2, 1, e^-2."""
    found = looked(MEMORY, T([0.0, 1.0, 0.0]), T([3.0, 0.0]), beta=2.0, gate=1.0, shifts=STAY, gamma=1.0)
    expected = T([math.exp(2), 1.0, math.exp(-2)], dtype=torch.float64)
    torch.testing.assert_close(found, expected / expected.sum(), atol=1e-5, rtol=0)


def test_a_shut_gate_keeps_the_place_and_shifts_move_it_around_the_end() -> None:
    """0.7 of the weight moves one slot on and 0.2 one back: asymmetric, and slot 3 is followed by slot 0."""
    memory, before = torch.ones(4, 2), T([0.0, 0.0, 0.25, 0.75])
    found = looked(memory, before, T([1.0, 1.0]), beta=1.0, gate=0.0, shifts=T([0.2, 0.1, 0.7]), gamma=1.0)
    expected = T([0.7 * 0.75, 0.2 * 0.25, 0.1 * 0.25 + 0.2 * 0.75, 0.1 * 0.75 + 0.7 * 0.25], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_first_shift_moves_back_by_the_furthest() -> None:
    before = T([1.0, 0.0, 0.0, 0.0, 0.0])
    for place, slot in enumerate([3, 4, 0, 1, 2]):
        shifts = torch.eye(5)[place]
        found = looked(torch.ones(5, 2), before, T([1.0, 1.0]), beta=1.0, gate=0.0, shifts=shifts, gamma=1.0)
        torch.testing.assert_close(found, torch.eye(5, dtype=torch.float64)[slot], atol=1e-6, rtol=0)


def test_the_gate_mixes_and_gamma_sharpens() -> None:
    """Half of (0.5, 0.5) and half of (0.9, 0.1) is (0.7, 0.3), whose squares stand in the ratio 49 to 9."""
    memory = T([[1.0, 1.0], [1.0, 1.0]])
    found = looked(memory, T([0.9, 0.1]), T([1.0, 1.0]), beta=5.0, gate=0.5, shifts=T([1.0]), gamma=2.0)
    torch.testing.assert_close(found, T([49 / 58, 9 / 58], dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_write_erases_and_adds_where_the_head_looks() -> None:
    """m = m (1 - w e) + w a, with two heads: both erase, both add."""
    memory = T([[[1.0, 2.0], [3.0, 4.0]]])
    weightings, erase = T([[[1.0, 0.0], [0.5, 0.5]]]), T([[[1.0, 0.0], [0.0, 1.0]]])
    add = T([[[5.0, 6.0], [2.0, 0.0]]])
    out = torch.empty_like(memory)
    ntm.kernels._write(memory, weightings, erase, add, out)
    expected = T([[[1 * 0 * 1 + 5 + 1, 2 * 1 * 0.5 + 6], [3 + 1, 4 * 0.5]]])
    torch.testing.assert_close(out, expected)


CASES = [
    {"controller": controller, "read_heads": reading, "write_heads": writing, "shift": shift, "initial": initial}
    for controller, (reading, writing), shift, initial in itertools.product(
        ["lstm", "feedforward"], [(1, 1), (2, 1), (1, 2), (3, 3)], [0, 1, 2], ["constant", "learnt"]
    )
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_fast_path_is_the_equations_with_their_gradients(options: dict[str, Any]) -> None:
    found = []
    for method in ("fast", "loop"):
        torch.manual_seed(3)
        layer = Layer(4, 5, Config(slots=7, slot_width=3, method=method, **options)).double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        inputs = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
        state = {name: (value + 0.1 * torch.rand_like(value)).detach().requires_grad_()
                 for name, value in layer.initial_state(3).items()}  # fmt: skip
        outputs, after = layer(inputs, state)
        results = [outputs, *(after[name] for name in sorted(after))]
        loss = sum((result * torch.randn_like(result)).sum() for result in results)
        wanted = [inputs, *(p for name, p in layer.named_parameters() if "starts" not in name), *state.values()]
        found.append([*results, *torch.autograd.grad(loss, wanted)])
    for fast, loop in zip(*found, strict=True):
        torch.testing.assert_close(fast, loop, rtol=1e-9, atol=1e-12)


def test_without_gradients_no_step_is_kept_and_nothing_changes() -> None:
    layer = Layer(4, 5, Config(slots=7, slot_width=3))
    inputs, state = torch.randn(2, 9, 4), layer.initial_state(2)
    before = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        outputs, after = layer(inputs, state)
    expected, expected_after = layer(inputs, state)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(after, expected_after)
    torch.testing.assert_close(state, before, rtol=0, atol=0)  # the state that goes in is not written on


def test_weightings_are_distributions() -> None:
    layer = Layer(4, 5, Config(slots=128, slot_width=20))
    _, after = layer(10 * torch.randn(2, 50, 4), layer.initial_state(2))
    torch.testing.assert_close(after["weights"].sum(-1), torch.ones(2, 2))
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"cell": "ntm", "options": {"slots": 4, "shift": 2}},
            "options of ntm.: shift: 2 passes its own start in 4 slots",
        ),
        ({"cell": "ntm", "options": {"slot": 4}}, "options of ntm.slot: unknown key 'slot'; did you mean 'slots'?"),
        (
            {"cell": "ntm", "options": {"read_heads": 0}},
            "options of ntm.read_heads: Input should be greater than or equal",
        ),
        ({"cell": "ntn"}, "cell is none of rnn, lstm, gru: no layers/ntn.py; did you mean 'ntm'?"),
        ({"cell": "lstm", "options": {"slots": 4}}, "options: cell lstm has none here"),
        ({"cell": "attention"}, "layers/attention.py has no Layer"),
    ],
)
@pytest.mark.parametrize("kind", [recurrent_lm.Config, recurrent_network.Config])
def test_cells_and_options_that_make_no_sense_are_refused_in_one_line(
    kind: Any, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        check(kind, model, "recipes.r.model")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_sharpness_is_where_beta_starts_and_nothing_else() -> None:
    """Without it every content weighting is nearly the same at first, and priority sort is learnt a worse way."""
    layers = []
    for sharpness in (0.0, 3.0):
        torch.manual_seed(1)
        layers.append(Layer(4, 6, Config(slots=7, slot_width=3, sharpness=sharpness)))
    plain, sharp = (layer.heads.split(layer.bias_heads) for layer in layers)
    assert torch.allclose(sharp.beta, plain.beta + 3.0)
    for name in ("key", "add", "erase", "gate", "gamma", "shifts"):
        assert torch.equal(getattr(sharp, name), getattr(plain, name))
