"""Step time of two workers: under Ray Train, the same loop without Ray, and plain DistributedDataParallel under torchrun.

    python benchmarks/ray_step.py [--steps 150] [--rounds 3]      writes benchmarks/results/ray_step.json

Two idle cores are needed. A character LSTM (1 x 256, batch 32 x 64, AdamW, clipped) is trained by two workers of one thread:

    ray        `unroll train --profile two_workers`: our loop in Ray's workers
    bare       our loop in two processes that found each other by torch.distributed alone
    torchrun   the loop that anyone would write: torch.nn modules, DistributedDataParallel, started by torchrun

The three take turns; a figure is the median step of a run, a ratio is taken within a round. Goal: ray / torchrun <= 1.03.
Ray gives its workers a niceness of 15, which other work on the machine would turn into waiting; it is set to 0 here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import yaml

from unroll.config import load_recipe
from unroll.journal import history
from unroll.stages.prepare import prepare
from unroll.training.context import WorkerContext
from unroll.training.runs import Place, train_one

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "ray_step.json"
TEXT = ROOT / "data" / "embedded" / "tiny-shakespeare" / "input.txt"
GOAL = 1.03
ROWS, WINDOW, WIDTH, EMBEDDING = 32, 64, 256, 64
PLAIN = """
import json, sys, time
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
torch.set_num_threads(1)
dist.init_process_group("gloo")
steps, vocabulary, rows, window, width, embedding = map(int, sys.argv[2:])
torch.manual_seed(1)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, width, batch_first=True)
        self.output = nn.Linear(width, vocabulary)
    def forward(self, tokens, state):
        hidden, state = self.lstm(self.embedding(tokens), state)
        return self.output(hidden), state

model = DistributedDataParallel(Model())
optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
rows //= dist.get_world_size()
tokens = torch.randint(vocabulary, (rows, window * 50 + 1))
state, times = None, []
for step in range(steps):
    began = time.perf_counter()
    place = step % 50 * window
    inputs, targets = tokens[:, place : place + window], tokens[:, place + 1 : place + window + 1]
    optimizer.zero_grad(set_to_none=True)
    logits, state = model(inputs, state)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    state = tuple(part.detach() for part in state)
    float(loss)
    times.append(time.perf_counter() - began)
if dist.get_rank() == 0:
    open(sys.argv[1], "w").write(json.dumps(times))
dist.destroy_process_group()
"""


def project(root: Path, steps: int) -> None:
    """A project with one recipe, and a profile of two workers of one thread."""
    root.mkdir()
    shutil.copyfile(TEXT, root / "text.txt")
    options = {"tokenizer": {"kind": "characters"}, "split": {"train": 0.9, "validation": 0.1}}
    dataset = {"preparer": "text", "licence": "public domain", "sources": [{"file": "text.txt"}], "options": options}
    train = {"batch": ROWS, "window": WINDOW, "steps": steps, "validate_every": 10**6, "checkpoint_every": 10**6,
             "log_every": 1, "select": "last",
             "optimizer": {"name": "adamw", "learning_rate": 0.001, "clip": 1.0}}  # fmt: skip
    recipe = {
        "suite": "bench", "task": "language_modeling", "dataset": "text", "train": train,
        "model": {"name": "recurrent_lm", "layers": 1, "width": WIDTH, "embedding": EMBEDDING},
        "evaluate": {"metrics": ["perplexity"]},
    }  # fmt: skip
    (root / "params.yaml").write_text(yaml.safe_dump({"datasets": {"text": dataset}, "suites": {"bench": None}}))
    (root / "recipes").mkdir()
    (root / "recipes" / "language_modeling.yaml").write_text(yaml.safe_dump({"recipes": {"bench": recipe}}))
    (root / "cluster").mkdir()
    (root / "cluster" / "profiles.yaml").write_text("profiles: {two_workers: {workers: 2}}\n")
    prepare(root, "text")


def journalled(root: Path) -> float:
    """Median milliseconds of a step: the journal holds the predictions a second over all steps so far."""
    place = Place(root)
    points = history(place.history(load_recipe(root, "bench"), 1))["train/tokens_per_second"]
    ends = [point.step * ROWS * WINDOW / point.value for point in points]  # seconds in steps
    return 1000 * statistics.median(later - earlier for earlier, later in itertools.pairwise(ends[10:]))


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "UNROLL_TRACK": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "RAY_worker_niceness": "0",
        "PYTHONPATH": str(ROOT / "src"),
    }


def ray(root: Path, steps: int) -> float:
    project(root, steps)
    command = [sys.executable, "-m", "unroll", "train", "bench", "--profile", "two_workers"]
    subprocess.run(command, cwd=root, env=environment(), check=True, capture_output=True)
    return journalled(root)


def bare_worker(rank: int, port: int, root: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    place = Place(Path(root))
    train_one(load_recipe(place.root, "bench"), 1, place, WorkerContext(rank, 2))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def bare(root: Path, steps: int) -> float:
    project(root, steps)
    multiprocessing.spawn(bare_worker, args=(free_port(), str(root)), nprocs=2)
    return journalled(root)


def torchrun(root: Path, steps: int) -> float:
    root.mkdir()
    (root / "plain.py").write_text(PLAIN)
    vocabulary = len(set(TEXT.read_text()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), "plain.py", "times.json"]
    command += [str(number) for number in (steps, vocabulary, ROWS, WINDOW, WIDTH, EMBEDDING)]
    subprocess.run(command, cwd=root, env=environment(), check=True, capture_output=True)
    return 1000 * statistics.median(json.loads((root / "times.json").read_text())[10:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    ways = {"ray": ray, "bare": bare, "torchrun": torchrun}
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(chosen.rounds):
            order = list(ways)[:: 1 if number % 2 else -1]
            rounds.append({name: ways[name](Path(folder) / f"{name}-{number}", chosen.steps) for name in order})
    result: dict[str, Any] = {"steps": chosen.steps, "rounds": rounds}
    for name in ways:
        print(f"{name:<10} {statistics.median(entry[name] for entry in rounds):7.1f} ms a step")
    for name, (above, below) in {"ray_over_torchrun": ("ray", "torchrun"), "ray_over_bare": ("ray", "bare")}.items():
        ratios = [entry[above] / entry[below] for entry in rounds]
        result[name] = statistics.median(ratios)
        goal = f"   goal <= {GOAL}" if below == "torchrun" else ""
        print(f"{name:<18} {result[name]:6.3f}   by round {' '.join(f'{ratio:.3f}' for ratio in ratios)}{goal}")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
