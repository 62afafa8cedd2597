"""A run on this machine: one recipe, one seed, from prepared data to an exported model.

Needs torch alone; `launch.py` puts it under Ray Train.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from unroll.config import CountingTraining, Recipe, Training, load_part, model_config
from unroll.data.shards import load_manifest, verify
from unroll.errors import UserError
from unroll.files import new_folder, readable_errors
from unroll.journal import Journal
from unroll.memory import keep_freed_memory
from unroll.place import Place, read_description
from unroll.progress import progress
from unroll.training import checkpoint
from unroll.training.context import WorkerContext
from unroll.training.loop import Run, restore_best


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
    check_stream(place.data(recipe.dataset), context.rank, context.size)
    torch.manual_seed(seed)
    task, model = build(recipe, place)
    cost = (
        _count(task, model)
        if isinstance(recipe.train, CountingTraining)
        else _learn_in_phases(task, model, recipe, seed, place, context)
    )
    cost |= describe_cost(model, context)
    if context.is_first:
        _export(task, recipe, seed, place, model)
        finish_folder(recipe, seed, folder, place, cost)
    return cost


def check_stream(folder: Path, worker: int = 0, workers: int = 1) -> None:
    """Compare the shards of a stream with their hashes; each worker takes its share.

    A stream is read at any place, so nobody would notice a flipped bit in it. Hashing costs 1.5 s for a gigabyte; no
    model learns from one in less than a hundred times that. Samples need no look here: their shards are read whole, and
    hashed then.

    Raises:
        UserError: names the damaged file.
    """
    manifest = load_manifest(folder)
    if manifest["kind"] != "stream":
        return
    size = sum(shard["bytes"] for split in manifest["splits"].values() for shard in split["shards"])
    if size < 2**30:  # a second or two
        verify(folder, worker, workers)
        return
    with progress(f"verify {folder.name}", size / workers) as bar:
        verify(folder, worker, workers, bar.advance)


def _learn_in_phases(
    task: Any, model: torch.nn.Module, recipe: Recipe, seed: int, place: Place, context: WorkerContext
) -> dict[str, Any]:
    """Train by gradients, in one phase or in two; leaves the weights to export in the model.

    The first of two phases is a run of its own. If a recipe that is this first phase was trained here with this seed,
    its weights are taken: they are the ones that training it once more would give.
    """
    train, folder = recipe.train, place.run(recipe, seed)
    assert isinstance(train, Training)
    if train.then is None:
        return _learn(task, model, train, seed, folder, context)
    first = recipe.model_copy(update={"train": train.first_phase()})
    weights, cost = _first_phase(first, seed, place, context)
    checkpoint.load_weights(model, checkpoint.load_tensors(weights), weights)
    last = recipe.model_copy(update={"train": train.last_phase(f"recipes.{recipe.name}")})
    torch.manual_seed(seed)
    task, _ = build(last, place)
    last_cost = _learn(task, model, last.train, seed, folder, context)
    return {**last_cost, "minutes": cost["minutes"] + last_cost["minutes"], "minutes_first_phase": cost["minutes"]}


def _first_phase(recipe: Recipe, seed: int, place: Place, context: WorkerContext) -> tuple[Path, dict[str, Any]]:
    """Weights and cost of a first phase: of an exported model that is the same run, else trained now."""
    identity, folder = place.identity(recipe), place.run(recipe, seed)
    for path in sorted((place.root / "models").glob(f"*/seed-{seed}/model.json")):
        if read_description(path.parent).get("identity") == identity:
            cost = place.root / "histories" / path.parts[-3] / f"seed-{seed}" / "cost.json"
            if cost.exists():
                return path.parent / "weights.safetensors", json.loads(cost.read_text())
    weights = folder / "final" / "weights.safetensors"
    if not weights.exists():
        if context.is_first:
            start_folder(recipe, seed, folder, place)
        context.barrier()
        torch.manual_seed(seed)
        task, model = build(recipe, place)
        cost_here = _learn(task, model, recipe.train, seed, folder, context)
        if context.is_first:
            checkpoint.save_model(weights.parent, model.state_dict(), {"cost": cost_here})
        context.barrier()
    return weights, read_description(weights.parent)["cost"]


def _learn(
    task: Any, model: torch.nn.Module, train: Any, seed: int, folder: Path, context: WorkerContext
) -> dict[str, Any]:
    """Train one phase; leaves the best weights in the model, or the last (averaged if asked)."""
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


def _export(task: Any, recipe: Recipe, seed: int, place: Place, model: torch.nn.Module) -> None:
    data = place.data(recipe.dataset)
    manifest = load_manifest(data)
    description = {
        "identity": place.identity(recipe),
        "recipe": recipe.name,
        "task": recipe.task,
        "dataset": recipe.dataset,
        "model": recipe.model,
        "seed": seed,
        "vocabulary": task.vocabulary,
        "data_hash": manifest["hash"],
        **task.description,
    }
    tokenizers = [data / manifest[key] for key in ("tokenizer", "source_tokenizer") if manifest.get(key)]
    checkpoint.save_model(place.model(recipe, seed), model.state_dict(), description, tokenizers)


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
    """Make the run's folder. A run that ended is begun anew; an interrupted one keeps what it has.

    Raises:
        UserError: another process is at this run, or the folder cannot be written.
    """
    with readable_errors(folder):
        if (folder / "finished.json").exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    manifest = load_manifest(place.data(recipe.dataset))
    tags = {"recipe": recipe.name, "suite": recipe.suite, "task": recipe.task, "dataset": recipe.dataset,
            "model": recipe.model["name"], "seed": str(seed), "data_hash": manifest["hash"]}  # fmt: skip
    with Journal(folder) as journal:
        journal.tag(tags)
        stated = {"task", "dataset", "model", "train"}
        journal.params({**recipe.model_dump(mode="json", include=stated, exclude_none=True), "seed": seed})


def finish_folder(recipe: Recipe, seed: int, folder: Path, place: Place, cost: dict[str, Any]) -> None:
    """Keep the history and the cost as outputs; drop the checkpoints, which nobody needs any more."""
    values = {f"training_cost/{name}": value for name, value in cost.items() if isinstance(value, int | float)}
    with Journal(folder) as journal:
        journal.scores(values)
        journal.model(place.model(recipe, seed), recipe.name)
        journal.end("FINISHED")
    with new_folder(place.history(recipe, seed)) as partial:
        shutil.copyfile(folder / "journal.jsonl", partial / "journal.jsonl")
        (partial / "cost.json").write_text(json.dumps(cost, indent=1) + "\n")
    partial = folder / ".finished.json"
    partial.write_text(json.dumps(cost))
    os.replace(partial, folder / "finished.json")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(folder / "best", ignore_errors=True)


def load_model(folder: Path) -> tuple[dict[str, Any], torch.nn.Module]:
    """An exported model and its description.

    Raises:
        UserError: not trained yet, damaged, or the weights belong to another vocabulary.
    """
    description = read_description(folder)
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
