"""What the differentiable neural computer and the linear recurrence compute, by hand and against a plain loop."""

import pytest
import torch
from torch import Tensor

from unroll.layers import dnc, lru
from unroll.layers.scan import linear_scan
from unroll.layers.stories import distinct

T = torch.tensor


def test_allocation_prefers_the_least_used_slot() -> None:
    """Usage 0.5, 0, 1: the second slot is free and takes all that is written anew."""
    torch.testing.assert_close(dnc.allocation(T([[0.5, 0.0, 1.0]])), T([[0.0, 1.0, 0.0]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(dnc.allocation(T([[0.5, 0.25, 1.0]])), T([[0.125, 0.75, 0.0]]), atol=1e-5, rtol=0)


def test_links_follow_the_order_of_writing() -> None:
    """Written to slots 2, 0, 1 in turn: the link leads from 2 to 0 and from 0 to 1; what is read moves along it."""
    layer = dnc.Layer(1, 4, dnc.Config(slots=3, slot_width=2))
    state = layer.initial_state(1)
    links, precedence = state["links"], state["precedence"]
    for slot in (2, 0, 1):
        w = torch.eye(3)[slot][None]
        links = (1 - w[:, :, None] - w[:, None]) * links + w[:, :, None] * precedence[:, None]
        links = links * (1 - torch.eye(3))
        precedence = (1 - w.sum(-1, keepdim=True)) * precedence + w
    torch.testing.assert_close(torch.eye(3)[2] @ links[0].t(), torch.eye(3)[0])
    torch.testing.assert_close(torch.eye(3)[0] @ links[0].t(), torch.eye(3)[1])
    torch.testing.assert_close(torch.eye(3)[1] @ links[0], torch.eye(3)[0])


def test_usage_and_weightings_stay_between_nothing_and_all() -> None:
    layer = dnc.Layer(3, 8, dnc.Config(slots=6, slot_width=4, read_heads=2))
    _, state = layer(5 * torch.randn(4, 60, 3), layer.initial_state(4))
    for name in ("usage", "written", "weights", "links", "precedence"):
        assert state[name].min() >= -1e-5, name
        assert state[name].max() <= 1 + 1e-5, name
    for name in ("written", "weights", "precedence"):
        assert state[name].sum(-1).max() <= 1 + 1e-4, name
    assert torch.linalg.matrix_norm(state["links"], 1).max() <= 1 + 1e-4  # columns sum to at most 1
    assert torch.diagonal(state["links"], dim1=1, dim2=2).abs().max() == 0


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(3,), (7, 2, 3)])
def test_the_scan_is_the_loop_with_its_gradients(kind: torch.dtype, shape: tuple[int, ...]) -> None:
    decay = (0.9 * torch.rand(shape, dtype=kind)).requires_grad_()
    inputs, start = torch.randn(7, 2, 3, dtype=kind).requires_grad_(), torch.randn(2, 3, dtype=kind).requires_grad_()

    def loop(decay: Tensor, inputs: Tensor, start: Tensor) -> Tensor:
        states, before = [], start
        for t, row in enumerate(inputs):
            before = (decay[t] if decay.dim() == 3 else decay) * before + row
            states.append(before)
        return torch.stack(states)

    torch.testing.assert_close(linear_scan(decay, inputs, start), loop(decay, inputs, start))
    assert torch.autograd.gradcheck(linear_scan, (decay, inputs, start))


def test_the_linear_unit_remembers_over_a_thousand_steps() -> None:
    """Eigenvalues on the ring keep what was read at first: after 1,000 steps its trace is still there."""
    layer = lru.Layer(2, 16, lru.Config(slowest_from=0.9995, slowest_to=0.9999))
    first = torch.zeros(1, 1000, 2)
    first[0, 0, 0] = 1.0
    with torch.no_grad():
        _, seen = layer(first, layer.initial_state(1))
        _, nothing = layer(torch.zeros(1, 1000, 2), layer.initial_state(1))
        _, at_once = layer(first[:, :1], layer.initial_state(1))
    length = [sum(value.square().sum() for value in state.values()) for state in (seen, nothing, at_once)]
    assert length[0] > 0.3 * length[2]
    assert length[1] == 0


@pytest.mark.parametrize("words", [5, 2**20])
def test_sentences_that_say_the_same_are_one(words: int) -> None:
    """Also where so many words do not fit into one number."""
    sentences = torch.randint(5, (40, 2), generator=torch.Generator().manual_seed(1)).repeat(1, 3)  # [N,6]
    kept, number = distinct(sentences, words)
    assert torch.equal(kept[number], sentences)
    assert sorted(map(tuple, kept.tolist())) == sorted({tuple(row) for row in sentences.tolist()})
