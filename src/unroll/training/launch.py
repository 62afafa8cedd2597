"""Ray Train around a run: no worker group on one machine without a GPU, one worker for each GPU, or an elastic group.

The only file that imports ray. Checkpoints stay in the run's folder (shared storage on a cluster) and the newest valid
one is found there after any failure: Ray offers only those its controller had registered, and `ray.train.report` would
block each time for its poll (measured: 2 s), so it is not called. The result comes back as the function's return value.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pydantic import Field

from unroll.config import Recipe, Strict, check, load_recipe, nearest, read_yaml
from unroll.errors import UserError
from unroll.training.context import WorkerContext
from unroll.training.runs import Place, default_device, train_one

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
}

LOCAL_SETTINGS = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Nobody drains the nodes of a cluster that this process started, and the watcher greets with an error of its own."""


class Profile(Strict):
    """Where to run: an entry of `cluster/profiles.yaml`. `workers`: a number, `[min, max]`, or `auto`."""

    workers: int | tuple[int, int] | str = "auto"
    gpu: bool = False
    cpus_per_worker: int = 1
    max_failures: int = 2
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
    resources = {"CPU": profile.cpus_per_worker}
    scaling = train.ScalingConfig(num_workers=workers, use_gpu=profile.gpu, resources_per_worker=resources)
    settings: dict[str, Any] = {"train_loop_config": config, "scaling_config": scaling}
    if workers != 0:
        start_ray(profile)
        settings["run_config"] = train.RunConfig(
            name=f"{place.run(recipe, seed).parent.name}-seed-{seed}",
            storage_path=str((place.root / "runs" / ".ray").resolve()),
            failure_config=train.FailureConfig(max_failures=profile.max_failures),
            worker_runtime_env={"env_vars": {**SETTINGS, **profile.environment}},
        )
    trainer: Any = import_module("ray.train.torch").TorchTrainer
    if profile.address == "local":
        os.environ.update({name: value for name, value in LOCAL_SETTINGS.items() if name not in os.environ})
        trainer = _without_cleaner(trainer)
    with _forward_sigterm(place.run(recipe, seed) / "stop"):
        return _raise_outcome(_fit(trainer(_worker if workers else _in_process, **settings)))


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


def _without_cleaner(trainer: Any) -> Any:
    """The trainer without Ray's placement group cleaner, an actor that outlives the controller to free its resources.

    A local cluster ends with this process, so there is nothing to free. The cleaner would ask the dashboard, which is
    off, for the controller's state each second, warn each second that nobody answers, and end in a trace.
    """

    class Trainer(trainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]

    return Trainer


def start_ray(profile: Profile) -> None:
    """Raises UserError when the cluster of the profile is not there."""
    import ray

    if ray.is_initialized():
        return
    try:
        ray.init(address=profile.address, include_dashboard=False)
    except Exception as error:  # Ray raises bare Exceptions here
        reason = str(error).splitlines()[0]
        raise UserError(f"Ray did not start (address {profile.address!r}): {reason}") from error


class _forward_sigterm:
    """Turn SIGTERM on the driver into the stop file that the workers watch."""

    def __init__(self, stop_file: Path) -> None:
        self.stop_file = stop_file

    def __enter__(self) -> None:
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGTERM, self.ask)

    def ask(self, signum: int, frame: FrameType | None) -> None:
        self.stop_file.parent.mkdir(parents=True, exist_ok=True)
        self.stop_file.touch()

    def __exit__(self, *error: object) -> None:
        if self.main:
            signal.signal(signal.SIGTERM, self.before)


def _in_process(config: dict[str, Any]) -> dict[str, Any]:
    """Ray's local mode: this very process, no worker group."""
    return _run(config, WorkerContext(device=default_device()))


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """One worker of a group; Ray has set up `torch.distributed`."""
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return _run(config, WorkerContext(context.get_world_rank(), context.get_world_size(), get_device()))


def _run(config: dict[str, Any], context: WorkerContext) -> dict[str, Any]:
    from unroll.training.loop import NonFiniteError, Preempted

    place = Place(Path(config["root"]))
    recipe = load_recipe(place.root, config["recipe"])
    context.stop_file = place.run(recipe, config["seed"]) / "stop"
    try:
        return {"cost": train_one(recipe, config["seed"], place, context)}
    except NonFiniteError as error:
        return {"user_error": str(error)}
    except UserError as error:
        if context.size > 1:
            raise  # the other workers may be waiting in a sum: only the end of this one frees them
        return {"user_error": str(error)}
    except Preempted as error:
        return {"preempted": str(error)}


def _raise_outcome(outcome: dict[str, Any]) -> dict[str, Any]:
    """Errors that no retry mends come back as values, so that Ray neither retries them nor wraps them in a trace."""
    from unroll.training.loop import Preempted

    if "user_error" in outcome:
        raise UserError(outcome["user_error"])
    if "preempted" in outcome:
        raise Preempted(outcome["preempted"])
    cost: dict[str, Any] = outcome["cost"]
    return cost
