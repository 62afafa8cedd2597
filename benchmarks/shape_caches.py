"""What bounding oneDNN's caches of compiled shapes costs and saves (`unroll.memory.keep_few_compiled_shapes`).

    python benchmarks/shape_caches.py            prints a table, writes benchmarks/results/shape_caches.json
    python benchmarks/shape_caches.py --quick    few steps: shows that it works

Two processes train the same translator on the same batches, one with the caches as torch has them, one with ours. They
take turns, some steps each; the ratio is the median over the turns of the ratio of seconds within a turn. The weights
at the end must be the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from unroll.config import Training, load_recipe
from unroll.memory import COMPILED_SHAPES, keep_freed_memory, return_unused
from unroll.place import Place
from unroll.stages.prepare import prepare
from unroll.training.context import WorkerContext
from unroll.training.loop import RETURN_MEMORY_EVERY, Run
from unroll.training.runs import build

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "shape_caches.json"
RECIPES = ("multi30k_attention", "multi30k_bytenet")
CACHES = {"torch's": dict.fromkeys(COMPILED_SHAPES, "1024"), "ours": COMPILED_SHAPES}


def train(name: str, steps: int) -> None:
    """Take `steps` for each line of input and answer with a line: seconds, peak memory in MB, hash of the weights."""
    keep_freed_memory()
    torch.set_num_threads(1)
    recipe = load_recipe(ROOT, name)
    torch.manual_seed(1)
    task, model = build(recipe, Place(ROOT))
    assert isinstance(recipe.train, Training)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(task, model, recipe.train, 1, Path(folder), WorkerContext())
        loader = task.loader(1, run.context, None)
        for _ in sys.stdin:
            began = time.perf_counter()
            for _ in range(steps):
                run.step(next(loader))
                if run.progress.step % RETURN_MEMORY_EVERY == 0:
                    return_unused()
            seconds = time.perf_counter() - began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
            weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
            print(json.dumps({"seconds": seconds, "peak_mb": peak, "weights": weights}), flush=True)
        loader.close()


def compare(name: str, turns: int, steps: int) -> dict[str, Any]:
    """Both processes turn by turn; the first turn is not timed."""
    if not (Place(ROOT).data(load_recipe(ROOT, name).dataset) / "manifest.json").exists():
        prepare(ROOT, load_recipe(ROOT, name).dataset)
    command = [sys.executable, __file__, "--train", name, "--steps", str(steps)]
    processes = {
        who: subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **caches}
        )
        for who, caches in CACHES.items()
    }
    answers: dict[str, list[dict[str, Any]]] = {who: [] for who in CACHES}
    for _ in range(turns + 1):
        for who, process in processes.items():
            assert process.stdin
            assert process.stdout
            process.stdin.write("\n")
            process.stdin.flush()
            answers[who].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    last = {who: values[-1] for who, values in answers.items()}
    if last["ours"]["weights"] != last["torch's"]["weights"]:
        sys.exit(f"{name}: the weights differ after {(turns + 1) * steps} updates")
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(answers["torch's"][1:], answers["ours"][1:], strict=True)]
    peaks = {who: value["peak_mb"] for who, value in last.items()}
    return {"recipe": name, "updates": (turns + 1) * steps, "time_ratio": statistics.median(ratios), "peak_mb": peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--train", help="be one of the processes: a recipe")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.steps)
        return
    rows = [compare(name, *((1, 2) if options.quick else (12, options.steps))) for name in RECIPES]
    print(
        f"torch {torch.__version__}, one thread; entries: {', '.join(f'{k} {v}' for k, v in COMPILED_SHAPES.items())}\n"
    )
    print("| recipe | updates | peak, torch's caches | peak, ours | time, ours / torch's |\n|---|---|---|---|---|")
    for row in rows:
        before, after = row["peak_mb"]["torch's"], row["peak_mb"]["ours"]
        print(f"| {row['recipe']} | {row['updates']} | {before:,.0f} MB | {after:,.0f} MB | {row['time_ratio']:.2f} |")
    RESULT.write_text(json.dumps({"quick": options.quick, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
