"""A small project in a temporary folder: own text, one recipe. Shared by the tests that run real stages."""

from pathlib import Path
from typing import Any

import yaml

from unroll.config import Recipe, load_recipe
from unroll.place import Place
from unroll.stages.prepare import prepare

RECURRENT = {"name": "recurrent_lm", "cell": "lstm", "layers": 2, "width": 12, "embedding": 8}
ADAM = {"name": "adamw", "learning_rate": 0.01, "clip": 1.0}
TRAIN = {
    "batch": 4,
    "window": 9,
    "steps": 40,
    "optimizer": ADAM,
    "validate_every": 10,
    "checkpoint_every": 5,
    "log_every": 1,
}


def write_project(
    root: Path, model: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **recipe: Any
) -> Path:
    """Write params.yaml, recipes and a text of a few thousand characters under `root`."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "own.txt").write_text("".join(f"line {n * n % 97} says {n % 13} things.\n" for n in range(300)))
    dataset = {
        "preparer": "text",
        "licence": "own",
        "sources": [{"file": "own.txt"}],
        "options": {"tokenizer": {"kind": "characters"}, "split": {"train": 0.8, "validation": 0.1, "test": 0.1}},
    }
    (root / "params.yaml").write_text(yaml.safe_dump({"datasets": {"own": dataset}, "suites": {"tiny": None}}))
    entry = {
        "suite": "tiny",
        "task": "language_modeling",
        "dataset": "own",
        "model": model or RECURRENT,
        "train": {**TRAIN, **(train or {})} if "counting" not in (train or {}) else train,
        "predict": {
            "split": "test",
            "context": 50,
            "block": 100,
            "samples": {"prompt": "line ", "length": 10, "temperatures": [1.0]},
        },
        "evaluate": {"metrics": ["nats_per_char", "perplexity"]},
        "seeds": [1],
        **recipe,
    }
    (root / "recipes").mkdir(exist_ok=True)
    (root / "recipes" / "language_modeling.yaml").write_text(yaml.safe_dump({"recipes": {"small": entry}}))
    return root


def project(
    root: Path, model: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **recipe: Any
) -> tuple[Recipe, Place]:
    """A written project with its data prepared, the checked recipe, and where things are."""
    write_project(root, model, train, **recipe)
    if not (root / "data" / "prepared" / "own").exists():
        prepare(root, "own")
    return load_recipe(root, "small"), Place(root)
