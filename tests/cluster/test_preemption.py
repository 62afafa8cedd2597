"""Machines and commands that are told to go: they save first, and it does not count as a failure."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray_cluster import Node, Project, RayCluster, trials, until

from unroll.training import checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.fault]
TRAIN = {"batch": 6, "steps": 100_000, "checkpoint_every": 50_000, "validate_every": 100_000}
NEVER_FAILS = {"max_failures": 0}


def saved_step(project: Project) -> int:
    found, damaged = checkpoint.newest(project.run / "checkpoints")
    assert damaged == []
    return found.state["step"] if found else 0


def test_sigterm_saves_in_time(tmp_path: Path, cluster: RayCluster) -> None:
    """As often as it takes: each start goes on where the one before was stopped."""
    project, slowest = Project(tmp_path, cluster, TRAIN), 0.0
    for _ in range(trials(20)):
        before = saved_step(project)
        training = project.start()
        training.wait_for_step(before + 30)
        asked, reached = time.time(), training.last_step()
        training.process.send_signal(signal.SIGTERM)
        until(lambda before=before: saved_step(project) > before, 20, "no checkpoint within 20 s")
        slowest = max(slowest, time.time() - asked)
        assert saved_step(project) >= reached
        assert training.process.wait(timeout=60) == 75, training.text()
    print(f"from SIGTERM to a complete checkpoint: at most {slowest:.1f} s")


@pytest.mark.parametrize("way", ["signal", "file"])
def test_the_notice_that_a_profile_names_stops_the_command(tmp_path: Path, cluster: RayCluster, way: str) -> None:
    """The machine of the command is the one that goes."""
    file = tmp_path / "notice"
    notice = {"notice_file": str(file)} if way == "file" else {"notice_signal": "USR1"}
    project = Project(tmp_path / "project", cluster, TRAIN, **NEVER_FAILS, **notice)
    training = project.start()
    training.wait_for_step(30)
    reached = training.last_step()
    if way == "file":
        file.touch()
    else:
        training.process.send_signal(signal.SIGUSR1)
    assert training.process.wait(timeout=60) == 75, training.text()
    assert saved_step(project) >= reached


def gone_by_notice_file(node: Node, file: Path) -> None:
    """In the node's own view of the file system; every other machine has none there."""
    subprocess.run(["nsenter", "--target", str(node.process.pid), "--mount", "touch", str(file)], check=True)


def gone_by_sigterm(node: Node, file: Path) -> None:
    """What Kubernetes and Slurm send to the process that they started, before they kill it."""
    os.kill(node.process.pid, signal.SIGTERM)


@pytest.mark.skipif(os.geteuid() != 0, reason="a node with a file system of its own needs root")
@pytest.mark.parametrize("take_away", [gone_by_notice_file, gone_by_sigterm])
def test_a_node_that_is_taken_away_costs_no_failure_and_no_step(
    tmp_path: Path, cluster: RayCluster, take_away: Callable[[Node, Path], None]
) -> None:
    """All save at the same step, and the group goes on with the machines that stay."""
    file = tmp_path / "own" / "notice"
    file.parent.mkdir()
    cluster.nodes.pop().kill()
    own = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {file.parent} && exec "$@"', "sh"]
    cluster.add(before=own)
    cluster.settle()  # the command would take the lost node, which has the address of this machine too, for its own
    profile = {"workers": [1, 2], "notice_file": str(file), "notice_seconds": 60, **NEVER_FAILS}
    training = Project(tmp_path / "project", cluster, TRAIN, **profile).start()
    try:
        training.wait_for_step(30)
        assert len(cluster.workers()) == 2
        node, reached = cluster.nodes[-1], training.last_step()
        asked = time.time()
        take_away(node, file)
        until(training.resumed_at, 150, training.text)
        print(f"{take_away.__name__}: the others go on after {time.time() - asked:.1f} s")
        assert training.resumed_at()[-1] >= reached, "it had saved first"
        cluster.nodes.pop().kill()
        training.wait_for_step(training.resumed_at()[-1] + 100)
    finally:
        training.stop()
        while len(cluster.nodes) > 1:
            cluster.nodes.pop().kill()
        cluster.add()
