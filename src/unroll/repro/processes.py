"""Stages as processes of this machine. All that a stage starts is one process group, so that nothing of it is left over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import psutil

if TYPE_CHECKING:
    from unroll.repro.pipeline import Command

POLL_SECONDS = 0.05
GRACE_SECONDS: dict[int, float] = {signal.SIGINT: 10.0, signal.SIGTERM: 30.0}
"""Time between the signal that asks stages to end and the one that ends them; SIGTERM makes a training save first."""
KILL_SECONDS = 10.0


@dataclass(frozen=True)
class Ended:
    """A stage whose command has ended. `code` None: the machine was lost, or (`saved`) asked the stage to leave it."""

    stage: str
    code: int | None
    reason: str = ""
    saved: bool = False


class Runner(Protocol):
    """Where commands run: `Processes` or `RayTasks`. `retries`: how often a stage is run again whose machine was lost."""

    retries: int

    def start(self, command: Command) -> None: ...

    def begun(self, stage: str) -> bool:
        """Whether a started stage really runs by now, and does not wait for a free machine."""

    def wait(self, seconds: float) -> list[Ended]:
        """The stages that ended, as soon as there is one; none after `seconds`."""

    def stop(self, number: int) -> list[Ended]:
        """Send signal `number` to all that runs, wait for its end, end the rest by force."""


GUARD = """
exec 3<&0
(read word <&3 || { kill -s TERM -- -$0; sleep $1; kill -s KILL -- -$0; }) >/dev/null 2>&1 &
"""
"""Waits for a line; if the pipe closes without one, whoever should have written it was killed: ends the group instead.
A process of its own: Ray kills the children of a worker that dies, and not theirs."""


class Group:
    """The commands of one stage, one after another; each with all that it starts is a process group.

    Should this process be killed, the group is asked to end, and killed after a grace.
    """

    def __init__(self, lines: Sequence[list[str]], folder: str, environment: dict[str, str], log: Path,
                 inherit: Sequence[int] = ()) -> None:  # fmt: skip
        self.rest, self.folder, self.environment, self.inherit = list(lines), folder, environment, inherit
        self.log = log
        self.log.write_bytes(b"")
        self.guard: int | None = None
        self._next()

    def _next(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.rest.pop(0),
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self.inherit,
                start_new_session=True,
            )
        pipe, self.guard = os.pipe()
        told = [str(self.process.pid), str(int(GRACE_SECONDS[signal.SIGTERM]))]
        subprocess.run(["/bin/sh", "-c", GUARD, *told], stdin=pipe, start_new_session=True, check=True)
        os.close(pipe)

    def poll(self) -> int | None:
        """The exit code of the first command that failed, or of the last one; None while one runs."""
        code = self.process.poll()
        if code is not None and self.guard is not None:
            os.write(self.guard, b"ended\n")
            os.close(self.guard)
            self.guard = None
        if code == 0 and self.rest:
            self._next()
            return None
        return code

    def signal(self, number: int) -> None:
        """To every process of the group. No command follows the present one."""
        self.rest.clear()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def left(self) -> bool:
        """Whether any process of a signalled group lives."""
        self.poll()  # takes the first one away if it has ended, and lets the guard go
        return any(_lives_in(process, self.process.pid) for process in psutil.process_iter(["status"]))


def stop(groups: Sequence[Group], number: int) -> None:
    """Signal the groups and return when nothing of them is left; what does not end in time is killed."""
    for group in groups:
        group.signal(number)
    deadline = time.monotonic() + GRACE_SECONDS.get(number, 0.0)
    left = list(groups)
    while left := [group for group in left if group.left()]:
        if time.monotonic() > deadline:
            for group in left:
                group.signal(signal.SIGKILL)
        if time.monotonic() > deadline + KILL_SECONDS:  # a process that waits for a dead disk cannot be killed
            return
        time.sleep(POLL_SECONDS)


class Processes:
    """Commands as process groups of this machine.

    `threads`: OMP_NUM_THREADS for each, unless it is set already. `inherit`: open files that commands keep open, so that
    a lock on one of them lasts as long as anything that runs. `variables`: added to the environment of each.
    """

    retries = 0

    def __init__(
        self, threads: int | None = None, inherit: Sequence[int] = (), variables: Mapping[str, str] | None = None
    ) -> None:
        self.threads, self.inherit, self.variables = threads, inherit, variables or {}
        self.groups: dict[str, Group] = {}

    def start(self, command: Command) -> None:
        environment = {**with_this_python(command.environment), **self.variables}
        if self.threads:
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        self.groups[command.stage] = Group(command.lines, command.folder, environment, command.log, self.inherit)

    def begun(self, stage: str) -> bool:
        return True

    def wait(self, seconds: float) -> list[Ended]:
        deadline = time.monotonic() + seconds
        while not (ended := self._take_ended()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return ended

    def stop(self, number: int) -> list[Ended]:
        stop(list(self.groups.values()), number)
        return self._take_ended()

    def _take_ended(self) -> list[Ended]:
        codes = {stage: group.poll() for stage, group in self.groups.items()}
        ended = [Ended(stage, code, reason(code)) for stage, code in codes.items() if code is not None]
        for one in ended:
            del self.groups[one.stage]
        return ended


def run(lines: list[list[str]], folder: str, environment: dict[str, str], log: str) -> int:
    """The commands of a stage, here and now; returns the exit code.

    When interrupted (Ray cancels a task by KeyboardInterrupt), all that they started is asked to save and end first.
    """
    # What `&` starts in a script ignores SIGINT, and so would Ray's workers and the KeyboardInterrupt that ends a task.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    group = Group(lines, folder, with_this_python({**os.environ, **environment}), Path(log))
    try:
        while (code := group.poll()) is None:
            time.sleep(POLL_SECONDS)
        return code
    finally:
        stop([group], signal.SIGTERM)


def with_this_python(environment: dict[str, str]) -> dict[str, str]:
    """So that `python` in a stage's command is the one that has unroll, also when its folder is not in PATH."""
    folder = str(Path(sys.executable).parent)
    paths = environment.get("PATH", os.defpath).split(os.pathsep)
    return {**environment, "PATH": os.pathsep.join([folder, *(path for path in paths if path != folder)])}


def reason(code: int) -> str:
    """What an exit code means, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _lives_in(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError):
        return False
