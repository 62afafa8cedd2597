"""Stages as Ray tasks, with the CPUs and GPUs of a profile. The checkout is in storage that all machines share."""

from __future__ import annotations

import signal
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unroll.repro.processes import Ended, reason, run
from unroll.training.launch import Profile, load_profile, start_ray, worker_count

if TYPE_CHECKING:
    from unroll.repro.pipeline import Command

PASSED_ON = ("DVC_", "UNROLL_", "MLFLOW_", "OMP_", "PYTHONPATH")
"""Beginnings of the names of variables that a task gets from here; the rest of its environment is its machine's own."""
SETTINGS = {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "false"}}
"""A worker whose driver was killed would kill its stage at once; the stage's guard asks it to save first."""
LEAVE = 75
"""Exit code of a training that its machine asked to leave; it has saved and goes on elsewhere."""


class RayTasks:
    """Commands as Ray tasks on the cluster of a profile.

    A stage whose `meta: runs_on` in dvc.yaml is `workers` asks for nothing itself if the profile has a worker group: the
    group asks. `device` gets a GPU if the profile has one. Every other stage gets the CPUs of one worker.
    """

    def __init__(self, name: str) -> None:
        """Raises UserError: no such profile, or no such cluster."""
        self.name, self.profile = name, load_profile(Path(), name)
        self.retries = self.profile.max_failures
        self.ray: Any = import_module("ray")
        start_ray(self.profile)
        self.address = self.ray.get_runtime_context().gcs_address
        self.tasks: dict[Any, Command] = {}

    def start(self, command: Command) -> None:
        cpus, gpus = resources(self.profile, command.runs_on)
        passed = {name: value for name, value in command.environment.items() if name.startswith(PASSED_ON)}
        threads = {"OMP_NUM_THREADS": str(cpus)} if cpus else {}
        environment = {
            **threads, **passed, "RAY_ADDRESS": self.address, "UNROLL_PROFILE": self.name, **self.profile.environment
        }  # fmt: skip
        task = self.ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0, runtime_env=SETTINGS)(run)
        reference = task.remote(command.lines, command.folder, environment, str(command.log))
        self.tasks[reference] = command

    def begun(self, stage: str) -> bool:
        return any(command.log.exists() for command in self.tasks.values() if command.stage == stage)

    def wait(self, seconds: float) -> list[Ended]:
        if not self.tasks:
            time.sleep(seconds)
            return []
        done, _ = self.ray.wait(list(self.tasks), num_returns=1, timeout=seconds, fetch_local=False)
        return [self._ended(reference) for reference in done]

    def stop(self, number: int) -> list[Ended]:
        references = list(self.tasks)
        for reference in references:
            self.ray.cancel(reference, force=number == signal.SIGKILL)
        self.ray.wait(references, num_returns=len(references), timeout=60) if references else None
        return [self._ended(reference) for reference in references]

    def _ended(self, reference: Any) -> Ended:
        stage = self.tasks.pop(reference).stage
        errors = self.ray.exceptions
        try:
            code = self.ray.get(reference, timeout=1)
        except (errors.TaskCancelledError, errors.GetTimeoutError):
            return Ended(stage, -signal.SIGTERM, "cancelled")
        except errors.RayTaskError as error:
            return Ended(stage, 1, str(error).strip().splitlines()[-1])
        except errors.RayError as error:
            return Ended(stage, None, f"its machine was lost ({type(error).__name__})")
        if code == LEAVE:
            return Ended(stage, None, "it saved and left its machine", saved=True)
        return Ended(stage, code, reason(code))


def resources(profile: Profile, runs_on: str) -> tuple[int, int]:
    """(CPUs, GPUs) that the task of a stage asks for."""
    if runs_on == "workers" and worker_count(profile) != 0:
        return 0, 0
    return profile.cpus_per_worker, int(profile.gpu and runs_on in ("workers", "device"))
