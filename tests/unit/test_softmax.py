"""The output layers' losses and gradients against torch's own, in chunks of every size."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unroll.errors import UserError
from unroll.layers import softmax
from unroll.layers.softmax import AdaptiveSoftmax, Softmax

SIZES = [(1, 1, 2), (1, 3, 5), (7, 5, 11), (33, 17, 101)]  # N, D, V


@pytest.fixture(params=["one chunk", "small chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at once, or chunks of a few rows whose softmax goes row by row or two by two."""
    if request.param == "small chunks":
        monkeypatch.setattr(softmax, "CHUNK", 1010)
        monkeypatch.setattr(softmax, "BLOCK", 202)


def random_case(count: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states [N,D] that want gradients, and targets [N] of which every third is masked."""
    targets = torch.randint(vocabulary, (count,))
    targets[1::3] = -1
    return torch.randn(count, width, dtype=dtype).requires_grad_(), targets


def gradients(loss: Tensor, layer: nn.Module, hidden: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *layer.parameters()]))


def adaptive_twin(layer: AdaptiveSoftmax) -> nn.AdaptiveLogSoftmaxWithLoss:
    """torch's layer, sharing our parameters."""
    twin = nn.AdaptiveLogSoftmaxWithLoss(layer.width, layer.vocabulary, layer.cutoffs, div_value=4.0)
    twin.head.weight = layer.head.weight
    for tail, projection, words in zip(twin.tail, layer.projections, layer.words, strict=True):
        tail[0].weight, tail[1].weight = projection.weight, words.weight
    return twin


# --- full softmax -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_equals_torch(size: tuple[int, int, int], smoothing: float) -> None:
    count, width, vocabulary = size
    layer = Softmax(width, vocabulary).double()
    assert layer.bias is not None
    nn.init.normal_(layer.bias)
    hidden, targets = random_case(count, width, vocabulary, torch.float64)
    logits = F.linear(hidden, layer.weight, layer.bias)
    expected = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
    found = layer.total_log_loss(hidden, targets, smoothing)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(found, layer, hidden), gradients(expected, layer, hidden), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(layer.total_log_loss(hidden, targets, smoothing), expected)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_equal_torch_cross_entropy(
    size: tuple[int, int, int], bias: bool, dtype: torch.dtype
) -> None:
    count, width, vocabulary = size
    layer = Softmax(width, vocabulary, bias=bias).to(dtype)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    hidden, targets = random_case(count, width, vocabulary, dtype)
    logits = F.linear(hidden, layer.weight, layer.bias)
    expected = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    weights = torch.linspace(0.5, 2.0, count, dtype=dtype)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-10}

    losses = layer.log_loss(hidden, targets)
    torch.testing.assert_close(losses, expected, **tolerance)
    pairs = [
        (losses @ weights, expected @ weights),
        (0.3 * layer.total_log_loss(hidden, targets), 0.3 * expected.sum()),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, **tolerance)
        want = torch.autograd.grad(theirs, [hidden, *layer.parameters()], retain_graph=True)
        for mine, other in zip(gradients(ours, layer, hidden), want, strict=True):
            torch.testing.assert_close(mine, other, **tolerance)


@pytest.mark.usefixtures("chunks")
def test_a_tied_matrix_gathers_the_gradients_of_both_uses() -> None:
    embedding = nn.Embedding(11, 5)
    layer = Softmax(5, 11, tied=embedding)
    assert layer.weight is embedding.weight
    tokens, targets = torch.randint(11, (7,)), torch.randint(11, (7,))
    layer.total_log_loss(embedding(tokens), targets).backward()
    found = embedding.weight.grad
    embedding.weight.grad = None
    F.cross_entropy(embedding(tokens) @ embedding.weight.T, targets, reduction="sum").backward()
    assert found is not None
    assert embedding.weight.grad is not None
    torch.testing.assert_close(found, embedding.weight.grad)


def test_log_probabilities_agree_with_the_loss_and_sum_to_one() -> None:
    hidden, targets = torch.randn(2, 6, 5), torch.randint(60, (2, 6))
    for layer in (Softmax(5, 60), AdaptiveSoftmax(5, 60, [10, 30])):
        log_probabilities = layer.log_probabilities(hidden)  # [2,6,V]
        assert log_probabilities.shape == (2, 6, 60)
        torch.testing.assert_close(log_probabilities.exp().sum(-1), torch.ones(2, 6))
        picked = -log_probabilities.gather(-1, targets[..., None]).flatten()
        torch.testing.assert_close(layer.log_loss(hidden.flatten(0, 1), targets.flatten()), picked)


# --- adaptive softmax -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("cutoffs", [[10], [20, 77]])
def test_adaptive_softmax_equals_torch(cutoffs: list[int]) -> None:
    layer = AdaptiveSoftmax(17, 101, cutoffs)
    twin = adaptive_twin(layer)
    hidden = torch.randn(65, 17, requires_grad=True)
    targets = torch.randint(101, (65,))
    expected = twin(hidden, targets).output.neg()
    torch.testing.assert_close(layer.log_probabilities(hidden), twin.log_prob(hidden))
    torch.testing.assert_close(layer.log_loss(hidden, targets), expected)
    want = gradients(0.3 * expected.sum(), layer, hidden)
    for loss in (layer.log_loss(hidden, targets).sum(), layer.total_log_loss(hidden, targets)):
        for mine, other in zip(gradients(0.3 * loss, layer, hidden), want, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_adaptive_softmax_masks_targets_and_leaves_unused_clusters_a_zero_gradient() -> None:
    """Without a gradient for an unused cluster, a worker that sees none of its words would not take part in the sum."""
    layer = AdaptiveSoftmax(8, 50, [10, 30])
    hidden = torch.randn(4, 8, requires_grad=True)
    targets = torch.tensor([3, -1, 12, -1])
    losses = layer.log_loss(hidden, targets)
    assert losses[[1, 3]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(layer.total_log_loss(hidden, targets), losses.sum())
    layer.total_log_loss(hidden, targets).backward()
    assert hidden.grad is not None
    assert hidden.grad[[1, 3]].abs().sum() == 0
    assert layer.words[1].weight.grad is not None
    assert layer.words[1].weight.grad.abs().sum() == 0
    assert layer.words[0].weight.grad.abs().sum() > 0


def test_adaptive_softmax_has_narrower_spaces_for_rarer_words() -> None:
    layer = AdaptiveSoftmax(64, 1000, [100, 300, 600])
    assert layer.head.weight.shape == (103, 64)
    assert [tuple(p.weight.shape) for p in layer.projections] == [(16, 64), (4, 64), (1, 64)]
    assert [tuple(w.weight.shape) for w in layer.words] == [(200, 16), (300, 4), (400, 1)]


# --- both -------------------------------------------------------------------------------------------------------------

LAYERS = [Softmax(24, 101), AdaptiveSoftmax(24, 101, [10, 40])]
both_layers = pytest.mark.parametrize("layer", LAYERS, ids=["full", "adaptive"])


@both_layers
@pytest.mark.usefixtures("chunks")
def test_bfloat16_autocast_stays_within_its_precision(layer: Softmax | AdaptiveSoftmax) -> None:
    hidden, targets = random_case(65, 24, 101)
    exact = layer.total_log_loss(hidden, targets)
    want = gradients(exact, layer, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer.total_log_loss(hidden, targets)
        losses = layer.log_loss(hidden, targets)
    assert rounded.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0, rtol=1e-3)
    torch.testing.assert_close(losses.sum(), exact, atol=0, rtol=1e-3)
    assert rounded.item() != exact.item()  # or the fast path was not taken
    for mine, other in zip(gradients(rounded, layer, hidden), want, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - other).norm() < 0.02 * other.norm()


@both_layers
def test_without_gradients_the_sum_is_the_same(layer: Softmax | AdaptiveSoftmax) -> None:
    hidden, targets = random_case(9, 24, 101)
    with torch.no_grad():
        total = layer.total_log_loss(hidden, targets)
    assert not total.requires_grad
    torch.testing.assert_close(total, layer.total_log_loss(hidden, targets).detach())


@both_layers
@pytest.mark.parametrize("autocast", [False, True])
def test_two_runs_give_the_same_bits(layer: Softmax | AdaptiveSoftmax, autocast: bool) -> None:
    hidden, targets = random_case(65, 24, 101)
    runs = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = layer.total_log_loss(hidden, targets)
        runs.append([total.detach(), *gradients(total, layer, hidden)])
    for first, second in pairwise(runs):
        assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))


@both_layers
def test_a_batch_without_targets_costs_nothing_and_teaches_nothing(layer: Softmax | AdaptiveSoftmax) -> None:
    hidden = torch.randn(3, 24, requires_grad=True)
    total = layer.total_log_loss(hidden, torch.full((3,), -1))
    assert total.item() == 0.0
    assert all(gradient.abs().sum() == 0 for gradient in gradients(total, layer, hidden))
    assert layer.total_log_loss(hidden[:0], torch.zeros(0, dtype=torch.int64)).item() == 0.0


@pytest.mark.parametrize("autocast", [False, True])
def test_a_target_of_vanishing_probability_has_its_exact_loss(autocast: bool) -> None:
    """exp(-1000) is 0 in float32, but the loss is 1000, not infinite."""
    layer = Softmax(1, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0], [1000.0], [0.0]]))
    hidden = torch.ones(2, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total = layer.total_log_loss(hidden, torch.tensor([0, 1]))
    assert total.item() == 1000.0
    assert torch.isfinite(gradients(total, layer, hidden)[0]).all()


def test_logits_are_made_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch ten times as large must not need ten times the memory for its logits."""
    made = []
    original = softmax._logits_to_gradients
    monkeypatch.setattr(softmax, "CHUNK", 1000)
    monkeypatch.setattr(
        softmax, "_logits_to_gradients", lambda x, *rest: (made.append(x.numel()), original(x, *rest))[1]
    )
    hidden, targets = random_case(65, 24, 101)
    LAYERS[0].total_log_loss(hidden, targets)
    assert sum(made) == 65 * 101
    assert max(made) <= 1000


def test_a_second_backward_pass_is_refused() -> None:
    hidden, targets = random_case(7, 24, 101)
    total = LAYERS[0].total_log_loss(hidden, targets)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the backward pass may run once"):
        total.backward()


def test_bad_options_are_named() -> None:
    with pytest.raises(UserError, match=r"cutoffs are \[30, 10\], they must rise between 1 and 49"):
        AdaptiveSoftmax(8, 50, [30, 10])
    with pytest.raises(UserError, match=r"cutoffs are \[50\], they must rise between 1 and 49"):
        AdaptiveSoftmax(8, 50, [50])
    with pytest.raises(UserError, match=r"the embedding is \(50, 4\), it must be \(50, 8\)"):
        Softmax(8, 50, tied=nn.Embedding(50, 4))
