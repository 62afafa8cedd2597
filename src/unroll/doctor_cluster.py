"""Is this cluster ready? Versions on every node, sums over all workers, shared storage, clocks, interface, tracker.

Each node is asked by a task that runs there and nowhere else; the workers are those that a training of the profile would
get, set up as it would set them up.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import socket
import sqlite3
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from unroll.doctor import Check, store_state
from unroll.journal import without_passwords
from unroll.tracking import tracking_uri
from unroll.training.launch import HANG_SECONDS, Profile, load_profile, start_ray

PACKAGES = ("torch", "ray", "mlflow", "numpy", "safetensors", "tokenizers")
CLOCK_SECONDS = 1.0
"""Clocks that differ by more make times in journals and logs useless, and tokens of object stores invalid."""
SUM_NUMBERS = 4_000_000
SUM_ROUNDS = 5
ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class Node:
    """A machine of the cluster as Ray knows it."""

    id: str
    name: str


def cluster_checks(root: Path, profile_name: str) -> list[Check]:
    """What can be said about the cluster of a profile.

    Raises:
        UserError: no such profile, or no such cluster.
    """
    import ray

    profile = load_profile(root, profile_name)
    start_ray(profile)
    nodes = sorted(
        (Node(node["NodeID"], f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})")
         for node in ray.nodes() if node["Alive"]),
        key=lambda node: node.name,
    )  # fmt: skip
    folder = root.resolve() / "runs" / ".doctor"
    try:
        seen = _ask_nodes(nodes, root.resolve(), folder, profile)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = [Check("nodes", str(len(nodes)), "", True)]
    for node in nodes:
        found += _about(node, seen[node.id], seen[nodes[0].id])
    return [*found, *_sums(profile)]


# --- each node ----------------------------------------------------------------------------------------------------------


def _ask_nodes(nodes: list[Node], root: Path, folder: Path, profile: Profile) -> dict[str, Any]:
    """What each node says of itself, or the error in its place."""
    ray: Any = import_module("ray")
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder.mkdir(parents=True, exist_ok=True)
    word = secrets.token_hex(8)
    (folder / "word").write_text(word)
    environment = {"env_vars": profile.environment} if profile.environment else None
    seen: dict[str, Any] = {}
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node.id, soft=False)
        ask = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place, runtime_env=environment)
        try:
            answers = ray.get(ask(_describe).remote(str(root), str(folder), node.id), timeout=ANSWER_SECONDS)
            answers["clock"] = _clock_offset(ask(_now))
            written = folder / node.id
            answers["seen here"] = written.is_file() and written.read_text() == word
            seen[node.id] = answers
        except Exception as error:  # noqa: BLE001 - Ray's errors and those of the node; it becomes a line of the report
            seen[node.id] = _first_line(error)
    return seen


def _describe(root: str, folder: str, name: str) -> dict[str, Any]:
    """Runs on the node: versions, whether it sees the shared folder and can write there, whether it reaches MLflow."""
    try:
        word = (Path(folder) / "word").read_text()
        (Path(folder) / name).write_text(word)
        storage = ""
    except OSError as error:
        storage = f"{error.strerror or error}"
    uri = tracking_uri(Path(root))
    try:
        tracker = store_state(uri)
    except (OSError, sqlite3.Error, ValueError) as error:
        tracker = f"not reached ({error})"
    versions = {"Python": platform.python_version(), "unroll": _version("unroll")}
    return {
        "versions": versions | {package: _version(package) for package in PACKAGES},
        "storage": storage,
        "tracker": f"{without_passwords(uri)}: {tracker}",
        "tracker ok": "not reached" not in tracker and not (uri.startswith("sqlite") and storage),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _now() -> float:
    return time.time()


def _clock_offset(now: Any) -> tuple[float, float]:
    """(seconds by which a node's clock is ahead of this one, how sure that is): of several questions the quickest."""
    import ray

    best = (0.0, float("inf"))
    for _ in range(5):
        asked = time.time()
        there = ray.get(now.remote(), timeout=ANSWER_SECONDS)
        half = (time.time() - asked) / 2
        if half < best[1]:
            best = (there - asked - half, half)
    return best


def _about(node: Node, seen: Any, first: Any) -> list[Check]:
    """The lines about one node; versions are compared with those of the first."""
    if isinstance(seen, str):
        return [
            Check(node.name, seen, "an answer", False, "is `unroll` installed there, and the project's folder shared?")
        ]
    versions = seen["versions"]
    others = first["versions"] if isinstance(first, Mapping) else versions
    differing = [
        f"{name} {version}, not {others[name]}" for name, version in versions.items() if version != others[name]
    ]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("Python", "torch", "ray", "mlflow"))
    offset, sure = seen["clock"]
    storage = seen["storage"] or ("" if seen["seen here"] else "what it wrote is not seen here")
    return [
        Check(f"{node.name} versions", "; ".join(differing) or shown, "the same everywhere", not differing),
        Check(f"{node.name} storage", storage or "reads and writes", "the project's folder, shared", not storage),
        Check(f"{node.name} clock", f"{offset:+.3f} s (within {sure:.3f})", f"within {CLOCK_SECONDS:.0f} s",
              abs(offset) - sure <= CLOCK_SECONDS, "" if abs(offset) - sure <= CLOCK_SECONDS else "run an NTP client"),
        Check(f"{node.name} MLflow", seen["tracker"], "", True,
              "" if seen["tracker ok"] else "runs keep their journal; the driver or `unroll track` sends it"),
    ]  # fmt: skip


# --- all workers together -----------------------------------------------------------------------------------------------


def worker_number(profile: Profile, resources: Mapping[str, float]) -> int:
    """As many workers as the profile allows and the cluster has room for; at least one."""
    room = resources.get("CPU", 0.0) / max(1, profile.cpus_per_worker)
    if profile.gpu:
        room = min(room, resources.get("GPU", 0.0))
    wanted = profile.workers
    most = room if isinstance(wanted, str) else wanted if isinstance(wanted, int) else wanted[1]
    return max(1, int(min(room, most)))


def _sums(profile: Profile) -> list[Check]:
    """All workers add numbers up, as every training step does."""
    ray: Any = import_module("ray")

    number = worker_number(profile, ray.available_resources())
    backend = "nccl" if profile.gpu else "gloo"
    options = {"num_cpus": profile.cpus_per_worker, "num_gpus": int(profile.gpu), "scheduling_strategy": "SPREAD"}
    environment = {"env_vars": profile.environment} if profile.environment else None
    make = ray.remote(**options, max_restarts=0, runtime_env=environment)(SumWorker)
    workers = [make.remote() for _ in range(number)]
    wait = profile.hang_seconds or HANG_SECONDS[profile.gpu]
    try:
        address = ray.get(workers[0].address.remote(), timeout=ANSWER_SECONDS)
        joined = [worker.join.remote(address, rank, number, backend, wait) for rank, worker in enumerate(workers)]
        ray.get(joined, timeout=ANSWER_SECONDS + wait)
        told = ray.get([worker.add.remote() for worker in workers], timeout=ANSWER_SECONDS + wait)
    except Exception as error:  # noqa: BLE001 - Ray's errors, and torch's from the workers
        advice = "several addresses? set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME in the profile's environment"
        return [Check("sums", _first_line(error), f"an all-reduce over {number} workers", False, advice)]
    finally:
        for worker in workers:
            ray.kill(worker)
    seconds = max(entry["seconds"] for entry in told)
    traffic = 4 * SUM_NUMBERS * 2 * (number - 1) / number / seconds
    right = all(entry["right"] for entry in told)
    interfaces = sorted({f"{entry['host']} {name}" for entry in told for name in entry["interfaces"]})
    speed = f"{traffic / 1e6:,.0f} MB/s a worker" if number > 1 else "no traffic"
    return [
        Check("sums", f"{number} workers, {backend}, {4 * SUM_NUMBERS / 1e6:.0f} MB in {1000 * seconds:.0f} ms: {speed}",
              "the right sum", right),
        Check(f"interface of {backend}", ", ".join(interfaces) or "none used", "", True),
    ]  # fmt: skip


class SumWorker:
    """One worker of the check; an actor."""

    def address(self) -> str:
        """Where the first worker can be reached."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def join(self, address: str, rank: int, size: int, backend: str, seconds: int) -> None:
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        self.rank, self.size = rank, size
        self.device = torch.device("cuda" if backend == "nccl" else "cpu")
        dist.init_process_group(
            backend, init_method=f"tcp://{address}", rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
        )

    def add(self) -> dict[str, Any]:
        """Median seconds of a sum, whether it is right, and the interfaces that this process talks through."""
        import torch
        import torch.distributed as dist

        times, right = [], True
        for _ in range(SUM_ROUNDS + 1):
            numbers = torch.full((SUM_NUMBERS,), float(self.rank + 1), device=self.device)
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(numbers)
            total = float(numbers[-1])  # waits for a GPU
            times.append(time.perf_counter() - began)
            right &= total == self.size * (self.size + 1) / 2
        used = interfaces_in_use(os.getpid()) if self.size > 1 else []
        dist.destroy_process_group()
        return {
            "seconds": statistics.median(times[1:]),
            "right": right,
            "host": socket.gethostname(),
            "interfaces": used,
        }


def interfaces_in_use(pid: int) -> list[str]:
    """`eth0 10.0.0.1` for each address that a process has connections from, apart from those that Ray itself uses it for."""
    import psutil

    names = {address.address: name for name, all_of in psutil.net_if_addrs().items() for address in all_of}
    try:
        connections = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.Error:
        return []
    # gloo listens on the interface that it has chosen; Ray listens on its node's address.
    listening = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    talking = {c.laddr.ip for c in connections if c.status == psutil.CONN_ESTABLISHED}
    chosen = {ip.removeprefix("::ffff:") for ip in talking & listening or talking}
    return sorted(f"{names.get(ip, '?')} {ip}" for ip in chosen)


def _first_line(error: BaseException) -> str:
    """The last line of a remote trace says what went wrong; of anything else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "Traceback" in str(error) or "ray::" in lines[0] else lines[0]
