"""What the training loop costs over a bare one, what Ray's local mode adds, and how long a step waits for data.

    python benchmarks/loop.py            prints a table, writes benchmarks/results/loop.json

The same model and batches are trained by (a) a bare PyTorch loop: next batch, loss, backward, clip, step; (b) this
project's loop with its journal; (c) the same under Ray Train's local mode. The three take turns; ratios are medians over
rounds. Step times come from one clock in all three: the time between the first and the last step of a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from unroll.config import Recipe, load_recipe
from unroll.data.loader import Batch
from unroll.journal import history
from unroll.layers.dropout import dropout_place
from unroll.place import Place
from unroll.stages.prepare import prepare
from unroll.training.context import WorkerContext
from unroll.training.launch import Profile, launch
from unroll.training.loop import autocast
from unroll.training.optimizers import OptimizerPolicy
from unroll.training.runs import build, train_one

RESULT = Path(__file__).parent / "results" / "loop.json"
TEXT = Path(__file__).parents[1] / "data" / "embedded" / "tiny-shakespeare" / "input.txt"


def project(root: Path, steps: int) -> tuple[Recipe, Place]:
    """A project with one recipe: a character LSTM whose step takes some tens of milliseconds."""
    (root / "text.txt").write_bytes(TEXT.read_bytes())
    options = {"tokenizer": {"kind": "characters"}, "split": {"train": 0.9, "validation": 0.1}}
    dataset = {"preparer": "text", "licence": "public domain", "sources": [{"file": "text.txt"}], "options": options}
    optimizer = {"name": "adamw", "learning_rate": 0.001, "clip": 1.0}
    train = {"batch": 32, "window": 64, "steps": steps, "precision": "bf16", "optimizer": optimizer, "select": "last"}
    train |= {"validate_every": 10**6, "checkpoint_every": 10**6}
    recipe = {
        "suite": "bench",
        "task": "language_modeling",
        "dataset": "text",
        "model": {"name": "recurrent_lm", "layers": 1, "width": 256, "embedding": 64},
        "train": train,
        "evaluate": {"metrics": ["perplexity"]},
    }
    (root / "params.yaml").write_text(yaml.safe_dump({"datasets": {"text": dataset}}))
    (root / "recipes").mkdir()
    (root / "recipes" / "language_modeling.yaml").write_text(yaml.safe_dump({"recipes": {"bench": recipe}}))
    prepare(root, "text")
    return load_recipe(root, "bench"), Place(root)


def bare(recipe: Recipe, place: Place) -> float:
    """Milliseconds a step of the loop anyone would write."""
    train: Any = recipe.train
    task, model = build(recipe, place)
    policy = OptimizerPolicy(train.optimizer, model, train.steps)
    device, carry, marks = torch.device("cpu"), None, []
    model.train()
    with task.loader(1, WorkerContext(), None) as loader:
        for step, batches in zip(range(train.steps), loader, strict=False):
            batch: Batch = batches[0]
            policy.optimizer.zero_grad()
            with dropout_place(1, step, 0, batch.total_rows), autocast(train, device):
                loss = task.loss(model, batch, carry)
            (loss.objective / batch.weight).backward()
            carry = loss.carry
            policy.clip()
            policy.step(step)
            marks.append(time.time())
    return per_step(marks)


def ours(recipe: Recipe, place: Place, ray: bool) -> tuple[float, float]:
    """Milliseconds a step of our loop, and the share of it spent waiting for data."""
    cost = launch(recipe, 1, place, Profile(workers=0)) if ray else train_one(recipe, 1, place, WorkerContext())
    points = history(place.history(recipe, 1))["train/loss"]
    milliseconds = 1000 * (points[-1].time - points[0].time) / (points[-1].step - points[0].step)
    return milliseconds, cost["seconds_waiting_for_data"] / (60 * cost["minutes"])


def per_step(marks: list[float]) -> float:
    return 1000 * (marks[-1] - marks[9]) / (len(marks) - 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe, place = project(Path(folder), chosen.steps)
        train_one(recipe, 1, place, WorkerContext())  # warm the caches; also keeps freed memory for all that follow
        rows = []
        for _ in range(chosen.rounds):
            plain = bare(recipe, place)
            loop, waiting = ours(recipe, place, ray=False)
            local, waiting_local = ours(recipe, place, ray=True)
            rows.append((plain, loop / plain - 1, local / plain - 1, max(waiting, waiting_local)))
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    names = ("bare_step_ms", "loop_over_bare", "ray_local_over_bare", "waiting_for_data")
    goals = (None, None, 0.02, 0.02)
    result = {"rounds": chosen.rounds, "steps": chosen.steps, **dict(zip(names, medians, strict=True))}
    for name, value, goal in zip(names, medians, goals, strict=True):
        print(f"{name:<22} {value:8.4f}" + (f"   goal <= {goal}" if goal is not None else ""))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
