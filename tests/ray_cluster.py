"""A Ray cluster of several nodes on this machine, each started by `ray start` as a machine of its own would be.

Every process of a node is found by the session that the node was started in, or by descent: nothing here touches a Ray
that somebody else runs (`ray stop` would).
"""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml
from project import project

SEED = int(os.environ.get("UNROLL_FAULT_SEED", "1"))
TWO = {"workers": 2, "address": "auto", "max_failures": 100}
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
OBJECT_STORE = 80_000_000  # the smallest that Ray allows; training sends nothing through it


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def until(condition: Callable[[], Any], seconds: float, what: str | Callable[[], str]) -> Any:
    """The first true value of `condition`; fails after so many seconds, and says what was awaited."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.1)  # the two cores are for those that are awaited
    return found


class Node:
    """One `ray start --block`, and all that it started."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, before: list[str]) -> None:
        self.log, self.name = log, secrets.token_hex(4)
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [*before, *command, "--node-name", self.name],
                env=environment, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Those alive: of the session, and descendants that left it."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = process
        for process in list(found.values()):
            with contextlib.suppress(psutil.Error):
                found |= {child.pid: child for child in process.children(recursive=True)}
        return [process for process in found.values() if is_alive(process)]

    def workers(self) -> list[psutil.Process]:
        """The training workers on this node, in the order in which they started."""
        return sorted(
            (process for process in self.processes() if "RayTrainWorker" in command_line(process)),
            key=lambda process: process.create_time(),
        )

    def kill(self) -> None:
        """As a machine that loses power: everything at once, without a word."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


class RayCluster:
    """A head with one processor; `add` starts another node. `environment` is what a client of the cluster needs."""

    def __init__(
        self,
        folder: Path,
        ip: str = "127.0.0.1",
        before: list[str] | None = None,
        variables: dict[str, str] | None = None,
        dashboard: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.nodes = folder, []  # type: tuple[Path, list[Node]]
        self.address = f"{ip}:{free_port()}"
        token = folder / "token"
        token.touch(0o600)
        self.token = secrets.token_hex(32)
        token.write_text(self.token)
        self.environment = {
            "RAY_DEDUP_LOGS": "0",  # lines that are alike would come together and seconds late
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "UNROLL_"))},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ADDRESS": self.address,
            "RAY_worker_niceness": "0",  # Ray's 15 makes workers wait for whatever else runs on this machine
            "OMP_NUM_THREADS": "1",
            "UNROLL_TRACK": "0",
            **(variables or {}),
        }
        port = self.address.rpartition(":")[2]
        head = ["--head", "--port", port, "--include-dashboard", str(dashboard).lower()]
        if dashboard:
            self.jobs = f"http://127.0.0.1:{free_port()}"
            head += ["--dashboard-host", "127.0.0.1", "--dashboard-port", self.jobs.rpartition(":")[2]]
            head += ["--ray-client-server-port", str(free_port())]
        self.head = self._start(ip, [*head, "--temp-dir", short_folder(folder)], before or [])
        until(self.answers, 150, lambda: f"Ray's head does not start: {self.head.log.read_text()}")

    def _start(self, ip: str, options: list[str], before: list[str]) -> Node:
        common = ["--block", "--disable-usage-stats", "--num-cpus", "1", "--num-gpus", "0", "--node-ip-address", ip]
        common += ["--object-store-memory", str(OBJECT_STORE)]
        common += ["--dashboard-agent-listen-port", str(free_port())]  # of clusters side by side one has the usual one
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        log = self.folder / f"node-{len(self.nodes)}.log"
        node = Node([*RAY, "start", *common, *options], environment, log, before)
        self.nodes.append(node)
        return node

    def add(self, ip: str = "127.0.0.1", before: list[str] | None = None) -> Node:
        """Another node; waits until it runs. The cluster may know it a little later (`settle`)."""
        node = self._start(ip, ["--address", self.address], before or [])
        until(
            lambda: "Ray runtime started" in node.log.read_text() or node.process.poll() is not None,
            150,
            "a node does not start",
        )
        assert node.process.poll() is None, node.log.read_text()
        return node

    def answers(self) -> bool:
        assert self.head.process.poll() is None, self.head.log.read_text()
        return "Ray runtime started" in self.head.log.read_text()

    def settle(self, before: list[str] | None = None) -> None:
        """Wait until the cluster knows all nodes that were started, and those alone."""
        names = sorted(node.name for node in self.nodes)
        code = (
            "import ray, time; ray.init(address='auto', log_to_driver=False)\n"
            f"while sorted(node['NodeName'] for node in ray.nodes() if node['Alive']) != {names}: time.sleep(0.2)"
        )
        command = [*(before or []), sys.executable, "-c", code]
        subprocess.run(command, env=self.environment, check=True, timeout=120, capture_output=True)

    def workers(self) -> list[psutil.Process]:
        return [worker for node in self.nodes for worker in node.workers()]

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.kill()


def short_folder(folder: Path) -> str:
    """Ray's sockets must have short paths: a link under /tmp to the test's folder."""
    link = Path("/tmp") / f"ur-{os.getpid()}-{secrets.token_hex(3)}"
    (folder / "ray").mkdir(exist_ok=True)
    link.symlink_to(folder / "ray")
    return str(link)


class Training:
    """`unroll train small` in a project, as a process."""

    def __init__(self, root: Path, environment: dict[str, str], profile: str, before: list[str] | None = None) -> None:
        self.root = root
        command = [*(before or []), sys.executable, "-m", "unroll", "train", "small", "--profile", profile]
        self.log = root / "log"
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(command, cwd=root, env=environment, stdout=out, stderr=out)

    def steps(self, end: int | None = None) -> list[tuple[int, float]]:
        """(step, unix time) of every step that the journal holds (or its last `end` bytes), replays included once."""
        found = []
        for path in self.root.glob("runs/small-*/seed-1/journal.jsonl"):
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - end) if end else 0)
                lines = file.read().splitlines()
            for line in lines:
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if entry["kind"] == "metrics" and "train/loss" in entry["values"]:
                        found.append((entry["step"], entry["time"]))
        return found

    def last_step(self) -> int:
        """Of its last lines: to parse thousands at every look would take a core from the training."""
        return max((step for step, _ in self.steps(end=10_000)), default=0)

    def wait_for_step(self, step: int, seconds: float = 200) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, self.text()
            return self.last_step() >= step

        until(reached, seconds, lambda: f"step {step} is not reached: {self.text()}")

    def resumed_at(self) -> list[int]:
        """Where each new start went on. Nodes that share a machine read each other's logs, so each line comes twice."""
        found = re.findall(r"pid=(\d+).*resumed at step (\d+)", self.text())
        return [int(step) for _, step in dict.fromkeys(found)]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 240) -> None:
        try:
            assert self.process.wait(timeout=seconds) == 0, self.text()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done after {seconds} s: {self.text()}") from None

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def cluster_of_two(folder: Path, **options: Any) -> Iterator[RayCluster]:
    """A head and one more node, one processor each; all is ended whatever happens."""
    cluster = RayCluster(folder, **options)
    try:
        cluster.add()
        yield cluster
    finally:
        cluster.stop()


def trials(full: int) -> int:
    """How many of `full` trials to make: `UNROLL_TRIALS` per cent of them, 10 unless set."""
    return max(1, full * int(os.environ.get("UNROLL_TRIALS", "10")) // 100)


class Project:
    """A small project with profiles `run` (as given) and its recipe."""

    def __init__(self, root: Path, cluster: RayCluster, train: dict[str, Any], **profile: Any) -> None:
        self.recipe, self.place = project(root, train=train)  # type: tuple[Recipe, Place]
        self.root, self.cluster = root, cluster
        (root / "cluster").mkdir(exist_ok=True)
        self.profile(**profile)

    def profile(self, **profile: Any) -> None:
        content = {"profiles": {"run": {**TWO, **profile}}}
        (self.root / "cluster" / "profiles.yaml").write_text(yaml.safe_dump(content))

    def start(self, before: list[str] | None = None, **variables: str) -> Training:
        return Training(self.root, {**self.cluster.environment, **variables}, "run", before)

    def weights(self) -> bytes:
        return (self.place.model(self.recipe, 1) / "weights.safetensors").read_bytes()

    @property
    def run(self) -> Path:
        return self.place.run(self.recipe, 1)
