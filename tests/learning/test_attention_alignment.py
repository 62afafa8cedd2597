"""Attention looks where it should: on a task whose alignment is known, it finds the right source word."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unroll.config import load_part
from unroll.layers.generator import bos, eos

pytestmark = pytest.mark.slow

WORDS, LONGEST = 40, 10


def permuted(rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Sources of one length with different words in each, [B,S] closed by EOS; targets are the words back to front."""
    length = int(torch.randint(3, LONGEST + 1, (), generator=generator))
    words = torch.rand(rows, WORDS, generator=generator).argsort(1)[:, :length]  # [B,S-1]
    ends = torch.full((rows, 1), eos(WORDS + 2))
    targets = torch.cat([words.flip(1), ends], 1)  # [B,T]
    tokens = torch.cat([torch.full((rows, 1), bos(WORDS + 2)), targets[:, :-1]], 1)
    lengths = torch.full((rows,), length + 1)
    return {"source": torch.cat([words, ends], 1), "source_lengths": lengths, "tokens": tokens, "targets": targets}


@pytest.mark.parametrize("attention", ["general", "additive"])
def test_attention_finds_the_source_word_of_a_permutation(attention: str) -> None:
    """Unseen sentences of 3 to 10 words, back to front: for >= 99 % of the words that the model writes (on its own
    words, greedily), the source word with the largest weight is the one that stands in that place, and the word is right.
    """
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    module = load_part("models", "seq2seq", "test")
    settings: dict[str, Any] = {"embedding": 48, "width": 48, "decoder_width": 64, "attention": attention}
    model = module.Model(module.Config(**settings), {"source": WORDS + 2, "target": WORDS + 2})
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 50, (STEPS - step) / (STEPS / 2))
        batch = permuted(64, generator)
        memory = model.encode(batch)
        output = model(batch["tokens"], memory, model.initial_state(memory))
        loss = model.output.total_log_loss(output.hidden.flatten(0, 1), batch["targets"].flatten()) / len(
            batch["targets"]
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    found, right, total = count_right_places(model, [permuted(64, generator) for _ in range(16)])
    assert right >= 0.99 * total, f"{right} of {total} words are right"
    assert found >= 0.99 * total, f"the attention finds the right source word for {found} of {total}"


STEPS = 900


@torch.no_grad()
def count_right_places(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[int, int, int]:
    """Words whose largest weight lies on their source word, words that are right, and all words."""
    found = right = total = 0
    model.eval()
    for batch in batches:
        memory = model.encode(batch)
        state, tokens = model.initial_state(memory), batch["tokens"][:, 0]
        length = batch["source"].shape[1] - 1
        for place in range(length):
            scores, state, weights = model.step(tokens, memory, state)
            tokens = scores.argmax(-1)
            found += int((weights.argmax(-1) == length - 1 - place).sum())
            right += int((tokens == batch["targets"][:, place]).sum())
            total += len(tokens)
    return found, right, total
