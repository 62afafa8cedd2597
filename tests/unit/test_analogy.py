"""Which pairs of words training merely lacks, and the loss that spares them."""

from __future__ import annotations

import itertools

import pytest
import torch

from unroll.losses.analogy import followers, losses_without, missing_pairs, total_loss_without

WORDS = ["a", "red", "green", "blue", "star", "ring", "box", "is", "left", "of", "here"]
NUMBER = {word: number for number, word in enumerate(WORDS)}
V = len(WORDS) + 2


def captions() -> list[list[int]]:
    """Every colour on every shape but one each, in two kinds of sentence."""
    found = []
    for (i, colour), (j, shape) in itertools.product(enumerate(WORDS[1:4]), enumerate(WORDS[4:7])):
        if i != j:
            found += [f"a {colour} {shape} is left of a {colour} {shape}", f"a {colour} {shape} is here"]
    return [[NUMBER[word] for word in caption.split()] for caption in found]


def test_missing_are_the_colours_on_shapes_that_no_caption_has_and_nothing_else() -> None:
    missing = missing_pairs(captions(), V)
    found = {(WORDS[i], WORDS[j]) for i, j in missing.nonzero().tolist()}
    assert found == {("red", "star"), ("green", "ring"), ("blue", "box")}


def test_nothing_is_missing_where_every_pair_is_seen_or_nothing_is_alike() -> None:
    assert not missing_pairs([[0, 1, 2], [3, 4, 5]], 8).any()


def test_the_loss_leaves_the_missing_out_and_gives_them_no_gradient() -> None:
    missing = torch.zeros(4, 4, dtype=torch.bool)
    missing[1, 2] = True
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    tokens, targets = torch.tensor([1, 0, 1]), torch.tensor([3, 2, -1])
    loss = total_loss_without(missing, logits.log_softmax(-1), tokens, targets)
    kept = logits[0, [0, 1, 3]].log_softmax(-1)[2] + logits[1].log_softmax(-1)[2]
    assert loss.item() == pytest.approx(-kept.item())
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 2].abs() < 1e-12
    assert logits.grad[1].abs().min() > 0
    assert not logits.grad[2].any()


def test_words_that_are_missing_before_the_next_one_can_be_left_out_too() -> None:
    missing = torch.zeros(5, 5, dtype=torch.bool)
    missing[1, 2] = True  # word 1 is missing before word 2
    targets = torch.tensor([3, 2, 4, 3, 4, -1])  # 4 ends a caption
    following = followers(targets, 4)
    assert following.tolist() == [2, 4, -1, 4, -1, -1]
    logits = torch.randn(6, 5, dtype=torch.float64)
    loss = total_loss_without(missing, logits.log_softmax(-1), torch.zeros(6, dtype=torch.int64), targets, following)
    kept = logits[0, [0, 2, 3, 4]].log_softmax(-1)[2] + sum(
        logits[n].log_softmax(-1)[t] for n, t in [(1, 2), (2, 4), (3, 3), (4, 4)]
    )
    assert loss.item() == pytest.approx(-kept.item())


def test_a_target_counts_even_where_its_pair_was_held_to_be_missing() -> None:
    missing = torch.ones(3, 3, dtype=torch.bool)
    scores = torch.zeros(1, 3).log_softmax(-1)
    assert total_loss_without(missing, scores, torch.tensor([0]), torch.tensor([1])).item() == pytest.approx(0.0)


def test_of_drawn_captions_a_missing_pair_says_nothing_and_the_rest_leaves_the_missing_out() -> None:
    missing = torch.zeros(4, 4, dtype=torch.bool)
    missing[1, 2] = True
    logits = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    tokens, targets = torch.tensor([1, 1, 0, 1]), torch.tensor([2, 3, 2, -1])
    losses = losses_without(missing, logits.log_softmax(-1), tokens, targets)
    assert losses[[0, 3]].tolist() == [0.0, 0.0]
    assert losses[1].item() == pytest.approx(-logits[1, [0, 1, 3]].log_softmax(-1)[2].item())
    assert losses[2].item() == pytest.approx(-logits[2].log_softmax(-1)[2].item())
    losses.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[[0, 3]].any()
    assert logits.grad[1, 2].abs() < 1e-12


def test_of_drawn_captions_a_word_that_is_missing_before_the_next_one_says_nothing_either() -> None:
    missing = torch.zeros(4, 4, dtype=torch.bool)
    missing[1, 2] = True  # word 1 is missing before word 2
    logits = torch.randn(3, 4, dtype=torch.float64)
    targets = torch.tensor([1, 2, 3])  # 3 ends a caption
    losses = losses_without(missing, logits.log_softmax(-1), torch.zeros(3).long(), targets, followers(targets, 3))
    assert losses[0].item() == 0.0
    torch.testing.assert_close(losses[1:], -logits.log_softmax(-1)[[1, 2], [2, 3]])
    targets = torch.tensor([0, 2, 3])
    losses = losses_without(missing, logits.log_softmax(-1), torch.zeros(3).long(), targets, followers(targets, 3))
    assert losses[0].item() == pytest.approx(-logits[0, [0, 2, 3]].log_softmax(-1)[0].item())
