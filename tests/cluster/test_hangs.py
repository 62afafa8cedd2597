"""Workers that stop answering, and how long it takes until training goes on after one died."""

import os
import signal
import statistics
import time
from pathlib import Path

import pytest
from ray_cluster import Project, RayCluster, Training, until

pytestmark = [pytest.mark.cluster, pytest.mark.fault]
TRAIN = {"batch": 6, "steps": 100_000, "checkpoint_every": 40, "validate_every": 100_000}
DEATHS = 5
BARE = """
import sys, time
import ray, ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def loop(config):
    import torch, torch.distributed as dist
    while True:
        value = torch.ones(1)
        dist.all_reduce(value)
        if ray.train.get_context().get_world_rank() == 0:
            with open(config["out"], "a") as file:
                file.write(f"{time.time()}\\\\n")
        time.sleep(0.02)

ray.init(address="auto")
TorchTrainer(loop, train_loop_config={"out": sys.argv[1]}, scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(name="bare", storage_path=sys.argv[2], failure_config=FailureConfig(max_failures=100))).fit()
"""


def new_steps_after(training: Training, moment: float) -> float:
    """The time of the first step that nobody had done before `moment`."""
    reached = max(step for step, at in training.steps() if at <= moment)

    def later() -> float:
        return next((at for step, at in training.steps() if step > reached and at > moment + 0.5), 0.0)

    return float(until(later, 150, lambda: f"training does not go on: {training.text()}"))


def test_a_hung_worker_is_found_and_replaced(tmp_path: Path, cluster: RayCluster) -> None:
    """Stopped by SIGSTOP: its connections stay open and it holds its processor; nobody says that anything is wrong."""
    project = Project(tmp_path, cluster, TRAIN)
    training = project.start()
    try:
        for number in range(2):
            training.wait_for_step(training.last_step() + 50)
            worker = cluster.workers()[number]
            worker.send_signal(signal.SIGSTOP)
            stopped = time.time()
            seconds = new_steps_after(training, stopped) - stopped
            print(f"a hung worker: the next step after {seconds:.1f} s")
            assert seconds <= 60
            until(lambda worker=worker: not worker.is_running(), 30, "the hung worker is still there")
    finally:
        training.stop()


def test_training_goes_on_soon_after_a_worker_died(tmp_path: Path, cluster: RayCluster) -> None:
    """Beside what Ray alone needs: the same kill in a loop that does nothing but add a number over two workers."""
    (tmp_path / "bare.py").write_text(BARE.replace("\\\\n", "\\n"))
    ours: list[float] = []
    training = Project(tmp_path / "ours", cluster, TRAIN).start()
    try:
        for _ in range(DEATHS):
            training.wait_for_step(training.last_step() + 50)
            moment = time.time()
            cluster.workers()[1].kill()
            ours.append(new_steps_after(training, moment) - moment)
    finally:
        training.stop()
    until(lambda: not cluster.workers(), 60, "workers outlive their driver")
    rays = ray_alone(tmp_path, cluster, DEATHS)
    own, alone = statistics.median(ours), statistics.median(rays)
    print(f"from a worker's death to the next step: {own:.1f} s (longest {max(ours):.1f}), Ray alone {alone:.1f} s")
    assert own - alone <= 20


def ray_alone(folder: Path, cluster: RayCluster, number: int) -> list[float]:
    import subprocess
    import sys

    out, seconds = folder / "bare.txt", []
    command = [sys.executable, str(folder / "bare.py"), str(out), str(folder / "storage")]
    with (folder / "bare.log").open("wb") as log:
        driver = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log)
    try:
        for _ in range(number):
            seen = len(out.read_text().splitlines()) if out.exists() else 0
            until(lambda n=seen: out.exists() and len(out.read_text().splitlines()) > n + 20, 120, "no steps")
            moment = time.time()
            os.kill(cluster.workers()[1].pid, signal.SIGKILL)

            def later(moment: float = moment) -> float:
                return next((float(line) for line in out.read_text().splitlines() if float(line) > moment + 0.5), 0.0)

            seconds.append(until(later, 150, (folder / "bare.log").read_text()) - moment)
    finally:
        driver.kill()
        driver.wait()
    return seconds
