"""Every recipe of programs and of questions about tables: its tiny twin goes through all stages, and resumes exactly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from unroll.config import load_recipe
from unroll.listing import print_recipe
from unroll.place import Place
from unroll.stages.evaluate import evaluate
from unroll.stages.predict import predict
from unroll.stages.prepare import prepare
from unroll.training.context import WorkerContext
from unroll.training.loop import Preempted
from unroll.training.runs import train_one

ROOT = Path(__file__).parents[2]
FILES = ("program_execution.yaml", "table_questions.yaml")
ENTRIES = {file: yaml.safe_load((ROOT / "recipes" / file).read_text())["recipes"] for file in FILES}
RECIPES = {name: entry for entries in ENTRIES.values() for name, entry in entries.items()}
LEARNT = [name for name, entry in RECIPES.items() if "counting" not in entry["train"]]
pytestmark = pytest.mark.pipeline
FEW = {"train": 120, "validation": 12, "test": 20}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes as they are, on a few samples of the same data sets."""
    root = tmp_path_factory.mktemp("programs")
    (root / "recipes").mkdir()
    for file in FILES:
        (root / "recipes" / file).write_text((ROOT / "recipes" / file).read_text())
    described = yaml.safe_load((ROOT / "params.yaml").read_text())["datasets"]
    used = {entry["tiny"].get("dataset", entry["dataset"]) for entry in RECIPES.values()}
    datasets = {name: described[name] for name in used | {entry["dataset"] for entry in RECIPES.values()}}
    for name in used:
        datasets[name]["options"]["samples"] = FEW
        if "lengths" in datasets[name]["options"]:
            datasets[name]["options"]["lengths"]["test"] = [3, 5]
    (root / "params.yaml").write_text(yaml.safe_dump({"datasets": datasets, "suites": {}}))
    for name in used:
        prepare(root, name)
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_a_twin_goes_through_all_stages(name: str, project: Path) -> None:
    recipe, place = load_recipe(project, name, tiny=True), Place(project)
    train_one(recipe, 1, place, WorkerContext())
    predict(project, name, tiny=True)
    result = json.loads(evaluate(project, name, tiny=True, track=False).read_text())
    assert result["primary"] in ("exact_match", "denotation_accuracy")
    for metric in result["metrics"].values():
        assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 100
        assert metric["n"] == 20
    drawn = project / "evaluations" / "tiny" / recipe.name / "pictures"
    assert bool(list(drawn.glob("*.png"))) == (recipe.predict.get("pictures", 1) > 0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_looked_at(name: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_recipe(project, name, tiny=True)
    shown = capsys.readouterr().out
    assert ("no gradients" if name not in LEARNT else "the first one") in " ".join(shown.split())


@dataclass
class Stopped(WorkerContext):
    """A worker that is asked to stop once it has made so many steps."""

    steps: int = 0

    def wants_stop(self) -> bool:
        self.steps -= 1
        return self.steps < 0


@pytest.mark.parametrize("name", LEARNT)
def test_a_run_that_was_stopped_ends_with_the_same_weights(name: str, project: Path) -> None:
    recipe, place = load_recipe(project, name, tiny=True), Place(project)
    weights: list[bytes] = []
    for stops in ([], [7, 5]):
        for steps in stops:
            with pytest.raises(Preempted):
                train_one(recipe, 1, place, Stopped(steps=steps))
        train_one(recipe, 1, place, WorkerContext())
        weights.append((place.model(recipe, 1) / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", ["addition_npi", "tables_neural_programmer"])
def test_parts_of_a_batch_add_up_to_it(name: str, project: Path) -> None:
    """Two passes over halves of a batch give the loss of one pass, up to rounding."""
    losses: list[float] = []
    for parts in (None, 2):
        recipe: Any = load_recipe(project, name, tiny=True)
        changes = {"parts": parts, "objective": {}}
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
        place = Place(project)
        train_one(recipe, 1, place, WorkerContext())
        lines = [json.loads(line) for line in (place.history(recipe, 1) / "journal.jsonl").read_text().splitlines()]
        losses.append(next(line["values"]["train/loss"] for line in lines if "train/loss" in line.get("values", {})))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
