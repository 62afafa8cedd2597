"""`unroll doctor --cluster` on a cluster that is ready, and on one that is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray_cluster import Project, RayCluster

pytestmark = pytest.mark.cluster
TRAIN = {"steps": 3}


def doctor(project: Project, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unroll", "doctor", "--cluster", "--profile", "run"]
    environment = {**project.cluster.environment, **variables}
    return subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True, timeout=200)


def test_a_cluster_that_is_ready(tmp_path: Path, cluster: RayCluster) -> None:
    done = doctor(Project(tmp_path, cluster, TRAIN))
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "BAD"))]
    for word, times in {
        " versions ": 2,
        " storage ": 2,
        " clock ": 2,
        " MLflow ": 2,
        " sums ": 1,
        "interface of": 1,
    }.items():
        assert sum(word in line for line in lines) == times
    assert "2 workers, gloo" in done.stdout
    assert not (tmp_path / "runs" / ".doctor").exists()


def test_an_interface_that_is_not_there_is_one_line(tmp_path: Path, cluster: RayCluster) -> None:
    done = doctor(Project(tmp_path, cluster, TRAIN, environment={"GLOO_SOCKET_IFNAME": "nowhere0"}, hang_seconds=10))
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("BAD")]
    assert "sums" in line
    assert "GLOO_SOCKET_IFNAME" in line


def test_a_folder_that_a_node_does_not_share_is_named(tmp_path: Path, cluster: RayCluster) -> None:
    if os.geteuid() != 0:
        pytest.skip("a node with a file system of its own needs root")
    project = Project(tmp_path / "project", cluster, TRAIN)
    own = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {project.root} && exec "$@"', "sh"]
    cluster.add(before=own)
    cluster.settle()
    done = doctor(project)
    print(done.stdout)
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("BAD")]
    assert "storage" in line
    assert "No such file or directory" in line


def test_no_cluster_is_one_line(tmp_path: Path, cluster: RayCluster) -> None:
    done = doctor(Project(tmp_path, cluster, TRAIN), RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: Ray did not start (address 'auto'):")
