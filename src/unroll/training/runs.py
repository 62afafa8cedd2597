"""A run on this machine: one recipe, one seed, from prepared data to an exported model.

Needs torch alone; `launch.py` puts it under Ray Train.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unroll.config import CountingTraining, Recipe, Training, hash_json, load_part, model_config
from unroll.data.shards import load_manifest
from unroll.errors import UserError
from unroll.files import new_folder, sha256
from unroll.journal import Journal
from unroll.memory import keep_freed_memory
from unroll.training import checkpoint
from unroll.training.context import WorkerContext
from unroll.training.loop import Run, restore_best


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

    def run(self, recipe: Recipe, seed: int) -> Path:
        """The folder of a run: its name holds a hash of recipe, data and code, so a changed one starts anew."""
        identity = recipe.hash(load_manifest(self.data(recipe.dataset))["hash"], code_hash(recipe))
        return self.root / "runs" / f"{recipe.name}-{identity}" / f"seed-{seed}"


def code_hash(recipe: Recipe) -> str:
    """Hash of the source files that decide what training computes; `launch.py` decides only where."""
    package = Path(__file__).parents[1]
    files = [package / "models" / f"{recipe.model['name']}.py", package / "tasks" / f"{recipe.task}.py"]
    for folder in ("layers", "data", "training"):
        files += sorted(path for path in (package / folder).glob("*.py") if path.name != "launch.py")
    return hash_json([[path.name, sha256(path)] for path in files])


def build(recipe: Recipe, place: Place) -> tuple[Any, torch.nn.Module]:
    """The task and a freshly initialised model of a recipe (draw the weights after seeding torch).

    Raises:
        UserError: the data set is not prepared.
    """
    folder = place.data(recipe.dataset)
    task = load_part("tasks", recipe.task, f"recipes.{recipe.name}.task").Task(recipe, folder)
    model = load_part("models", recipe.model["name"], f"recipes.{recipe.name}.model.name")
    return task, model.Model(model_config(recipe), task.vocabulary)


def train_one(recipe: Recipe, seed: int, place: Place, context: WorkerContext) -> dict[str, Any]:
    """Train one seed to the end and export the model; a run that was interrupted goes on where it stopped.

    Returns:
        The cost: minutes, tokens_per_second, parameters, flops_per_token, peak_memory_mb, device.
    """
    keep_freed_memory()
    folder = place.run(recipe, seed)
    if context.is_first:
        start_folder(recipe, seed, folder, place)
    context.barrier()
    torch.manual_seed(seed)
    task, model = build(recipe, place)
    cost = (
        _count(task, model)
        if isinstance(recipe.train, CountingTraining)
        else _learn(task, model, recipe, seed, folder, context)
    )
    cost |= describe_cost(model, context)
    if context.is_first:
        _export(recipe, seed, place, model)
        finish_folder(recipe, seed, folder, place, cost)
    return cost


def _learn(
    task: Any, model: torch.nn.Module, recipe: Recipe, seed: int, folder: Path, context: WorkerContext
) -> dict[str, Any]:
    """Train by gradients; leaves the weights to export in the model: the best ones, or the last (averaged if asked)."""
    train = recipe.train
    assert isinstance(train, Training)
    run = Run(task, model, train, seed, folder, context)
    done = run.run()
    if train.select == "best":
        restore_best(model, folder)
    else:
        run.policy.adopt_averages()
    return {
        "minutes": done.seconds / 60,
        "tokens_per_second": done.predictions / max(1e-9, done.seconds),
        "steps": done.step,
        "best_step": done.best_step,
        "seconds_waiting_for_data": run.waited,
    }


def _count(task: Any, model: torch.nn.Module) -> dict[str, Any]:
    started = time.perf_counter()
    task.fit(model)
    seconds = time.perf_counter() - started
    tokens = task.manifest["splits"]["train"]["tokens"]
    return {"minutes": seconds / 60, "tokens_per_second": tokens / seconds}


def _export(recipe: Recipe, seed: int, place: Place, model: torch.nn.Module) -> None:
    data = place.data(recipe.dataset)
    manifest = load_manifest(data)
    description = {
        "recipe": recipe.name,
        "task": recipe.task,
        "dataset": recipe.dataset,
        "model": recipe.model,
        "seed": seed,
        "vocabulary": manifest["vocabulary"],
        "data_hash": manifest["hash"],
    }
    tokenizer = data / "tokenizer.json"
    checkpoint.save_model(
        place.model(recipe, seed), model.state_dict(), description, tokenizer if tokenizer.exists() else None
    )


def describe_cost(model: torch.nn.Module, context: WorkerContext) -> dict[str, Any]:
    """What a model costs: parameters, FLOP of a forward pass for one token, memory, device."""
    device = context.device
    cuda = device.type == "cuda"
    peak = (
        torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    counted = getattr(model, "parameter_count", None)
    return {
        "parameters": counted if counted is not None else sum(p.numel() for p in model.parameters()),
        "flops_per_token": getattr(model, "flops_per_token", None),
        "peak_memory_mb": round(peak, 1),
        "device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads",
        "workers": context.size,
        "energy_joules": None,
    }


def start_folder(recipe: Recipe, seed: int, folder: Path, place: Place) -> None:
    """Make the run's folder. A run that ended is begun anew; an interrupted one keeps what it has."""
    if (folder / "finished.json").exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stop").unlink(missing_ok=True)
    manifest = load_manifest(place.data(recipe.dataset))
    tags = {"recipe": recipe.name, "suite": recipe.suite, "task": recipe.task, "dataset": recipe.dataset,
            "model": recipe.model["name"], "seed": str(seed), "data_hash": manifest["hash"]}  # fmt: skip
    with Journal(folder) as journal:
        journal.tag(tags)
        journal.params({**recipe.model_dump(mode="json", include={"task", "dataset", "model", "train"}), "seed": seed})


def finish_folder(recipe: Recipe, seed: int, folder: Path, place: Place, cost: dict[str, Any]) -> None:
    """Keep the history and the cost as outputs; drop the checkpoints, which nobody needs any more."""
    values = {f"cost/{name}": value for name, value in cost.items() if isinstance(value, int | float)}
    with Journal(folder) as journal:
        journal.metrics(int(cost.get("steps", 0)), values)
        journal.model(place.model(recipe, seed), recipe.name)
        journal.end("FINISHED")
    with new_folder(place.history(recipe, seed)) as partial:
        shutil.copyfile(folder / "journal.jsonl", partial / "journal.jsonl")
        (partial / "cost.json").write_text(json.dumps(cost, indent=1) + "\n")
    (folder / "finished.json").write_text(json.dumps(cost))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(folder / "best", ignore_errors=True)


def load_model(folder: Path) -> tuple[dict[str, Any], torch.nn.Module]:
    """An exported model and its description.

    Raises:
        UserError: not trained yet, damaged, or the weights belong to another vocabulary.
    """
    description = checkpoint.read_description(folder)
    try:
        name, vocabulary = description["model"]["name"], description["vocabulary"]
        options = {key: value for key, value in description["model"].items() if key != "name"}
    except (KeyError, TypeError):
        raise UserError(f"{folder / 'model.json'}: model.name or vocabulary is missing") from None
    module = load_part("models", name, f"{folder / 'model.json'}: model.name")
    model = module.Model(module.Config.model_validate(options), vocabulary)
    path = folder / "weights.safetensors"
    checkpoint.load_weights(model, checkpoint.load_tensors(path), path)
    return description, model.eval()


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
