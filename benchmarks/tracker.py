"""Does the tracker slow training down? One loop of matrix products that journals every step, in three conditions.

    alone      the journal is written, nothing is sent
    dead       a sender beside the loop, its MLflow server absent
    store      a sender beside the loop, sending to an SQLite store

The conditions follow one another in each round, in turning order, and are compared within the round; the start of the
sender (importing mlflow takes two seconds of one core) is part of what is measured. "At most" is the sender's
processor time over the duration of the loop: what it could cost if every thread of the loop waited for it; unlike the
measured ratio it does not depend on what else the machine does. Goal: a dead tracker costs <= 1 %.

Run: python benchmarks/tracker.py [--rounds 5] [--seconds 30]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from unroll import tracking
from unroll.journal import Journal, system_metrics

RESULTS = Path(__file__).parent / "results" / "tracker.json"
STEP_SECONDS = 0.05
GOAL = 0.01
CONDITIONS = ("alone", "dead", "store")


def size_of_a_step() -> int:
    """Number of products of two 1024 x 1024 matrices in about `STEP_SECONDS`."""
    matrix = torch.randn(1024, 1024)
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + 1:
        matrix @ matrix
        count += 1
    return max(1, round(count * STEP_SECONDS))


def train(folder: Path, seconds: float, products: int) -> tuple[float, float]:
    """Journalled steps for `seconds`: mean seconds of a step, and of its journal entry."""
    matrix = torch.randn(1024, 1024)
    written, step = 0.0, 0
    began = now = time.perf_counter()
    with Journal(folder) as journal:
        journal.tag({"recipe": folder.parent.name, "task": "benchmark"})
        while now < began + seconds:
            for _ in range(products):
                matrix @ matrix
            start = time.perf_counter()
            journal.metrics(step, {"train/loss": 1.0 / (step + 1), "train/gradient_norm": 1.0, **system_metrics()})
            now = time.perf_counter()
            written += now - start
            step += 1
    return (now - began) / step, written / step


def measure(condition: str, folder: Path, root: Path, seconds: float, products: int) -> tuple[float, float, float]:
    """One condition of one round: seconds of a step, of its journal entry, and of the sender's processor time in all."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if condition == "dead":
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            os.environ["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{closed.getsockname()[1]}"
    sender = None if condition == "alone" else tracking.start_sender(folder, root)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    step, written = train(folder, seconds, products)
    if sender is not None:
        tracking.finish(sender, timeout=0.0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return step, written, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def summary(
    steps: dict[str, list[float]], cpu: dict[str, list[float]], journal: list[float], seconds: float
) -> dict[str, Any]:
    """Slow-down of each condition against `alone`, as the median over rounds of the ratio within a round."""
    table: dict[str, Any] = {}
    for condition in CONDITIONS:
        ratios = [own / alone - 1 for own, alone in zip(steps[condition], steps["alone"], strict=True)]
        table[condition] = {
            "step_ms": round(1e3 * statistics.median(steps[condition]), 3),
            "slow_down": round(statistics.median(ratios), 5),
            "slow_down_by_round": [round(ratio, 5) for ratio in ratios],
            "sender_cpu_seconds": round(statistics.median(cpu[condition]), 3),
            "slow_down_at_most": round(statistics.median(cpu[condition]) / seconds, 5),
        }
    return {"conditions": table, "journal_us_per_step": round(1e6 * statistics.median(journal), 1), "goal": GOAL}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each condition in each round")
    options = parser.parse_args()
    products = size_of_a_step()
    steps: dict[str, list[float]] = {condition: [] for condition in CONDITIONS}
    cpu: dict[str, list[float]] = {condition: [] for condition in CONDITIONS}
    journal: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tracking.connect(root)  # creates the store: once in the life of a project
        for number in range(options.rounds):
            turn = number % len(CONDITIONS)
            for condition in CONDITIONS[turn:] + CONDITIONS[:turn]:
                folder = root / "runs" / f"{condition}-{number}" / "seed-1"
                step, written, used = measure(condition, folder, root, options.seconds, products)
                steps[condition].append(step)
                cpu[condition].append(used)
                journal.append(written)
    result = {**summary(steps, cpu, journal, options.seconds), "threads": torch.get_num_threads(), **vars(options)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'condition':<10} {'ms a step':>10} {'slow-down':>10} {'at most':>8} {'sender CPU s':>13}  by round")
    for condition, row in result["conditions"].items():
        by_round = " ".join(f"{value:+.2%}" for value in row["slow_down_by_round"])
        cells = f"{row['step_ms']:>10.2f} {row['slow_down']:>+10.2%} {row['slow_down_at_most']:>8.2%}"
        print(f"{condition:<10} {cells} {row['sender_cpu_seconds']:>13}  {by_round}")
    print(f"journal: {result['journal_us_per_step']} us a step, system metrics included; goal: dead <= {GOAL:.0%}")


if __name__ == "__main__":
    main()
