"""A real Ray worker group: two workers give the losses of one, and a killed worker costs nothing but time."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from project import project

from unroll.journal import history
from unroll.training.context import WorkerContext
from unroll.training.runs import train_one

ROOT = Path(__file__).parents[2]
TRAIN = {
    "batch": 6,
    "steps": 60,
    "checkpoint_every": 10,
    "optimizer": {"name": "sgd", "learning_rate": 0.3, "clip": 1.0},
}
pytestmark = pytest.mark.pipeline


def start(root: Path) -> subprocess.Popen[str]:
    shutil.copytree(ROOT / "cluster", root / "cluster")
    command = [sys.executable, "-m", "unroll", "train", "small", "--profile", "two_workers"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "UNROLL_TRACK": "0"}
    log = (root / "log").open("w")
    return subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log, text=True)


def addresses_until_done(driver: subprocess.Popen[str]) -> set[str]:
    """On which addresses the driver, Ray and the workers listened while they ran."""
    found: set[str] = set()
    deadline = time.monotonic() + 240
    while driver.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(psutil.Error):
            pids = {driver.pid, *(child.pid for child in psutil.Process(driver.pid).children(recursive=True))}
            connections = psutil.net_connections("tcp")
            found |= {c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == "LISTEN" and c.pid in pids}
        time.sleep(0.2)
    return found


def losses(root: Path) -> list[float]:
    return [point.value for point in history(root / "histories" / "small" / "seed-1")["train/loss"]]


def test_two_ray_workers_give_the_losses_of_one(tmp_path: Path) -> None:
    recipe, place = project(tmp_path / "one", train=TRAIN)
    train_one(recipe, 1, place, WorkerContext())
    project(tmp_path / "two", train=TRAIN)
    process = start(tmp_path / "two")
    log = tmp_path / "two" / "log"
    listening = addresses_until_done(process)
    assert process.wait(timeout=240) == 0, log.read_text()
    assert listening == {"127.0.0.1"}, "somebody outside could reach a run on one machine"
    assert "actor state" not in log.read_text()  # Ray's cleaner, which warns each second without a dashboard
    assert "Traceback" not in log.read_text()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.fault
def test_a_killed_ray_worker_changes_no_weight(tmp_path: Path) -> None:
    weights = []
    long: dict[str, Any] = {**TRAIN, "steps": 3000, "checkpoint_every": 50, "validate_every": 1000}
    for name, kill in (("undisturbed", False), ("killed", True)):
        recipe, place = project(tmp_path / name, train=long)
        process = start(tmp_path / name)
        if kill:
            kill_a_worker(process, place.run(recipe, 1) / "journal.jsonl")
        assert process.wait(timeout=400) == 0, (tmp_path / name / "log").read_text()
        weights.append((place.model(recipe, 1) / "weights.safetensors").read_bytes())
    assert "resumed at step" in (tmp_path / "killed" / "log").read_text()
    assert weights[0] == weights[1]


def kill_a_worker(driver: subprocess.Popen[str], journal: Path) -> None:
    deadline = time.monotonic() + 200
    while not (journal.exists() and '"step":300,' in journal.read_text()):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(driver.pid).children(recursive=True)
    workers = [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]
    assert len(workers) == 2
    os.kill(workers[1].pid, signal.SIGKILL)
