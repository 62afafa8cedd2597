"""The n-gram model reaches the numbers its docstring and the recipes promise."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from unroll.models.ngram import Config, Model

TINY_SHAKESPEARE = Path(__file__).parents[2] / "data" / "embedded" / "tiny-shakespeare" / "input.txt"
WIKITEXT = Path(os.environ.get("UNROLL_MIRROR", "")) / "wikitext-2"


@pytest.fixture(scope="module")
def shakespeare() -> np.ndarray:
    """Character ids of the whole file: the numbers of its sorted symbols."""
    text = np.array(list(TINY_SHAKESPEARE.read_text(encoding="utf-8")))
    return np.unique(text, return_inverse=True)[1]


def held_out_loss(ids: np.ndarray, train_tokens: int, **options: object) -> float:
    """Nats per token of what follows the first `train_tokens`, read after them as one stream."""
    model = Model(Config(**options), int(ids.max()) + 1)  # type: ignore[arg-type]
    model.fit([ids[:train_tokens]])
    text = torch.from_numpy(ids)[None]  # [1,T]
    before, after = text[:, train_tokens - 20 : train_tokens], text[:, train_tokens:]
    _, state = model.log_loss(before[:, :-1], before[:, 1:], model.initial_state(1))
    loss, _ = model.log_loss(torch.cat([before[:, -1:], after[:, :-1]], 1), after, state)
    return loss.mean().item()


@pytest.mark.parametrize(
    ("order", "expected"),
    [(1, 3.3473), (2, 2.4839), (3, 2.0413), (4, 1.7223), (5, 1.5663), (6, 1.5385), (7, 1.5469), (8, 1.5679)],
)
def test_kneser_ney_on_tiny_shakespeare(shakespeare: np.ndarray, order: int, expected: float) -> None:
    loss = held_out_loss(shakespeare, int(0.9 * len(shakespeare)), order=order)
    assert loss == pytest.approx(expected, abs=0.0005)


def test_modified_kneser_ney_is_better_than_one_discount(shakespeare: np.ndarray) -> None:
    """Chen and Goodman's main result, here on characters: 1.5226 against 1.5385."""
    loss = held_out_loss(shakespeare, int(0.9 * len(shakespeare)), order=6, smoothing="modified_kneser_ney")
    assert loss == pytest.approx(1.5226, abs=0.0005)


@pytest.mark.slow
@pytest.mark.skipif(not (WIKITEXT / "train.txt.gz").is_file(), reason="WikiText-2 is looked for in UNROLL_MIRROR")
@pytest.mark.parametrize(
    ("smoothing", "perplexity"), [("kneser_ney", 244.08), ("modified_kneser_ney", 217.79)], ids=["one", "modified"]
)
def test_word_5_gram_on_wikitext_2(smoothing: str, perplexity: float) -> None:
    """5.4975 nats for one discount was also found by a count in plain dictionaries."""
    words: list[str] = []
    for split in ("train", "test"):
        for line in gzip.decompress((WIKITEXT / f"{split}.txt.gz").read_bytes()).decode().splitlines():
            words.extend([*line.split(), "<eos>"])
    types, ids = np.unique(np.array(words), return_inverse=True)
    assert len(types) == 33_278
    loss = held_out_loss(ids, 2_088_628, order=5, smoothing=smoothing)
    assert np.exp(loss) == pytest.approx(perplexity, abs=0.01)
