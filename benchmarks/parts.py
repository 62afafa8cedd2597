"""What `train.parts` costs: steps of the char_lstm recipe with the batch cut into parts, and its sum over workers.

    python benchmarks/parts.py            prints a table, writes benchmarks/results/parts.json
    python benchmarks/parts.py --quick    few steps: shows that it works

Steps: one worker trains 2 x 512 on batches of 32 x 128 in bf16, undivided and cut into 2, 4 and 8 parts. The variants
take turns, some steps each; a ratio is the median over the turns of the ratio within a turn.

Sums: as many float32 numbers as the model has gradients are added over processes on this machine (gloo), by the
all-reduce that training uses without parts and in the order of a tree.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from unroll.config import Recipe, Training, load_recipe, merge
from unroll.memory import keep_freed_memory
from unroll.place import Place
from unroll.stages.prepare import prepare
from unroll.training.context import WorkerContext
from unroll.training.loop import Run
from unroll.training.runs import build
from unroll.training.sums import add_over_workers_in_tree

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "parts.json"
PARTS = (None, 2, 4, 8)


def start(recipe: Recipe, place: Place, parts: int | None, folder: Path) -> tuple[Run, Any]:
    """A run of the recipe cut into `parts`, and its loader."""
    assert isinstance(recipe.train, Training)
    train = Training.model_validate(merge(recipe.train.model_dump(mode="json"), {"parts": parts}))
    recipe = recipe.model_copy(update={"train": train})
    torch.manual_seed(1)
    task, model = build(recipe, place)
    run = Run(task, model, train, 1, folder, WorkerContext())
    return run, task.loader(1, run.context, None)


def seconds_a_step(run: Run, loader: Any, steps: int) -> float:
    batches = [next(loader) for _ in range(steps)]
    began = time.perf_counter()
    for batch in batches:
        run.step(batch)
    return (time.perf_counter() - began) / steps


def steps_table(turns: int, steps: int) -> tuple[list[dict[str, Any]], int]:
    """Milliseconds a step for each number of parts, and the number of parameters."""
    keep_freed_memory()
    recipe, place = load_recipe(ROOT, "char_lstm"), Place(ROOT)
    if not (place.data(recipe.dataset) / "manifest.json").exists():
        prepare(ROOT, recipe.dataset)
    with tempfile.TemporaryDirectory() as folder:
        runs = [start(recipe, place, parts, Path(folder)) for parts in PARTS]
        for run, loader in runs:
            seconds_a_step(run, loader, 1)
        times = [[seconds_a_step(run, loader, steps) for run, loader in runs] for _ in range(turns)]
        for _, loader in runs:
            loader.close()
    rows = []
    for number, parts in enumerate(PARTS):
        ratio = statistics.median(turn[number] / turn[0] for turn in times)
        milliseconds = 1000 * statistics.median(turn[number] for turn in times)
        rows.append({"parts": parts, "milliseconds": milliseconds, "over_undivided": ratio})
    return rows, sum(parameter.numel() for parameter in runs[0][0].policy.parameters)


def sum_worker(rank: int, workers: int, port: int, numbers: int, rounds: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    tensor = torch.zeros(numbers)
    ways = {
        "all_reduce": lambda: dist.all_reduce(tensor),
        "tree": lambda: add_over_workers_in_tree(tensor, rank, workers),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            dist.barrier()
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    if rank == 0:
        Path(out).write_text(json.dumps({name: values[1:] for name, values in times.items()}))
    dist.destroy_process_group()


def sums_table(numbers: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a sum over 2 and 4 processes."""
    rows = []
    for workers in (2, 4):
        with socket.socket() as free, tempfile.NamedTemporaryFile() as out:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            multiprocessing.spawn(sum_worker, (workers, port, numbers, rounds, out.name), nprocs=workers)
            times = json.loads(Path(out.name).read_text())
        ratio = statistics.median(t / a for t, a in zip(times["tree"], times["all_reduce"], strict=True))
        medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
        rows.append({"workers": workers, **medians, "tree_over_all_reduce": ratio})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    steps, parameters = steps_table(turns=1 if quick else 9, steps=1 if quick else 3)
    sums = sums_table(parameters, rounds=2 if quick else 30)
    print(f"one worker, {torch.get_num_threads()} threads, {parameters:,} parameters\n")
    print("| parts | ms/step | over undivided |")
    print("|---|---|---|")
    for row in steps:
        print(f"| {row['parts'] or 'undivided'} | {row['milliseconds']:.1f} | {row['over_undivided']:.2f} |")
    print(f"\nsum of {4 * parameters / 1e6:.1f} MB over processes of this machine\n")
    print("| workers | all-reduce, ms | tree, ms | tree / all-reduce |")
    print("|---|---|---|---|")
    for row in sums:
        ratio = row["tree_over_all_reduce"]
        print(f"| {row['workers']} | {row['all_reduce']:.1f} | {row['tree']:.1f} | {ratio:.2f} |")
    RESULT.write_text(json.dumps({"quick": quick, "steps": steps, "sums": sums}, indent=1) + "\n")


if __name__ == "__main__":
    main()
