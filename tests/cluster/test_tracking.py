"""Many runs on one SQLite store, and runs that are killed, stopped, retried or that fail: one MLflow run each."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from project import project
from ray_cluster import Training, trials, until

from unroll import tracking
from unroll.journal import Journal, history
from unroll.sender import connect, send_pending

pytestmark = [pytest.mark.cluster, pytest.mark.fault]
PROCESSES = 16
NUMBERS = 10_000
KEYS = ("train/loss", "train/gradient_norm", "system/rss_mb", "system/cpu_percent", "learning_rate")
LONG = {"steps": 100_000, "validate_every": 50_000, "checkpoint_every": 20}
WRITER = """
import sys, time
from pathlib import Path
from unroll import tracking
from unroll.journal import Journal
folder, steps, keys = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
sender = tracking.start_sender(folder, folder.parents[2])
with Journal(folder) as journal:
    journal.tag({"recipe": folder.parent.name, "task": "language_modeling", "seed": 1})
    for step in range(steps):
        journal.metrics(step, {key: step + number / 10 for number, key in enumerate(keys)})
        time.sleep(5 / steps)
    journal.end("FINISHED")
left = tracking.finish(sender, 400)
sys.exit(left)
"""


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_sixteen_processes_write_to_one_sqlite_store(tmp_path: Path) -> None:
    """10,000 numbers; the store is made by whoever comes first."""
    from mlflow import MlflowClient

    processes = max(4, trials(PROCESSES))
    steps = NUMBERS // PROCESSES // len(KEYS)
    folders = [tmp_path / "runs" / f"lstm-{number}" / "seed-1" for number in range(processes)]
    command = [sys.executable, "-c", WRITER]
    writers = [
        subprocess.Popen([*command, str(folder), str(steps), *KEYS], stderr=subprocess.PIPE, text=True)
        for folder in folders
    ]
    errors = [writer.communicate(timeout=550)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * processes, errors
    logs = "".join((folder / "tracking.log").read_text() for folder in folders)
    assert "locked" not in logs
    client = MlflowClient(tracking_uri=tracking.tracking_uri(tmp_path))
    arrived = 0
    for folder in folders:
        run = json.loads((folder / "sent.json").read_text())["run_id"]
        assert client.get_run(run).info.status == "FINISHED"
        for key, points in history(folder).items():
            found = [(point.step, point.value) for point in client.get_metric_history(run, key)]
            assert sorted(found) == [(point.step, point.value) for point in points]
            arrived += len(found)
    assert arrived == processes * steps * len(KEYS)
    print(f"{processes} processes, {arrived:,} numbers, every one once")


def runs_in_store(root: Path) -> list[Any]:
    client = connect(root)  # takes turns with the sender in making a new store
    experiment = client.get_experiment_by_name("language_modeling")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def status(root: Path) -> str:
    found = runs_in_store(root)
    assert len(found) <= 1, "one run, however often it is started"
    return found[0].info.status if found else ""


@pytest.mark.parametrize("end", ["KILL", "TERM"])
def test_a_retried_run_keeps_its_number_and_ends_as_it_should(tmp_path: Path, end: str) -> None:
    """Killed or stopped: KILLED. Running again: RUNNING. Done: FINISHED. All in one MLflow run."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/profiles.yaml").write_text("profiles: {run: {workers: 0}}\n")
    project(tmp_path, train=LONG)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "UNROLL_TRACK": "1"}
    for _ in range(2):
        training = Training(tmp_path, environment, "run")
        training.wait_for_step(training.last_step() + 60)
        until(lambda: status(tmp_path) == "RUNNING", 90, "the run does not show as running")
        training.process.send_signal(signal.Signals[f"SIG{end}"])
        assert training.process.wait(timeout=60) == (75 if end == "TERM" else -9), training.text()
        until(lambda: status(tmp_path) == "KILLED", 90, lambda: f"the run is {status(tmp_path)}")
    identity = {run.info.run_id for run in runs_in_store(tmp_path)}
    [folder] = tmp_path.glob("runs/*/seed-1")
    with Journal(folder, patience=60) as journal:
        journal.end("FINISHED")
    assert send_pending(tmp_path).problems == []
    assert {run.info.run_id for run in runs_in_store(tmp_path)} == identity
    assert status(tmp_path) == "FINISHED"
    client_steps = sorted(point.step for point in history(folder)["train/loss"])
    assert client_steps == list(range(1, len(client_steps) + 1))


def test_a_run_that_fails_ends_as_failed(tmp_path: Path) -> None:
    optimizer = {"name": "sgd", "learning_rate": 1e38}
    project(tmp_path, train={"steps": 50, "optimizer": optimizer})
    command = [sys.executable, "-m", "unroll", "train", "small"]
    environment = {**os.environ, "UNROLL_TRACK": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    assert "not finite" in done.stderr
    deadline = time.monotonic() + 60
    while status(tmp_path) != "FAILED":
        assert time.monotonic() < deadline, status(tmp_path)
        time.sleep(0.5)
