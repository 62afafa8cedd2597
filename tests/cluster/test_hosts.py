"""Two hosts: network namespaces with an address each, joined by a cable, on this machine (iproute2, root)."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_cluster import Project, RayCluster, Training, until

from unroll.journal import history
from unroll.training.context import WorkerContext
from unroll.training.runs import train_one

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(shutil.which("ip") is None, reason="no ip: apt-get install iproute2"),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]
TRAIN = {
    "batch": 6,
    "steps": 800,
    "checkpoint_every": 40,
    "validate_every": 800,
    "optimizer": {"name": "sgd", "learning_rate": 0.1, "clip": 1.0},
}
HERE, THERE = "10.77.0.1", "10.77.0.2"
CABLE = {"environment": {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}}


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Host:
    """A network of its own; `inside` is what to put before a command that runs there."""

    def __init__(self, name: str) -> None:
        self.name, self.inside = name, ["ip", "netns", "exec", name]
        ip("netns", "add", name)

    def plug(self, cable: str, address: str) -> None:
        ip("link", "set", cable, "netns", self.name)
        for words in (["link", "set", cable, "name", "eth0"], ["addr", "add", f"{address}/24", "dev", "eth0"],
                      ["link", "set", "eth0", "up"], ["link", "set", "lo", "up"]):  # fmt: skip
            ip("-n", self.name, *words)

    def received(self) -> int:
        """Bytes that came through the cable."""
        done = subprocess.run(
            [*self.inside, "cat", "/sys/class/net/eth0/statistics/rx_bytes"], capture_output=True, text=True, check=True
        )
        return int(done.stdout)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    number = os.getpid()
    names = [f"unroll-{number}-{letter}" for letter in "ab"]
    try:
        hosts = [Host(name) for name in names]
        ip("link", "add", f"va{number}", "type", "veth", "peer", "name", f"vb{number}")
        for host, cable, address in zip(hosts, (f"va{number}", f"vb{number}"), (HERE, THERE), strict=True):
            host.plug(cable, address)
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture(scope="module")
def two_hosts(hosts: list[Host]) -> Iterator[RayCluster]:
    with tempfile.TemporaryDirectory(prefix="unroll-") as folder:
        cluster = RayCluster(Path(folder), HERE, hosts[0].inside)
        try:
            cluster.add(THERE, hosts[1].inside)
            yield cluster
        finally:
            cluster.stop()


def test_the_doctor_names_the_interface_between_the_hosts(
    tmp_path: Path, hosts: list[Host], two_hosts: RayCluster
) -> None:
    project = Project(tmp_path, two_hosts, TRAIN, **CABLE)
    command = [*hosts[0].inside, sys.executable, "-m", "unroll", "doctor", "--cluster", "--profile", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=two_hosts.environment, capture_output=True, text=True, timeout=200)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    interface = next(line for line in done.stdout.splitlines() if "interface of gloo" in line)
    assert f"eth0 {HERE}" in interface
    assert f"eth0 {THERE}" in interface
    assert project.root.exists()


def test_two_hosts_train_as_one_machine_does_and_a_lost_one_costs_nothing(
    tmp_path: Path, hosts: list[Host], two_hosts: RayCluster
) -> None:
    one = Project(tmp_path / "one", two_hosts, TRAIN)
    train_one(one.recipe, 1, one.place, WorkerContext())
    project = Project(tmp_path / "two", two_hosts, TRAIN, **CABLE)
    before = [host.received() for host in hosts]
    training: Training = project.start(hosts[0].inside)
    training.wait_for_step(100)
    assert [len(node.workers()) for node in two_hosts.nodes] == [1, 1]
    assert all(host.received() - old > 100_000 for host, old in zip(hosts, before, strict=True)), "sums cross the cable"
    two_hosts.nodes.pop().kill()
    two_hosts.add(THERE, hosts[1].inside)
    until(training.resumed_at, 150, training.text)
    training.wait(300)
    losses = [
        [point.value for point in history(root / "histories/small/seed-1")["train/loss"]]
        for root in (project.root, one.root)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
