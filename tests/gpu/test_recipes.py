"""On a GPU: every recipe's tiny twin trains as it does on the CPU, goes on after a stop as if there had been none, and is
predicted and evaluated. `make test-gpu`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from unroll.config import Recipe, Training, load_recipe
from unroll.device import default_device
from unroll.place import Place
from unroll.stages.evaluate import evaluate
from unroll.stages.predict import predict
from unroll.stages.prepare import prepare
from unroll.training.context import WorkerContext
from unroll.training.loop import Preempted
from unroll.training.runs import train_one

ROOT = Path(__file__).parents[2]
FEW = {"scenes": {"samples": {"train": 16, "validation": 4, "test": 6}}}
FEW["scene-clips"] = FEW["scenes"]
RECIPES = [
    name for path in sorted((ROOT / "recipes").glob("*.yaml")) for name in yaml.safe_load(path.read_text())["recipes"]
]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's recipes on the embedded and generated data that all twins read."""
    root = tmp_path_factory.mktemp("project")
    (root / "recipes").symlink_to(ROOT / "recipes")
    (root / "data").mkdir()
    (root / "data" / "embedded").symlink_to(ROOT / "data" / "embedded")
    described = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name, options in FEW.items():
        described["datasets"][name]["options"] |= options
    (root / "params.yaml").write_text(yaml.safe_dump(described))
    return root


def train_anew(recipe: Recipe, place: Place, *contexts: WorkerContext) -> tuple[bytes, list[float]]:
    """The exported weights and the logged losses of a run that every context but the last one stops."""
    for folder in ("runs", "models"):  # of others too: a first phase would be taken from them
        shutil.rmtree(place.root / folder, ignore_errors=True)
    for context in contexts[:-1]:
        with pytest.raises(Preempted):
            train_one(recipe, 1, place, context)
    train_one(recipe, 1, place, contexts[-1])
    journal = (place.history(recipe, 1) / "journal.jsonl").read_text().splitlines()
    values = [line["values"] for line in map(json.loads, journal) if line["kind"] == "metrics"]
    weights = (place.model(recipe, 1) / "weights.safetensors").read_bytes()
    return weights, [value["train/loss"] for value in values if "train/loss" in value]


class StopsAfterOneStep(WorkerContext):
    asked = 0

    def wants_stop(self) -> bool:
        self.asked += 1
        return self.asked == 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_twin_learns_as_on_the_cpu_goes_on_after_a_stop_and_is_scored(name: str, project: Path) -> None:
    recipe, place, gpu = load_recipe(project, name, tiny=True), Place(project), default_device()
    if not place.data(recipe.dataset).exists():
        prepare(project, recipe.dataset)
    if isinstance(recipe.train, Training):
        _, on_cpu = train_anew(recipe, place, WorkerContext())
        weights, losses = train_anew(recipe, place, WorkerContext(device=gpu))
        draws = "draw" in recipe.train.objective  # programs, with the device's own generator
        closeness = 1e-4 if recipe.train.precision == "fp32" and not draws else 3e-2
        assert losses[0] == pytest.approx(on_cpu[0], rel=closeness)
        again, _ = train_anew(recipe, place, StopsAfterOneStep(device=gpu), WorkerContext(device=gpu))
        assert again == weights
    else:
        train_anew(recipe, place, WorkerContext(device=gpu))
    for seed in recipe.seeds[1:]:
        train_one(recipe, seed, place, WorkerContext(device=gpu))
    predict(project, name, tiny=True)
    result = json.loads(evaluate(project, name, tiny=True, track=False).read_text())
    assert all(math.isfinite(metric["value"]) for metric in result["metrics"].values())
