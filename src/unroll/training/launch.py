"""Ray Train around a run: no worker group on one machine without a GPU, one worker for each GPU, or an elastic group.

The only file that imports ray. Checkpoints stay in the run's folder (shared storage on a cluster) and the newest valid
one is found there after any failure: Ray offers only those its controller had registered, and `ray.train.report` would
block each time for its poll (measured: 2 s), so it is not called. The result comes back as the function's return value.

What ends a group, and what then happens:
    a worker or its node dies          Ray makes a new group; counted (`max_failures`)
    a worker hangs                     sums and health checks time out after `hang_seconds`; as above
    a node is to be taken away         all save at the same step, a new group goes on elsewhere; not counted
    SIGTERM or a notice here           all save at the same step, the command ends with exit code 75
    the driver dies                    its workers end with it; the same command goes on from the newest checkpoint
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from pydantic import Field

from unroll.config import Recipe, Strict, check, load_recipe, nearest, read_yaml
from unroll.device import default_device
from unroll.errors import UserError
from unroll.notice import POLL_SECONDS, on_notice, signal_number
from unroll.place import Place
from unroll.training.context import WorkerContext
from unroll.training.runs import train_one

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
}

LOCAL_SETTINGS = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Nobody drains the nodes of a cluster that this process started, and the watcher greets with an error of its own."""

LOCALHOST = "127.0.0.1"
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
"""Workers on one machine talk through its loopback: nobody outside can reach them."""


HANG_SECONDS = {False: 20, True: 300}
"""How long a sum may take before its group is given up, without and with GPUs, where the first steps compile."""
RESERVED_SECONDS, RENEWED_SECONDS = 30, 5
"""For how long an elastic group reserves its machines, and how often it renews that. It cannot while a group starts."""
RESIZE_SECONDS = 10.0
"""How often an elastic group looks whether the cluster has room for more workers."""


class Profile(Strict):
    """Where to run: an entry of `cluster/profiles.yaml`. `workers`: a number, `[min, max]`, or `auto`."""

    workers: int | tuple[int, int] | str = "auto"
    gpu: bool = False
    cpus_per_worker: int = 1
    max_failures: int = 2
    hang_seconds: int | None = Field(default=None, ge=5)
    notice_file: str = ""
    notice_signal: str = ""
    notice_seconds: int = Field(default=120, ge=1)
    copies: str = ""
    address: str = "local"
    environment: dict[str, str] = Field(default_factory=dict)


def load_profile(root: Path, name: str) -> Profile:
    """A profile by name; `local` needs no file."""
    path = root / "cluster" / "profiles.yaml"
    if name == "local" and not path.exists():
        return Profile()
    entries = read_yaml(path).get("profiles", {})
    if name not in entries:
        raise UserError(f"{path}: no profile {name!r}{nearest(name, list(entries))}")
    profile: Profile = check(Profile, entries[name], f"{path}: profiles.{name}")
    if isinstance(profile.workers, str) and profile.workers != "auto":
        raise UserError(
            f"{path}: profiles.{name}.workers: found {profile.workers!r}, allowed: a number, [min, max], auto"
        )
    if profile.notice_signal:
        signal_number(profile.notice_signal)
    return profile


def worker_count(profile: Profile) -> int | tuple[int, int]:
    """`auto` is 0 (this process) without several GPUs, one worker for each GPU otherwise."""
    if isinstance(profile.workers, str):
        gpus = torch.cuda.device_count()
        return gpus if gpus > 1 else 0
    return profile.workers


def launch(recipe: Recipe, seed: int, place: Place, profile: Profile) -> dict[str, Any]:
    """Train one seed under Ray Train; returns the cost that `train_one` reports.

    Raises:
        UserError: the run cannot go on; the line says why.
        Preempted: it was asked to stop and has saved.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    train: Any = import_module("ray.train")  # Ray's own annotations describe its older version
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    workers = worker_count(profile)
    config = {"recipe": recipe.name, "seed": seed, "root": str(place.root.resolve())}
    settings: dict[str, Any] = {"train_loop_config": config, "scaling_config": _scaling(train, profile, workers)}
    torch_backend: Any = import_module("ray.train.torch")
    trainer = torch_backend.TorchTrainer
    if workers != 0:
        hang = profile.hang_seconds or HANG_SECONDS[profile.gpu]
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(hang)
        own = profile.address == "local"
        settings["torch_config"] = (_local_config if own else torch_backend.TorchConfig)(timeout_s=hang)
        settings["run_config"] = train.RunConfig(
            name=f"{place.run(recipe, seed).parent.name}-seed-{seed}",
            storage_path=str((place.root / "runs" / ".ray").resolve()),
            failure_config=train.FailureConfig(max_failures=profile.max_failures),
            worker_runtime_env={"env_vars": {**SETTINGS, **(LOOPBACK if own else {}), **profile.environment}},
        )
        if not own:
            config |= {"notice_file": profile.notice_file, "notice_seconds": str(profile.notice_seconds)}
    if profile.address == "local":
        os.environ.update({name: value for name, value in LOCAL_SETTINGS.items() if name not in os.environ})
    if workers != 0:
        run = str(place.run(recipe, seed).resolve())
        trainer = _adjusted(trainer, run, dashboard=start_ray(profile), own=profile.address == "local")
    stop_file = place.run(recipe, seed) / "stop"
    with on_notice(lambda: _ask_to_stop(stop_file), profile.notice_file, profile.notice_signal):
        while True:
            outcome = _fit(trainer(_worker if workers else _in_process, **settings))
            if "moved" not in outcome:
                return _raise_outcome(outcome)
            print(f"{outcome['moved']}; a machine is to be taken away, the others go on", flush=True)


def _scaling(train: Any, profile: Profile, workers: int | tuple[int, int]) -> Any:
    """Ray's description of the group."""
    elastic = {} if isinstance(workers, int) else {"elastic_resize_monitor_interval_s": RESIZE_SECONDS}
    resources = {"CPU": profile.cpus_per_worker}
    return train.ScalingConfig(num_workers=workers, use_gpu=profile.gpu, resources_per_worker=resources, **elastic)


def _ask_to_stop(stop_file: Path) -> None:
    """Tell the workers, through the file that they watch."""
    stop_file.parent.mkdir(parents=True, exist_ok=True)
    stop_file.touch()


def _fit(trainer: Any) -> dict[str, Any]:
    from ray.train import TrainingFailedError

    try:
        outcome: dict[str, Any] = trainer.fit().return_value
    except TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            if isinstance(failure, UserError):
                raise failure from None
        raise
    return outcome


def _adjusted(trainer: Any, run: str, dashboard: bool, own: bool) -> Any:
    """The trainer with changes that Ray has no settings for, made where its controller runs.

    - The group's end waits 5 s, not 30 s, for workers that do not answer: they may be hung or lost.
    - What an elastic group reserves belongs to its run, so that the next command for the run takes over what a driver
      that was killed has left, and it expires after half a minute, not three: until then nobody else has it.
    - An elastic group does not count on machines that have gone or are to be taken away: it would wait 20 s in vain for
      workers there, as reservations are made anew at times only.
    - No manager of Ray's data sets, and on a cluster of one's own no coordinator of requests for more machines: each is
      a process that has nothing to do, yet wakes a hundred times a second.
    - Without a dashboard no placement group cleaner, an actor that outlives the controller to free its resources. It
      would ask the dashboard for the controller's state each second, warn each second that nobody answers, and end in a
      trace. What it would free, Ray frees when the driver ends.
    """
    base: Any = import_module("ray.train.v2._internal.execution.callback").ControllerCallback

    class Settings(base):
        def after_controller_start(self, train_run_context: Any) -> None:
            os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")

    policies: Any = import_module("ray.train.v2._internal.execution.scaling_policy")
    fixed: Any = policies.FixedScalingPolicy
    elastic: Any = policies.ElasticScalingPolicy

    class Elastic(elastic):
        def after_controller_start(self, train_run_context: Any) -> None:
            client: Any = import_module(f"{policies.__name__}.autoscaling_coordinator_client")
            client.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = RESERVED_SECONDS
            client.AUTOSCALING_REQUESTS_INTERVAL_S = RENEWED_SECONDS
            super().after_controller_start(SimpleNamespace(run_id=run))  # all that it reads

        def _count_possible_workers(self, reserved_resources: Any) -> int:
            state = import_module("ray._private.state").state
            alive = {node["NodeID"] for node in state.node_table() if node["Alive"]} - {*state.get_draining_nodes()}
            staying = {node: found for node, found in reserved_resources.items() if node in alive}
            return int(super()._count_possible_workers(staying))

    class Alone(fixed):
        def after_controller_start(self, train_run_context: Any) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    class Trainer(trainer):
        def _initialize_and_run_controller(self, scaling_policy: Any, **settings: Any) -> Any:
            if isinstance(scaling_policy, elastic):
                scaling_policy = Elastic(scaling_policy.scaling_config)
            elif own:
                scaling_policy = Alone(scaling_policy.scaling_config)
            return super()._initialize_and_run_controller(scaling_policy=scaling_policy, **settings)

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            unwanted = {"DatasetsCallback", *(() if dashboard else ("PlacementGroupCleanerCallback",))}
            return [*(c for c in callbacks if type(c).__name__ not in unwanted), Settings()]

    return Trainer


def _local_config(timeout_s: int) -> Any:
    """Ray's set-up of torch.distributed for workers of one machine: they find each other through a file.

    Otherwise the first worker would open a store that listens on every address and asks nobody who he is.
    """
    config: Any = import_module("ray.train.torch.config")

    class Backend(config._TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            import ray

            meeting = Path(tempfile.mkdtemp(prefix="unroll-group-")) / "store"
            options = {"init_method": f"file://{meeting}", "timeout_s": backend_config.timeout_s}
            options["backend"] = "nccl" if worker_group.get_resources_per_worker().get("GPU") else "gloo"
            worker_group.execute(config._set_torch_distributed_env_vars)
            join, size = config._setup_torch_process_group, len(worker_group)
            ray.get(
                [
                    worker_group.execute_single_async(rank, join, world_rank=rank, world_size=size, **options)
                    for rank in range(size)
                ]
            )

    class Config(config.TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return Backend

    return Config(timeout_s=timeout_s)


def start_ray(profile: Profile) -> bool:
    """Join the cluster of the profile; returns whether it has a dashboard.

    A cluster of one's own listens on 127.0.0.1 alone. Ray would take the machine's address instead, even if told to take
    this one (it replaces 127.0.0.1 on Linux), hence the patch.

    Raises:
        UserError: it is not there.
    """
    import ray

    own: dict[str, Any] = (
        {"_node_ip_address": LOCALHOST} if profile.address == "local" and not ray.is_initialized() else {}
    )
    resolve = patch("ray._private.services.resolve_ip_for_localhost", lambda host: host) if own else nullcontext()
    try:
        _knock(profile.address)
        with resolve:
            context = ray.init(address=profile.address, include_dashboard=False, ignore_reinit_error=True, **own)
    except Exception as error:  # Ray raises bare Exceptions here
        reason = str(error).splitlines()[0]
        raise UserError(f"Ray did not start (address {profile.address!r}): {reason}") from error
    return bool(context.dashboard_url)


def _knock(address: str) -> None:
    """Whether anybody is there: Ray itself would go on asking for minutes. Raises OSError."""
    given = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = given.rpartition(":")
    if port.isdigit() and "/" not in host:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            return


def _in_process(config: dict[str, Any]) -> dict[str, Any]:
    """Ray's local mode: this very process, no worker group."""
    return _run(config, WorkerContext(device=default_device()))


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """One worker of a group; Ray has set up `torch.distributed`."""
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    worker = WorkerContext(context.get_world_rank(), context.get_world_size(), get_device())
    if "notice_file" in config:
        threading.Thread(target=_watch_machines, args=(worker, config), name="unroll-machines", daemon=True).start()
    return _run(config, worker)


def _watch_machines(context: WorkerContext, config: dict[str, Any]) -> None:
    """Ask for a stop as soon as a machine of the group is to be taken away, by Ray's word or by a notice file.

    A notice file is passed on to Ray, which starts nothing more on that machine and tells the other workers.
    """
    import ray.train

    file = Path(config["notice_file"]) if config["notice_file"] else None
    while True:
        time.sleep(max(POLL_SECONDS, context.size / 100))  # all workers ask one actor
        if file is not None and file.exists():
            file = None
            _give_up_machine(config["notice_seconds"])
        if ray.train.get_preemption_info() is not None:
            context.stop_signal = True
            return


def _give_up_machine(seconds: str) -> None:
    """Tell Ray that this machine goes in so many seconds."""
    import ray

    context = ray.get_runtime_context()
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--node-id", context.get_node_id()]
    command += ["--address", context.gcs_address, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "notice file", "--deadline-remaining-seconds", seconds]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        print(f"the machine's notice could not be passed on to Ray: {lines[-1]}", flush=True)


def _run(config: dict[str, Any], context: WorkerContext) -> dict[str, Any]:
    from unroll.training.loop import NonFiniteError, Preempted

    place = Place(Path(config["root"]))
    recipe = load_recipe(place.root, config["recipe"])
    run = place.run(recipe, config["seed"])
    context.stop_file = run / "stop"
    # The command has removed a run that ended before: what has ended now did so in a group that Ray then replaced.
    [ended] = context.sum([float(context.is_first and (run / "finished.json").exists())])
    if ended:
        return {"cost": json.loads((run / "finished.json").read_text()) if context.is_first else {}}
    try:
        return {"cost": train_one(recipe, config["seed"], place, context)}
    except NonFiniteError as error:
        return {"user_error": str(error)}
    except UserError as error:
        if context.size > 1:
            raise  # the other workers may be waiting in a sum: only the end of this one frees them
        return {"user_error": str(error)}
    except Preempted as error:
        moved = "notice_file" in config and not context.stop_file.exists()
        return {"moved" if moved else "preempted": str(error)}


def _raise_outcome(outcome: dict[str, Any]) -> dict[str, Any]:
    """Errors that no retry mends come back as values, so that Ray neither retries them nor wraps them in a trace."""
    from unroll.training.loop import Preempted

    if "user_error" in outcome:
        raise UserError(outcome["user_error"])
    if "preempted" in outcome:
        raise Preempted(outcome["preempted"])
    cost: dict[str, Any] = outcome["cost"]
    return cost
