"""Where a project keeps its things, and what it says of a trained model. Without torch, for stages that need none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unroll.config import Recipe
from unroll.data.shards import load_manifest
from unroll.dependencies import code_hash
from unroll.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where a project keeps its things, relative to its root."""

    root: Path

    def data(self, dataset: str) -> Path:
        return self.root / "data" / "prepared" / dataset

    def model(self, recipe: Recipe, seed: int) -> Path:
        return self.root / "models" / recipe.name / f"seed-{seed}"

    def history(self, recipe: Recipe, seed: int) -> Path:
        return self.root / "histories" / recipe.name / f"seed-{seed}"

    def predictions(self, recipe: Recipe, seed: int) -> Path:
        return self.root / "predictions" / recipe.name / f"seed-{seed}"

    def identity(self, recipe: Recipe) -> str:
        """Hash of all that training reads, recipe, data and code: what trains the same weights has the same one."""
        return recipe.hash(load_manifest(self.data(recipe.dataset))["hash"], code_hash(recipe))

    def run(self, recipe: Recipe, seed: int) -> Path:
        """The folder of a run: its name holds the identity, so a changed recipe starts anew."""
        return self.root / "runs" / f"{recipe.name}-{self.identity(recipe)}" / f"seed-{seed}"


def read_description(folder: Path) -> dict[str, Any]:
    """`model.json` of an exported model."""
    path = folder / "model.json"
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; train the recipe first") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(description, dict):
        raise UserError(f"{path}: a mapping was expected, found {type(description).__name__}")
    return description
