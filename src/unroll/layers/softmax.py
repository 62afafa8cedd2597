"""Output layers of language models: the full softmax and the adaptive softmax, with their log-loss in nats.

Full softmax over V words, with h the hidden state, w_v and b_v the row of the matrix and the bias of word v:

    log p(v | h) = h . w_v + b_v - log sum_u exp(h . w_u + b_u)

Adaptive softmax (Grave et al. 2017, arXiv:1609.04309): words in order of frequency, cut at c_1 < c_2 < ... The head
holds the first c_1 words and an entry for each later cluster k, whose words are told apart in a space `division`^k
times narrower, into which P_k projects:

    log p(v | h) = log p_head(v | h)                                       v < c_1
    log p(v | h) = log p_head(cluster k | h) + log p_k(v | P_k h)          c_k <= v < c_{k+1}

Both have `log_probabilities` for decoding, `log_loss` for each token and `total_log_loss`, its sum, for training.

How the sum is made fast (after Liger Kernel, and Cut Cross-Entropy, arXiv:2411.09009): the gradients of hidden states
and matrix are computed in the forward pass, chunk by chunk, from the probabilities that are at hand there; the backward
pass only scales them. So [N,V] exists for no more tokens than fit a chunk, no logits are kept or computed twice, and
the softmax itself runs over blocks of rows that fit the cache. The bias is one more column of the matrix, against a
column of ones in h: so it and its gradient cost no pass over the logits.

Numerics under bfloat16 autocast: matrix products in bfloat16 with float32 sums inside, as autocast's own; softmax, loss
and the loss's sum in float32; the weights' gradient is rounded to bfloat16 once a chunk and added up in float32.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unroll.errors import UserError

CHUNK = 1 << 25
"""Most logits held at a time: 64 MiB in bfloat16."""
BLOCK = 1 << 20
"""Logits whose softmax is taken at a time on a CPU: 4 MiB in float32, so that they stay in the cache."""


class Softmax(nn.Module):
    """Full softmax over `vocabulary` words; `tied` shares the embedding's matrix.

    Raises UserError if that is not [V,D].
    """

    def __init__(self, width: int, vocabulary: int, tied: nn.Embedding | None = None, bias: bool = True) -> None:
        super().__init__()
        if tied is not None and tied.weight.shape != (vocabulary, width):
            found = tuple(tied.weight.shape)
            raise UserError(f"tied softmax: the embedding is {found}, it must be ({vocabulary}, {width})")
        self.width, self.vocabulary = width, vocabulary
        self.weight = nn.Parameter(torch.empty(vocabulary, width)) if tied is None else tied.weight  # [V,D]
        self.bias = nn.Parameter(torch.zeros(vocabulary)) if bias else None  # [V]
        if tied is None:
            nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """[...,D] -> [...,V] in float32."""
        return _log_softmax(F.linear(hidden, self.weight, self.bias))

    def log_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """-log p of `targets` [N] given `hidden` [N,D]: [N] float32, 0 where the target is -1."""
        return token_losses(hidden, self.weight, self.bias, targets)

    def total_log_loss(self, hidden: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The sum of `log_loss`, a float32 scalar; its backward pass may run once.

        `smoothing` e (Szegedy et al. 2016, arXiv:1512.00567) moves that share of each target's mass evenly to all V
        words: (1 - e) (-log p(target)) + e mean_v (-log p(v)).
        """
        return total_loss(hidden, self.weight, self.bias, targets, smoothing)

    def extra_repr(self) -> str:
        return f"{self.width}, {self.vocabulary}, bias={self.bias is not None}"


def _log_softmax(logits: Tensor) -> Tensor:
    """[...,V] -> [...,V] in float32, in place where no gradient is wanted: a beam of a hundred sources writes megabytes
    here, and a second tensor of them takes a third of the time."""
    logits = logits.float()
    return logits.log_softmax(-1) if torch.is_grad_enabled() else torch.log_softmax(logits, -1, out=logits)


class AdaptiveSoftmax(nn.Module):
    """Adaptive softmax; word numbers must be in order of falling frequency.

    Parameters as in `torch.nn.AdaptiveLogSoftmaxWithLoss`, without biases: head [c_1+K,D], and for each cluster a
    projection [D/division^k,D] and words [c_{k+1}-c_k,D/division^k]. Raises UserError if `cutoffs` do not rise within
    V.
    """

    def __init__(self, width: int, vocabulary: int, cutoffs: list[int], division: float = 4.0) -> None:
        super().__init__()
        bounds = [0, *cutoffs, vocabulary]
        if not cutoffs or any(low >= high for low, high in pairwise(bounds)):
            raise UserError(f"adaptive softmax: cutoffs are {cutoffs}, they must rise between 1 and {vocabulary - 1}")
        self.width, self.vocabulary, self.cutoffs = width, vocabulary, list(cutoffs)
        self.clusters = list(pairwise(bounds[1:]))
        self.head = nn.Linear(width, cutoffs[0] + len(self.clusters), bias=False)
        self.projections, self.words = nn.ModuleList(), nn.ModuleList()
        for power, (low, high) in enumerate(self.clusters, start=1):
            narrow = max(1, int(width / division**power))
            self.projections.append(nn.Linear(width, narrow, bias=False))
            self.words.append(nn.Linear(narrow, high - low, bias=False))

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """[...,D] -> [...,V] in float32."""
        first = self.cutoffs[0]
        head = _log_softmax(self.head(hidden))  # [...,c_1+K]
        parts = [head[..., :first]]
        for index, (projection, words) in enumerate(zip(self.projections, self.words, strict=True)):
            inside = _log_softmax(words(projection(hidden)))  # [...,c_{k+1}-c_k]
            parts.append(inside + head[..., first + index, None])
        return torch.cat(parts, -1)

    def log_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """-log p of `targets` [N] given `hidden` [N,D]: [N] float32, 0 where the target is -1."""
        losses = token_losses(hidden, self.head.weight, None, self._head_targets(targets))
        for rows, narrow, weight, inner in self._inside(hidden, targets):
            losses = losses.index_add(0, rows, token_losses(narrow, weight, None, inner))
        return losses

    def total_log_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The sum of `log_loss`, a float32 scalar; its backward pass may run once."""
        total = total_loss(hidden, self.head.weight, None, self._head_targets(targets))
        for _, narrow, weight, inner in self._inside(hidden, targets):
            total = total + total_loss(narrow, weight, None, inner)
        return total

    def _head_targets(self, targets: Tensor) -> Tensor:
        """Each word's entry in the head: itself or its cluster's."""
        heads = targets
        for index, (low, _) in enumerate(self.clusters):
            heads = torch.where(targets >= low, self.cutoffs[0] + index, heads)
        return heads

    def _inside(self, hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each cluster: the rows in it [n], their projection [n,D'], its words [W,D'], their numbers in it [n]."""
        parts = []
        for (low, high), projection, words in zip(self.clusters, self.projections, self.words, strict=True):
            rows = ((targets >= low) & (targets < high)).nonzero().squeeze(1)  # [n]
            narrow = projection(hidden.index_select(0, rows))  # [n,D']
            assert isinstance(words.weight, Tensor)
            parts.append((rows, narrow, words.weight, targets[rows] - low))
        return parts


def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """-log softmax(hidden [N,D] @ weight [V,D].T + bias [V]) at `targets` [N]: [N] float32, 0 where the target is -1.

    Goes by chunks; with gradients each chunk's logits are computed a second time in the backward pass.
    """

    def chunk_losses(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, weight, bias)  # [n,V]
        return F.cross_entropy(logits.to(_wide(logits)), targets, ignore_index=-1, reduction="none")

    rows = _chunk_rows(len(hidden), len(weight))
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk_losses, h, t, use_reentrant=False) for h, t in chunks])
    return torch.cat([chunk_losses(h, t) for h, t in chunks])


def total_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The sum of `token_losses`, with its gradients computed on the way if gradients are enabled."""
    if not torch.is_grad_enabled() and not smoothing:
        return token_losses(hidden, weight, bias, targets).sum()
    total: Tensor = _TotalLoss.apply(hidden, weight, bias, targets, smoothing)
    return total


def _chunk_rows(count: int, vocabulary: int) -> int:
    """Rows of a chunk: as even as can be, with at most CHUNK logits in each (or one row)."""
    most = max(1, CHUNK // vocabulary)
    chunks = max(1, -(-count // most))
    return max(1, -(-count // chunks))


class _TotalLoss(torch.autograd.Function):
    """Sum of the log-losses; the gradients of hidden [N,D], weight [V,D] and bias [V] come out of the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float
    ) -> Tensor:
        kind = _product_type(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            total, *ctx.gradients = _loss_and_gradients(hidden, weight, bias, targets, smoothing, kind)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("total_log_loss: its gradients were already used; the backward pass may run once")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(scale) for gradient in gradients), None, None


def _product_type(weight: Tensor) -> torch.dtype:
    """The type of the matrix products. Never float16: gradients, not scaled yet, would fall below its range."""
    device = weight.device.type
    if not torch.is_autocast_enabled(device):
        return weight.dtype
    kind = torch.get_autocast_dtype(device)
    return torch.bfloat16 if kind == torch.float16 else kind


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Total loss [] and its gradients with respect to hidden, weight and bias, each in its own type."""
    width = weight.shape[1]
    matrix = weight.to(kind) if bias is None else _with_column(weight, bias, kind)  # [V,D']
    inputs = hidden.to(kind) if bias is None else _with_column(hidden, 1.0, kind)  # [N,D']
    predicted = (targets >= 0)[:, None]  # [N,1]
    inputs, targets = inputs * predicted, targets.clamp_min(0)
    contiguous = torch.contiguous_format
    hidden_gradient = torch.empty_like(hidden, memory_format=contiguous)  # [N,D]
    weight_gradient = torch.empty_like(weight, memory_format=contiguous)  # [V,D]
    bias_gradient = None if bias is None else torch.empty_like(bias)  # [V]
    total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
    rows = _chunk_rows(len(hidden), len(weight))
    for start in range(0, max(1, len(hidden)), rows):
        chunk = slice(start, start + rows)
        logits = inputs[chunk] @ matrix.T  # [n,V]
        total += (_logits_to_gradients(logits, targets[chunk], smoothing) * predicted[chunk, 0]).sum()
        hidden_gradient[chunk] = (logits @ matrix)[:, :width] * predicted[chunk]
        product = logits.T @ inputs[chunk]  # [V,D']
        _accumulate(weight_gradient, product[:, :width], start == 0)
        if bias_gradient is not None:
            _accumulate(bias_gradient, product[:, width], start == 0)
    return total, hidden_gradient, weight_gradient, bias_gradient


def _with_column(values: Tensor, column: Tensor | float, kind: torch.dtype) -> Tensor:
    """`values` [N,D] and `column` [N] side by side, filled up with zeros to a width that the kernels like: [N,D']."""
    width = values.shape[1]
    wide = values.new_zeros(len(values), -(-(width + 1) // 16) * 16, dtype=kind)
    wide[:, :width] = values
    wide[:, width] = column
    return wide


def _accumulate(total: Tensor, part: Tensor, first: bool) -> None:
    """Add, or for the `first` part set: saves two passes over a large matrix."""
    if first:
        total.copy_(part)
    else:
        total.add_(part)


def _logits_to_gradients(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Losses [n] of `logits` [n,V]; the logits are overwritten with their gradient, softmax - (smoothed) one-hot."""
    losses = []
    rows = max(1, BLOCK // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    for block, words in zip(logits.split(rows), targets[:, None].split(rows), strict=True):
        probabilities = block.to(_wide(block)).softmax(-1)  # [rows,V]
        right = probabilities.gather(1, words)  # [rows,1]
        loss = -right.log()
        if not right.all():  # the probability fell below float32's range, its logarithm need not
            loss = -block.to(_wide(block)).log_softmax(-1).gather(1, words)
        if smoothing:
            wide = block.to(_wide(block))
            evenly = loss + wide.gather(1, words) - wide.mean(-1, keepdim=True)  # mean of -log p over the words
            loss = (1 - smoothing) * loss + smoothing * evenly
            probabilities.sub_(smoothing / block.shape[1])
            right = probabilities.gather(1, words) + smoothing
        losses.append(loss.squeeze(1))
        block.copy_(probabilities.scatter_(1, words, right - 1))
    return torch.cat(losses)


def _wide(tensor: Tensor) -> torch.dtype:
    """The type of softmax and loss: float32, or float64 for a float64 model."""
    return torch.promote_types(tensor.dtype, torch.float32)
