"""Step time of two workers: under Ray Train, the same loop without Ray, and plain DistributedDataParallel under torchrun.

    python benchmarks/ray_step.py [--rounds 3]      writes benchmarks/results/ray_step.json

Two idle cores are needed. Two character LSTMs in float32, AdamW, clipped, are trained by two workers of one thread each:
1 x 256 on batches of 32 x 64, a step of some 25 ms, where every fixed cost shows; and 2 x 512 on 32 x 128, as in
the recipe `char_lstm`.

    ray        `unroll train --profile two_workers`: our loop in Ray's workers
    bare       our loop in two processes that found each other by torch.distributed alone
    torchrun   the loop that anyone would write: torch.nn modules, DistributedDataParallel, started by torchrun, which
               keeps its freed memory as ours does (without that the larger model is a quarter slower)

The three take turns; a figure is the median over a run of the mean step between two journal entries, ten steps apart,
by the clock: reading the batch, the loop, the journal are all in it. A ratio is taken within a round. Goal: ray /
torchrun <= 1.03. Where others use the machine too, rounds differ by half; then look at "fastest", the ratio of the
quickest ten steps of each in all rounds, which what comes from outside can only lengthen. Ray gives its workers a
niceness of 15, which other work on the machine would turn into waiting; it is set to 0 here.
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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import yaml

from unroll.config import load_recipe
from unroll.journal import history
from unroll.place import Place
from unroll.stages.prepare import prepare
from unroll.training.context import WorkerContext
from unroll.training.runs import train_one

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "ray_step.json"
TEXT = ROOT / "data" / "embedded" / "tiny-shakespeare" / "input.txt"
GOAL = 1.03
EVERY = 10  # steps from one time taken to the next


class Size(NamedTuple):
    """A model, its batch, and how many steps it is trained."""

    rows: int
    window: int
    layers: int
    width: int
    embedding: int
    steps: int


SIZES = {"1x256": Size(32, 64, 1, 256, 64, 200), "2x512": Size(32, 128, 2, 512, 128, 80)}
PLAIN = """
import json, sys, time
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from unroll.memory import keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
dist.init_process_group("gloo")
every, vocabulary, rows, window, layers, width, embedding, steps = map(int, sys.argv[2:])
torch.manual_seed(1)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, width, layers, batch_first=True)
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
    if (step + 1) % every == 0:
        times.append(time.perf_counter())
if dist.get_rank() == 0:
    open(sys.argv[1], "w").write(json.dumps(times))
dist.destroy_process_group()
"""


def project(root: Path, size: Size) -> None:
    """A project with one recipe, and a profile of two workers of one thread."""
    root.mkdir()
    shutil.copyfile(TEXT, root / "text.txt")
    options = {"tokenizer": {"kind": "characters"}, "split": {"train": 0.9, "validation": 0.1}}
    dataset = {"preparer": "text", "licence": "public domain", "sources": [{"file": "text.txt"}], "options": options}
    train = {"batch": size.rows, "window": size.window, "steps": size.steps, "validate_every": 10**6,
             "checkpoint_every": 10**6, "log_every": EVERY, "select": "last",
             "optimizer": {"name": "adamw", "learning_rate": 0.001, "clip": 1.0}}  # fmt: skip
    recipe = {
        "suite": "bench", "task": "language_modeling", "dataset": "text", "train": train,
        "model": {"name": "recurrent_lm", "layers": size.layers, "width": size.width, "embedding": size.embedding},
        "evaluate": {"metrics": ["perplexity"]},
    }  # fmt: skip
    (root / "params.yaml").write_text(yaml.safe_dump({"datasets": {"text": dataset}, "suites": {"bench": None}}))
    (root / "recipes").mkdir()
    (root / "recipes" / "language_modeling.yaml").write_text(yaml.safe_dump({"recipes": {"bench": recipe}}))
    (root / "cluster").mkdir()
    (root / "cluster" / "profiles.yaml").write_text("profiles: {two_workers: {workers: 2}}\n")
    prepare(root, "text")


def step_ms(times: list[float]) -> list[float]:
    """Milliseconds of a step, from the seconds at which each tenth one ended; the first ten warm up."""
    return [1000 * (after - before) / EVERY for before, after in itertools.pairwise(times)]


def journalled(root: Path) -> list[float]:
    place = Place(root)
    points = history(place.history(load_recipe(root, "bench"), 1))["train/loss"]
    return step_ms([point.time for point in points if point.step % EVERY == 0])


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "UNROLL_TRACK": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "RAY_worker_niceness": "0",
        "PYTHONPATH": str(ROOT / "src"),
    }


def ray(root: Path, size: Size) -> list[float]:
    project(root, size)
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


def bare(root: Path, size: Size) -> list[float]:
    project(root, size)
    multiprocessing.spawn(bare_worker, args=(free_port(), str(root)), nprocs=2)
    return journalled(root)


def torchrun(root: Path, size: Size) -> list[float]:
    root.mkdir()
    (root / "plain.py").write_text(PLAIN)
    vocabulary = len(set(TEXT.read_text()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), "plain.py", "times.json"]
    command += [str(number) for number in (EVERY, vocabulary, *size)]
    subprocess.run(command, cwd=root, env=environment(), check=True, capture_output=True)
    return step_ms(json.loads((root / "times.json").read_text()))


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step of each way in each round, and the ratios."""
    ways = {"ray": ray, "bare": bare, "torchrun": torchrun}
    found: list[dict[str, list[float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            order = list(ways)[:: 1 if number % 2 else -1]
            found.append({name: ways[name](Path(folder) / f"{name}-{number}", size) for name in order})
    measured = [{name: statistics.median(times) for name, times in entry.items()} for entry in found]
    fastest = {name: min(min(entry[name]) for entry in found) for name in ways}
    pairs = {"ray_over_torchrun": ("ray", "torchrun"), "ray_over_bare": ("ray", "bare")}
    ratios = {name: [entry[above] / entry[below] for entry in measured] for name, (above, below) in pairs.items()}
    return {"rounds": measured, "fastest": fastest, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    result = {name: measure(size, chosen.rounds) for name, size in SIZES.items()}
    for name, found in result.items():
        for way in found["rounds"][0]:
            print(f"{name}  {way:<18} {statistics.median(entry[way] for entry in found['rounds']):7.1f} ms a step")
        for ratio, goal in {"ray_over_torchrun": f"   goal <= {GOAL}", "ray_over_bare": ""}.items():
            above, below = ratio.split("_over_")
            by_round = " ".join(f"{value:.3f}" for value in found[ratio])
            fastest = found["fastest"][above] / found["fastest"][below]
            print(
                f"{name}  {ratio:<18} {statistics.median(found[ratio]):7.3f}   by round {by_round}   fastest {fastest:.3f}{goal}"
            )
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
