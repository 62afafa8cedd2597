"""Every recipe of captioners: its tiny twin goes through all stages, and the pictures are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from unroll.config import load_recipe
from unroll.place import Place
from unroll.stages.evaluate import evaluate
from unroll.stages.predict import predict
from unroll.stages.prepare import prepare
from unroll.training.context import WorkerContext
from unroll.training.runs import train_one

ROOT = Path(__file__).parents[2]
RECIPES = yaml.safe_load((ROOT / "recipes" / "captioning.yaml").read_text())["recipes"]
FEW = {"train": 16, "validation": 4, "test": 6}
pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes as they are, on a few samples of the generated data sets that all twins read."""
    root = tmp_path_factory.mktemp("captioning")
    (root / "recipes").mkdir()
    (root / "recipes" / "captioning.yaml").write_text((ROOT / "recipes" / "captioning.yaml").read_text())
    described = yaml.safe_load((ROOT / "params.yaml").read_text())["datasets"]
    datasets = {name: described[name] for name in {entry["dataset"] for entry in RECIPES.values()}}
    for name in ("scenes", "scene-clips"):
        datasets[name]["options"]["samples"] = FEW
    (root / "params.yaml").write_text(yaml.safe_dump({"datasets": datasets, "suites": {}}))
    for name in ("scenes", "scene-clips"):
        prepare(root, name)
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_a_twin_goes_through_all_stages(name: str, project: Path) -> None:
    recipe, place = load_recipe(project, name, tiny=True), Place(project)
    train_one(recipe, 1, place, WorkerContext())
    predict(project, name, tiny=True)
    result = json.loads(evaluate(project, name, tiny=True, track=False).read_text())
    assert result["primary"] in ("cider", "meteor")
    for metric in result["metrics"].values():
        assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 100
        assert metric["n"] == 6
    assert list((project / "evaluations" / "tiny" / recipe.name / "pictures").glob("*captions.png"))
