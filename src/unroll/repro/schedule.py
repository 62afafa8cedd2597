"""Which stage runs next, until all are done, failed or stopped.

Several commands in one checkout take turns: a lock file is held from before the graph is read until the last child has
ended, also by children that outlive a killed parent.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from unroll.errors import UserError
from unroll.repro.pipeline import LOCK_SECONDS, Busy, Pipeline, StageError, opened
from unroll.repro.processes import Ended, Processes, Runner
from unroll.repro.table import Display, State, display
from unroll.tracking import all_sent_to_tracker

PREEMPTED = 75
"""Exit code of a stage, and of `unroll repro`, that was asked to stop and saved: run it again to go on (EX_TEMPFAIL)."""
FAILED = 1
WAIT_SECONDS = 0.2
GUESSED_MINUTES = 0.1
"""What a stage takes of which no result tells."""
LOCK_FILE = "unroll-repro.lock"


def repro(targets: Sequence[str], jobs: int | None = None, profile: str | None = None, track: bool = False) -> int:
    """Reproduce `targets` (none: everything) of the project in the working directory; returns the exit code.

    `jobs` commands run at a time (1 if None). With a `profile` (cluster/profiles.yaml) they run as Ray tasks instead, as
    many as the cluster has room for, at most `jobs` if it is given. With `track` one sender for all of them sends their
    runs to MLflow; Ray tasks, which may run elsewhere, start their own.

    Exit code: 0 all is up to date, 1 a stage failed, 75 stopped by SIGTERM (or every stage that ended badly did so with
    75), 130 stopped by Ctrl-C.

    Raises:
        UserError: no DVC project, an unknown target or profile, a mistake in dvc.yaml, DVC's lock held for too long.
    """
    shared = all_sent_to_tracker(Path(), enabled=track and profile is None)
    with _checkout_lock(Path(".dvc") / "tmp") as lock, shared as variables:
        runner = _runner(jobs, profile, lock, variables)  # before the signals: Ray sets its own handlers
        with _stop_signals() as asked, opened(targets) as pipeline:
            shown = display(pipeline.order)
            schedule = Schedule(pipeline, runner, shown, jobs or (1 if profile is None else len(pipeline.order)), asked)
            with shown:
                schedule.run()
            shown.close()
        return schedule.exit_code()


def _runner(jobs: int | None, profile: str | None, lock: int, variables: dict[str, str]) -> Runner:
    if profile is not None:
        from unroll.repro.ray_tasks import RayTasks

        return RayTasks(profile)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Processes(max(1, cores // jobs) if jobs and jobs > 1 else None, [lock], variables)


class Schedule:
    """The stages of `pipeline` on `runner`, at most `jobs` at a time. `asked` holds the signals that ask for a stop."""

    def __init__(self, pipeline: Pipeline, runner: Runner, shown: Display, jobs: int, asked: list[int]) -> None:
        self.pipeline, self.runner, self.shown, self.jobs, self.asked = pipeline, runner, shown, jobs, asked
        self.order = pipeline.order if jobs == 1 else _longest_first(pipeline, Path("results"))
        self.waiting = set(pipeline.order)
        self.running: dict[str, None] = {}
        self.finished: set[str] = set()
        self.codes: list[int] = []
        self.blocked: dict[str, float] = {}
        self.losses: Counter[str] = Counter()

    def run(self) -> None:
        """Until nothing is left to do, or a stop is asked for. No process is left over, whatever happens."""
        try:
            while (self.waiting or self.running) and not self.asked:
                self._start_ready()
                self.pipeline.write()
                if self.running or self.blocked:
                    for ended in self._wait():
                        self._end(ended)
            if self.asked:
                for ended in self.runner.stop(self.asked[0]):
                    self._end(ended)
        finally:
            self.runner.stop(signal.SIGKILL)
        for name in [*self.running, *self.waiting]:
            self.shown.end(name, State.STOPPED if name in self.running else State.SKIPPED)

    def exit_code(self) -> int:
        if self.asked:
            return 128 + signal.SIGINT if self.asked[0] == signal.SIGINT else PREEMPTED
        if not self.codes:
            return 0
        return PREEMPTED if set(self.codes) == {PREEMPTED} else FAILED

    def _start_ready(self) -> None:
        for name in self.order:
            if len(self.running) >= self.jobs or self.asked:
                return
            if name in self.waiting and self.pipeline.needs[name] <= self.finished:
                self._start(name)

    def _start(self, name: str) -> None:
        try:
            command = self.pipeline.prepare(name)
        except Busy as error:
            began = self.blocked.setdefault(name, time.monotonic())
            if time.monotonic() - began > LOCK_SECONDS:
                self._fail(name, str(error))
            return
        except StageError as error:
            self._fail(name, str(error))
            return
        self.blocked.pop(name, None)
        self.waiting.remove(name)
        if command is None:
            self.finished.add(name)
            self.shown.end(name, State.CACHED)
            return
        command.log.unlink(missing_ok=True)
        self.running[name] = None
        self.shown.start(name, command.log)
        self.runner.start(command)

    def _wait(self) -> list[Ended]:
        """Until a stage ends, a stop is asked for, or a blocked stage is worth another try."""
        with self.pipeline.unlocked():
            while not self.asked:
                for name in self.running:
                    if self.runner.begun(name):
                        self.shown.begin(name)
                ended = self.runner.wait(WAIT_SECONDS)
                self.shown.tick()
                if ended or self.blocked:
                    return ended
        return []

    def _end(self, ended: Ended) -> None:
        name = ended.stage
        self.running.pop(name, None)
        if ended.code is None and not self.asked and (ended.saved or self.losses[name] < self.runner.retries):
            self.losses[name] += not ended.saved
            self.pipeline.release(name)
            self.waiting.add(name)
            self.shown.end(name, State.WAITING, ended.reason)
            return
        if ended.code == 0:
            try:
                self.pipeline.finish(name)
                self.finished.add(name)
                self.shown.end(name, State.DONE)
            except StageError as error:
                self._fail(name, str(error))
            return
        self.pipeline.release(name)
        if self.asked:
            self.shown.end(name, State.STOPPED, ended.reason)
        else:
            self._fail(name, ended.reason, ended.code)

    def _fail(self, name: str, reason: str, code: int | None = FAILED) -> None:
        """The stage and all that need it are over."""
        self.codes.append(FAILED if code is None else code)
        self.waiting.discard(name)
        self.blocked.pop(name, None)
        self.shown.end(name, State.FAILED, reason)
        lost = {name}
        for other in self.pipeline.order:
            if other in self.waiting and self.pipeline.needs[other] & lost:
                lost.add(other)
                self.waiting.remove(other)
                self.shown.end(other, State.SKIPPED, f"needs {name}")


def _longest_first(pipeline: Pipeline, results: Path) -> list[str]:
    """The stages by the minutes from their start to the end of what waits for them, so that no long one is left to run
    alone at the end; where that is equal, in the order of the serial run. A training takes what `results` says it took.
    """
    known = _training_minutes(results)
    ahead = dict.fromkeys(pipeline.order, 0.0)
    for name in reversed(pipeline.order):  # a stage comes after those it needs
        ahead[name] += known.get(name, GUESSED_MINUTES)
        for needed in pipeline.needs[name]:
            ahead[needed] = max(ahead[needed], ahead[name])
    return sorted(pipeline.order, key=lambda name: -ahead[name])


def _training_minutes(results: Path) -> dict[str, float]:
    """By stage, for all its seeds; no more than a hint, so a file that is damaged (the report says so) tells nothing."""
    minutes = {}
    for path in results.glob("*/*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            result = json.loads(path.read_text())
            minutes[f"train@{path.stem}"] = float(result["cost"]["minutes"]) * len(result["seeds"])
    return minutes


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The stop signals received so far. A second Ctrl-C interrupts whatever goes on."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _checkout_lock(folder: Path) -> Iterator[int]:
    """One `unroll repro` at a time in a checkout; the others wait for their turn. Yields the open lock file."""
    if not folder.parent.is_dir():
        raise UserError(f"{folder.parent.absolute()}: no such folder; run `dvc init` first")
    folder.mkdir(exist_ok=True)
    lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 64, 0).decode(errors="replace").strip() or "of another process"
            print(
                f"waiting for another unroll repro in this checkout (PID {holder}, or stages that it left)", flush=True
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield lock
    finally:
        os.close(lock)
