"""The MLflow server is killed in mid-run for ten minutes and comes back: what does it cost, and what arrives?

    alone     the loop journals, nothing is sent: before the run and after it
    up        a sender beside the loop, the server answers
    outage    the server was killed with SIGKILL
    back      the server runs again, over the same store

One loop of matrix products that journals every step, as in benchmarks/tracker.py. "At most" is the sender's processor
time over the duration of the phase: what it could cost if the loop waited for all of it. Then every number of the
journal is looked up in the store. Goals: the outage costs <= 1 %; at least 10,000 numbers, each arrives exactly once.

Run: python benchmarks/outage.py [--minutes 10]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from tracker import size_of_a_step

from unroll import tracking
from unroll.journal import Journal, history, system_metrics

RESULTS = Path(__file__).parent / "results" / "outage.json"
GOAL, POINTS = 0.01, 10_000
AROUND_SECONDS = 90.0  # each phase but the outage


class Server:
    """`mlflow server` on 127.0.0.1 over an SQLite file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            f"sqlite:///{self.folder}/mlflow.db",
        ]
        command += ["--workers", "1", "--host", "127.0.0.1", "--port", str(self.port)]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        while not self.answers():
            if self.process.poll() is not None:
                sys.exit(f"the MLflow server does not start: {self.folder / 'server.log'}")
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def train(journal: Journal, start: int, seconds: float, products: int) -> tuple[int, float]:
    """Journalled steps from `start` on for `seconds`: the next step, and the mean seconds of one."""
    matrix = torch.randn(1024, 1024)
    step = start
    began = now = time.perf_counter()
    while now < began + seconds:
        for _ in range(products):
            matrix @ matrix
        journal.metrics(step, {"train/loss": 1.0 / (step + 1), "train/gradient_norm": 1.0, **system_metrics()})
        step += 1
        now = time.perf_counter()
    return step, (now - began) / (step - start)


def alone(folder: Path, products: int) -> float:
    with Journal(folder) as journal:
        return train(journal, 0, AROUND_SECONDS, products)[1]


def run(folder: Path, root: Path, server: Server, minutes: float, products: int) -> dict[str, dict[str, float]]:
    """The run with the outage: milliseconds of a step and the sender's processor time over the time, by phase."""
    sender = tracking.start_sender(folder, root)
    process = psutil.Process(sender.process.pid)
    table: dict[str, dict[str, float]] = {}
    step = 0
    with Journal(folder) as journal:
        journal.tag({"recipe": folder.parent.name, "task": "benchmark"})
        for phase, seconds in {"up": AROUND_SECONDS, "outage": 60 * minutes, "back": AROUND_SECONDS}.items():
            if phase == "outage":
                server.kill()
            elif phase == "back":
                server.start()
            before = process.cpu_times()
            step, mean = train(journal, step, seconds, products)
            after = process.cpu_times()
            used = after.user + after.system - before.user - before.system
            table[phase] = {"step_ms": 1e3 * mean, "at_most": used / seconds}
        journal.end("FINISHED")
    if (left := tracking.finish(sender, timeout=120.0)) is not None:
        sys.exit(left)
    return table


def arrivals(folder: Path, uri: str) -> dict[str, int]:
    """Numbers in the journal, and how many of them the store holds never, once with the same value, and more often."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (stored,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    found = Counter(
        (key, point.step, point.value)
        for key in stored.data.metrics
        for point in client.get_metric_history(stored.info.run_id, key)
    )
    written = [(key, point.step, point.value) for key, points in history(folder).items() for point in points]
    known = set(written)
    often = Counter(min(found[point], 2) for point in written)
    strange = sum(count for point, count in found.items() if point not in known)
    return {"written": len(written), "once": often[1], "never": often[0], "more": often[2], "not_written": strange}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the outage")
    options = parser.parse_args()
    products = size_of_a_step()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        server = Server(root)
        server.start()
        os.environ["MLFLOW_TRACKING_URI"] = server.uri
        folder = root / "runs" / "outage" / "seed-1"
        reference = [alone(root / "runs" / "before" / "seed-1", products)]
        table = run(folder, root, server, options.minutes, products)
        numbers = arrivals(folder, server.uri)
        server.kill()
        reference.append(alone(root / "runs" / "after" / "seed-1", products))
    result: dict[str, Any] = {"minutes": options.minutes, "alone_step_ms": [1e3 * mean for mean in reference]}
    result |= {"phases": table, "numbers": numbers}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    mean = 1e3 * sum(reference) / len(reference)
    print(f"alone    {mean:6.2f} ms a step ({', '.join(f'{1e3 * value:.2f}' for value in reference)} before and after)")
    for phase, row in table.items():
        goal = f"   goal <= {GOAL:.0%}" if phase == "outage" else ""
        slower = row["step_ms"] / mean - 1
        print(
            f"{phase:<8} {row['step_ms']:6.2f} ms a step, slower by {slower:+.2%}, at most {row['at_most']:.2%}{goal}"
        )
    print(
        f"{numbers['written']:,} numbers written (goal >= {POINTS:,}): {numbers['once']:,} arrived once, "
        f"{numbers['never']:,} never, {numbers['more']:,} more than once, {numbers['not_written']:,} were never written"
    )


if __name__ == "__main__":
    main()
