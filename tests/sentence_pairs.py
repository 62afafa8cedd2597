"""A small set of German and English sentences for tests, prepared, and a recipe of a small translator for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import DatasetEntry, Recipe, Training
from unroll.datasets import parallel_text
from unroll.place import Place

NOUNS = {"hund": "dog", "katze": "cat", "mann": "man", "haus": "house", "ball": "ball", "auto": "car"}
VERBS = {"sieht": "sees", "mag": "likes", "hat": "has", "kauft": "buys"}


def lines(count: int, seed: int) -> tuple[list[str], list[str]]:
    generator = np.random.default_rng(seed)
    source, target = [], []
    for _ in range(count):
        words = [generator.choice(list(NOUNS)), generator.choice(list(VERBS)), generator.choice(list(NOUNS))]
        extra = int(generator.integers(0, 4))
        source.append("Der " + " ".join(words) + " und die katze" * extra)
        translated = [NOUNS.get(word, VERBS.get(word, word)) for word in words]
        target.append("The " + " ".join(translated) + " and the cat" * extra)
    return source, target


def prepare_pairs(root: Path) -> Place:
    """A project in the folder `root` whose data set `pairs` is prepared."""
    sources = []
    for split, count, seed in (("train", 120, 1), ("validation", 20, 2), ("test", 15, 3)):
        for language, text in zip(("de", "en"), lines(count, seed), strict=True):
            (root / f"{split}.{language}").write_text("\n".join(text) + "\n")
            sources.append({"split": split, "language": language, "file": f"{split}.{language}"})
    tokenizer = {"kind": "bpe", "vocabulary_size": 300}
    options = {"source": "de", "target": "en", "joint": True, "lowercase": True, "tokenizer": tokenizer}
    entry = DatasetEntry(preparer="parallel_text", licence="none", sources=sources, options=options)
    parallel_text.prepare(entry, "pairs", root, root / "data" / "prepared" / "pairs")
    return Place(root)


def recipe(objective: dict[str, Any] | None = None, **train: Any) -> Recipe:
    model = {"name": "seq2seq", "embedding": 12, "width": 12, "decoder_width": 12, "tied": "all"}
    training = {"batch_tokens": 100, "steps": 6, "optimizer": {"learning_rate": 0.01}, **train}
    return Recipe(
        name="pairs",
        suite="demo",
        task="translation",
        dataset="pairs",
        model=model,
        train=Training(**training, objective=objective or {}),
        predict={"split": "test", "beam": {"width": 2, "longest": 6}, "pictures": 2, "batch": 4},
        evaluate={"metrics": ["bleu"]},
    )
