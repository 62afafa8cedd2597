"""`unroll ls` and `unroll show`: what recipes there are, how they stand, and what one of them would cost."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unroll.config import CountingTraining, Recipe, load_datasets, load_recipe, load_recipes, model_config
from unroll.data.shards import load_manifest
from unroll.errors import UserError
from unroll.journal import is_being_written
from unroll.layers.language_model import LanguageModel
from unroll.place import Place
from unroll.training.context import WorkerContext, row_slices
from unroll.training.launch import load_profile, worker_count
from unroll.training.loop import autocast
from unroll.training.runs import build

GUESSED_EFFICIENCY = 0.5
"""Share of the machine's matrix rate that a training step reaches, for the estimate of `show`."""


def print_recipes(root: Path, suite: str | None) -> None:
    """One line a recipe: suite, data set, model, state, primary score."""
    recipes = load_recipes(root)
    suites = sorted({recipe.suite for recipe in recipes.values()})
    if suite is not None and suite not in suites:
        raise UserError(f"suite {suite!r}: no recipe belongs to it (allowed: {', '.join(suites)})")
    table = Table(box=None, pad_edge=False)
    for column in ("recipe", "suite", "data set", "model", "state", "score"):
        table.add_column(column, no_wrap=column != "score")
    for recipe in sorted(recipes.values(), key=lambda r: (suites.index(r.suite), r.dataset)):
        if suite in (None, recipe.suite):
            cells = (recipe.name, recipe.suite, recipe.dataset, recipe.model.get("name", "?"))
            table.add_row(*map(escape, (*cells, state(recipe, root), score(recipe, root))))
    console = Console()
    console.width = console.width if console.is_terminal else 160
    console.print(table)


def state(recipe: Recipe, root: Path) -> str:
    """How far a recipe has come here."""
    place, seeds = Place(root), recipe.seeds
    if all(place.predictions(recipe, seed).exists() for seed in recipe.predicted_seeds):
        return "evaluated" if (root / "results" / recipe.suite / f"{recipe.name}.json").exists() else "predicted"
    if all(place.model(recipe, seed).exists() for seed in seeds):
        return "trained"
    if not place.data(recipe.dataset).exists():
        return "data not prepared"
    if any(is_being_written(place.run(recipe, seed)) for seed in seeds):
        return "training"
    if any((place.run(recipe, seed) / "checkpoints").exists() for seed in seeds):
        return "interrupted"
    return "not trained"


def score(recipe: Recipe, root: Path) -> str:
    """The primary metric with its interval from results/, if there is one."""
    path = root / "results" / recipe.suite / f"{recipe.name}.json"
    if not path.exists():
        return ""
    result = json.loads(path.read_text())
    metric = result["metrics"][result["primary"]]
    value, low, high = (
        None if metric[key] is None else f"{float(metric[key]):#.4g}" for key in ("value", "low", "high")
    )
    return f"{result['primary']} {value}" + (f" [{low}, {high}]" if low else "")


def print_recipe(root: Path, name: str, tiny: bool) -> None:
    """The dry run: what would run, shapes, parameters, memory and time."""
    recipe, place, console = load_recipe(root, name, tiny), Place(root), Console()
    console.print(f"[bold]{escape(recipe.title or name)}[/bold]  suite {recipe.suite}, task {recipe.task}")
    entry = load_datasets(root)[recipe.dataset]
    sources = f"{len(entry.sources)} source file(s)" if entry.sources else "generated"
    console.print(f"data      {recipe.dataset} ({escape(entry.licence)}): {sources}")
    console.print(f"model     {escape(str(model_config(recipe)))}")
    if not place.data(recipe.dataset).exists():
        console.print(f"shapes    unknown until the data is prepared: unroll prepare {recipe.dataset}")
        return
    manifest = load_manifest(place.data(recipe.dataset))
    splits = ", ".join(f"{split} {size(content)}" for split, content in manifest["splits"].items())
    console.print(f"splits    {splits}; vocabulary {manifest['vocabulary']}")
    console.print(f"would run train ({state(recipe, root)}), predict, evaluate for seeds {recipe.seeds}")
    if isinstance(recipe.train, CountingTraining):
        console.print("training  one pass of counting over the training tokens; no gradients")
        return
    _print_cost(recipe, root, console)
    if recipe.train.then:
        console.print(f"then      a second phase, not in these figures: {escape(str(recipe.train.then))}")


def size(split: dict[str, Any]) -> str:
    """How much a split holds, as the manifest says."""
    for unit in ("tokens", "samples"):
        if split.get(unit) is not None:
            return f"{split[unit]:,} {unit}"
    return "generated without end"


def _print_cost(recipe: Recipe, root: Path, console: Console) -> None:
    train: Any = recipe.train
    task, model = build(recipe, Place(root))
    workers = worker_count(load_profile(root, "local"))
    if not (hasattr(task, "example") or isinstance(model, LanguageModel)):
        _print_cost_of_samples(task, model, recipe, workers, console)
        return
    slices = row_slices(train, WorkerContext())
    _, length = _row(task, train)
    console.print(
        f"batch     {train.batch} rows x {length} tokens in {len(slices)} pass(es), workers {workers}, {train.precision}"
    )
    _print_parameters(model, console)
    for state_name, value in model.initial_state(train.batch).items():  # type: ignore[operator]
        console.print(f"carried   {state_name} {list(value.shape)}".replace("[", "\\["))
    parameters = sum(p.numel() for p in model.parameters())
    steps = task.total_steps(recipe.seeds[0])
    memory = (parameters * 16 + _activation_bytes(task, model, recipe)) / 2**20
    seconds = _seconds(model, train, length, steps)
    console.print(
        f"total     {parameters:,} parameters, {steps:,} steps, about {memory:,.0f} MB beside Python and torch"
    )
    console.print(f"time      about {seconds / 60:.1f} minutes a seed here (matrix rate x {GUESSED_EFFICIENCY})")


def _print_parameters(model: torch.nn.Module, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("parameter", "shape", "count"):
        table.add_column(column, justify="right" if column == "count" else "left")
    for parameter_name, parameter in model.named_parameters():
        table.add_row(escape(parameter_name), str(list(parameter.shape)).replace("[", "\\["), f"{parameter.numel():,}")
    console.print(table)


def _print_cost_of_samples(
    task: Any, model: torch.nn.Module, recipe: Recipe, workers: object, console: Console
) -> None:
    """Samples differ in size, so one batch is run forwards and backwards: its memory, and its time for every step."""
    train: Any = recipe.train
    with task.loader(recipe.seeds[0], WorkerContext(), None) as loader:
        batch = next(iter(loader))[0]
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in batch.tensors.items())
    size = f"{train.batch_tokens} tokens" if train.batch is None else f"{train.batch} samples"
    console.print(f"batch     {size}, workers {workers}, {train.precision}")
    console.print(escape(f"          the first one: {shapes}"))
    _print_parameters(model, console)
    kept: dict[int, int] = {}
    started = time.perf_counter()
    with autocast(train, torch.device("cpu")), torch.autograd.graph.saved_tensors_hooks(_noting(kept), lambda t: t):
        task.loss(model.train(), batch, None).objective.backward()
    seconds = time.perf_counter() - started
    parameters = sum(p.numel() for p in model.parameters())
    steps = task.total_steps(recipe.seeds[0])
    memory = (parameters * 16 + sum(kept.values())) / 2**20
    console.print(
        f"total     {parameters:,} parameters, {steps:,} steps, about {memory:,.0f} MB beside Python and torch"
    )
    console.print(f"time      about {steps * seconds / 60:.1f} minutes a seed here (one batch, measured)")


def _noting(kept: dict[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook that notes the storage of every tensor kept for the backward pass."""

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    return note


def _activation_bytes(task: Any, model: torch.nn.Module, recipe: Recipe) -> float:
    """Bytes kept for the backward pass, measured on one row of a few tokens and scaled to the batch."""
    train: Any = recipe.train
    row, length = _row(task, train)
    kept: dict[int, int] = {}
    with autocast(train, torch.device("cpu")), torch.autograd.graph.saved_tensors_hooks(_noting(kept), lambda t: t):
        model(row, model.initial_state(1))  # type: ignore[operator]
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    bytes_kept = sum(size for pointer, size in kept.items() if pointer not in parameters)
    rows_per_pass = train.rows_per_pass or math.ceil(train.batch / (train.parts or 1))
    return bytes_kept * rows_per_pass * length / row.shape[1]


def _row(task: Any, train: Any) -> tuple[torch.Tensor, int]:
    """A row to try a model on, [1,T] or [1,T,D], and how long a row of a training step is."""
    if hasattr(task, "example"):
        row: torch.Tensor = task.example()
        return row, row.shape[1]
    return torch.zeros(1, min(train.window, 16), dtype=torch.int64), train.window


def _seconds(model: torch.nn.Module, train: Any, length: int, steps: int) -> float:
    """Three forward passes' work for every token, at half the matrix rate measured now."""
    flops = getattr(model, "flops_per_token", None) or 2 * sum(p.numel() for p in model.parameters())
    return 3 * flops * train.batch * length * steps / (GUESSED_EFFICIENCY * matrix_rate(train.precision))


def matrix_rate(precision: str, size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of this machine's matrix product at a precision; the best of a few."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(
        size, size, device=device, dtype={"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
    )
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
