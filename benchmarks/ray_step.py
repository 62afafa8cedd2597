"""Step time of two workers: under Ray Train, the same loop without Ray, and plain DistributedDataParallel under torchrun.

    python benchmarks/ray_step.py [--turns 30]      writes benchmarks/results/ray_step.json

Two idle cores are needed. Two character LSTMs in float32, AdamW, clipped, are trained by two workers of one thread each:
1 x 256 on batches of 32 x 64, a step of some 25 ms, where every fixed cost shows; and 2 x 512 on 32 x 128, as in
the recipe `char_lstm`.

    ray        `unroll train --profile two_workers`: our loop in Ray's workers
    bare       our loop in two processes that found each other by torch.distributed alone
    torchrun   the loop that anyone would write: torch.nn modules, DistributedDataParallel, started by torchrun, which
               keeps its freed memory as ours does (without that the larger model is a quarter slower)

All three train at the same time and take turns of some seconds: two of them are stopped (SIGSTOP, with all that they
started, Ray's own processes too) while the third one goes on. So a machine whose speed changes within minutes changes
it for all alike. Ten steps, or two of the larger model, are timed by the clock, less the time in which they stood
still: reading the batch, the loop, the journal are all in it. A ratio is that of the medians within a round of turns;
the figure is the median over the rounds, with its quartiles. Goal: ray / torchrun <= 1.03. Ray gives its workers a
niceness of 15, which other work on the machine would turn into waiting; it is set to 0 here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil
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
TURN_SECONDS = 4.0


class Size(NamedTuple):
    """A model, its batch, the most steps that it is trained, and how many from one time taken to the next."""

    rows: int
    window: int
    layers: int
    width: int
    embedding: int
    steps: int
    every: int


SIZES = {"1x256": Size(32, 64, 1, 256, 64, 100_000, 10), "2x512": Size(32, 128, 2, 512, 128, 100_000, 2)}
PLAIN = """
import sys, time
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from unroll.memory import keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
dist.init_process_group("gloo")
vocabulary, rows, window, layers, width, embedding, steps, every = map(int, sys.argv[1:])
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
state = None
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
    if (step + 1) % every == 0 and dist.get_rank() == 0:
        print(time.time(), flush=True)
"""


def project(root: Path, size: Size) -> None:
    """A project with one recipe, and a profile of two workers of one thread."""
    root.mkdir()
    shutil.copyfile(TEXT, root / "text.txt")
    options = {"tokenizer": {"kind": "characters"}, "split": {"train": 0.9, "validation": 0.1}}
    dataset = {"preparer": "text", "licence": "public domain", "sources": [{"file": "text.txt"}], "options": options}
    train = {"batch": size.rows, "window": size.window, "steps": size.steps, "validate_every": 10**6,
             "checkpoint_every": 10**6, "log_every": size.every, "select": "last",
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


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "UNROLL_TRACK": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "RAY_worker_niceness": "0",
        "PYTHONPATH": str(ROOT / "src"),
    }


class Way:
    """One way of training two workers: its processes, and when they stood still."""

    def __init__(self, name: str, root: Path, size: Size) -> None:
        self.name, self.root, self.every, self.still = name, root, size.every, list[tuple[float, float]]()
        if name == "torchrun":
            root.mkdir()
            (root / "plain.py").write_text(PLAIN)
            vocabulary = len(set(TEXT.read_text()))
            command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
            command += ["--master-port", str(free_port()), "plain.py", *map(str, (vocabulary, *size))]
        else:
            project(root, size)
            command = ["-m", "unroll", "train", "bench", "--profile", "two_workers"]
            if name == "bare":
                command = [__file__, "--bare", str(root)]
        with (root / "out.txt").open("w") as out, (root / "errors.txt").open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=root, env=environment(), stdout=out, stderr=errors
            )

    def times(self) -> list[float]:
        """When each tenth (or second) step ended, in seconds since 1970."""
        if self.name == "torchrun":
            *ended, _ = (self.root / "out.txt").read_text().split("\n")  # the last line may be half written
            return [float(line) for line in ended]
        journals = list(self.root.glob("runs/bench-*/seed-1"))
        points = history(journals[0]).get("train/loss", []) if journals else []
        return [point.time for point in points if point.step % self.every == 0]

    def signal(self, number: int) -> None:
        """Send a signal to every process of this way."""
        for process in [self.process_tree, *self.process_tree.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    @property
    def process_tree(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def stop(self) -> None:
        self.signal(signal.SIGSTOP)
        self.still.append((time.time(), math.inf))

    def go_on(self) -> None:
        self.still[-1] = (self.still[-1][0], time.time())
        self.signal(signal.SIGCONT)

    def wait_until_it_trains(self) -> None:
        while len(self.times()) < 2:
            if self.process.poll() is not None:
                sys.exit(f"{self.name}: {(self.root / 'errors.txt').read_text()[-2000:]}")
            time.sleep(0.2)

    def steps(self) -> list[tuple[float, float]]:
        """(when some steps ended, milliseconds of one of them): without the time in which they stood still."""
        found = []
        for before, after in itertools.pairwise(self.times()):
            stood = sum(max(0.0, min(after, end) - max(before, start)) for start, end in self.still)
            found.append((after, 1000 * (after - before - stood) / self.every))
        return found

    def end(self) -> None:
        """Kill what there is of it."""
        processes = [self.process_tree, *self.process_tree.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def bare_worker(rank: int, port: int, root: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=600))
    place = Place(Path(root))
    train_one(load_recipe(place.root, "bench"), 1, place, WorkerContext(rank, 2))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def measure(size: Size, turns: int) -> dict[str, Any]:
    """Milliseconds of a step of each way in each round of turns, and the ratios."""
    ways: list[Way] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in ("ray", "bare", "torchrun"):
                way = Way(name, Path(folder) / name, size)
                ways.append(way)
                way.wait_until_it_trains()
                way.stop()
            begins = []
            for number in range(turns):
                begins.append(time.time())
                for way in ways[:: 1 if number % 2 else -1]:
                    way.go_on()
                    time.sleep(TURN_SECONDS)
                    way.stop()
            steps = {way.name: way.steps() for way in ways}
        finally:
            for way in ways:
                way.end()
    rounds = []
    for begin, end in itertools.pairwise([*begins, math.inf]):
        within = {name: [ms for ended, ms in found if begin <= ended < end] for name, found in steps.items()}
        if all(within.values()):
            rounds.append({name: statistics.median(values) for name, values in within.items()})
    pairs = {"ray_over_torchrun": ("ray", "torchrun"), "ray_over_bare": ("ray", "bare")}
    ratios = {name: [entry[above] / entry[below] for entry in rounds] for name, (above, below) in pairs.items()}
    return {"rounds": rounds, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--bare", help="be the way without Ray: a project's folder")
    options = parser.parse_args()
    if options.bare:
        multiprocessing.spawn(bare_worker, args=(free_port(), options.bare), nprocs=2)
        return
    result = {name: measure(size, options.turns) for name, size in SIZES.items()}
    print(f"turns of {TURN_SECONDS:.0f} s; median over the rounds of turns, and its quartiles\n")
    print(
        "| model | ray, ms a step | bare | torchrun | ray / torchrun, goal <= 1.03 | ray / bare |\n|---|---|---|---|---|---|"
    )
    for name, found in result.items():
        cells = [
            f"{statistics.median(entry[way] for entry in found['rounds']):.1f}" for way in ("ray", "bare", "torchrun")
        ]
        for ratio in ("ray_over_torchrun", "ray_over_bare"):
            low, middle, high = statistics.quantiles(found[ratio], n=4)
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f}, {len(found[ratio])} rounds)")
        print(f"| {name} | {' | '.join(cells)} |")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
