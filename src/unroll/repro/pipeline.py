"""The DVC side of `unroll repro`: which stages there are, which of them changed, and saving what they made.

The only file that imports dvc. One thread of one process uses it, so dvc.lock has one writer. Stage by stage it does what
`dvc repro` does (dvc/repo/reproduce.py, dvc/stage/__init__.py and run.py of DVC 3.67), except that others run the command
while the repository is unlocked, and that dvc.lock is written for several stages at once: reading and writing it takes
seconds when it holds hundreds of stages. What a crash keeps out of dvc.lock is restored from DVC's run cache.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvc.dependency import param
from dvc.dependency.db import AbstractDependency
from dvc.dependency.repo import RepoDependency
from dvc.dvcfile import PROJECT_FILE, ProjectFile
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro
from dvc.rwlock import rwlock
from dvc.stage.cache import RunCacheNotFoundError
from dvc.stage.run import _enforce_cmd_list, _make_cmd, get_executable, prepare_kwargs
from dvc.utils.serialize import modify_yaml

from unroll.errors import UserError

if TYPE_CHECKING:
    from dvc.stage import Stage

LOCK_SECONDS = 60.0
"""How long to wait for a DVC command that holds DVC's own lock."""
SHARE_OF_WRITING = 0.1
"""Share of the time that writing dvc.lock may take."""


class StageError(Exception):
    """A stage cannot be reproduced; the text says why."""


class Busy(Exception):
    """Another DVC command uses the files of a stage."""


@dataclass(frozen=True)
class Command:
    """What runs a stage: `lines` one after another, each an argument list, in `folder`, with all output to `log`.

    `runs_on` is the stage's `meta: runs_on` in dvc.yaml: "workers" for what may start its own Ray workers, "device" for
    what uses a GPU if there is one, "" for the rest.
    """

    stage: str
    lines: tuple[list[str], ...]
    folder: str
    environment: dict[str, str]
    log: Path
    runs_on: str = ""


@contextmanager
def opened(targets: Sequence[str]) -> Iterator[Pipeline]:
    """The stages that `targets` (none: all of dvc.yaml) need, under DVC's lock.

    Raises:
        UserError: no DVC project here, an unknown target, a mistake in dvc.yaml, or DVC's lock is held for too long.
    """
    try:
        logging.getLogger("dvc").setLevel(logging.WARNING)
        with Repo() as repo, _parameters_parsed_once():
            _lock(repo, LOCK_SECONDS)
            try:
                repo._reset()
                with repo.scm_context():
                    pipeline = Pipeline(repo, targets)
                    try:
                        yield pipeline
                    finally:
                        pipeline.close()
            finally:
                repo._reset()
                if repo.lock.is_locked:
                    repo.lock.unlock()
    except DvcException as error:
        raise UserError(" ".join(_reason(error).split())) from error


class Pipeline:
    """`order`: the stages as `dvc repro` would run them; `needs[stage]`: the stages whose outputs it reads."""

    def __init__(self, repo: Repo, targets: Sequence[str]) -> None:
        self.repo = repo
        graph = get_active_graph(repo.index.graph)
        steps: list[Stage] = plan_repro(graph, _chosen(repo, targets))
        self.stages = {stage.addressing: stage for stage in steps}
        self.order = list(self.stages)
        self.needs = {
            stage.addressing: {other.addressing for other in graph.successors(stage)} & self.stages.keys()
            for stage in steps
        }
        self.logs = Path(repo.tmp_dir) / "repro"
        self.logs.mkdir(exist_ok=True)
        self._locks: dict[tuple[str, bool], ExitStack] = {}
        self._users: Counter[tuple[str, bool]] = Counter()
        self._unwritten: list[Stage] = []
        self._written: list[Stage] = []
        self._known: dict[str, set[str]] = {}
        self._next_write = 0.0

    def prepare(self, name: str) -> Command | None:
        """Make a stage ready to run: its outputs removed. None if there is nothing to run: unchanged, or restored.

        Raises:
            Busy: another DVC command uses its files.
            StageError: a dependency is missing, or DVC cannot read or write something.
        """
        stage = self.stages[name]
        with _stage_errors():
            if stage.frozen or not stage.cmd:  # imported or added data: DVC does all of it here and now
                if stage.reproduce(upstream=[self.stages[other] for other in self.needs[name]]):
                    self._unwritten.append(stage)
                return None
            if not stage.changed(False, None):
                return None
            self._hold(stage)
            try:
                stage.remove_outs(ignore_remove=False, force=False)
                try:
                    self.repo.stage_cache.restore(stage)
                except RunCacheNotFoundError:
                    stage.save_deps()
                    return self._command(stage)
                self._save(stage)
            except BaseException:
                self.release(name)
                raise
        self.release(name)
        return None

    def finish(self, name: str) -> None:
        """Hash and cache the outputs of a stage whose command has ended well.

        Raises:
            StageError: an output is missing or cannot be saved.
        """
        try:
            with _stage_errors():
                self._save(self.stages[name])
        finally:
            self.release(name)

    def release(self, name: str) -> None:
        """Let other DVC commands use the files of a stage again."""
        for key in _paths(self.stages[name]):
            self._let_go(key)

    def write(self, now: bool = False) -> None:
        """Bring finished stages into dvc.lock; `now`: even if it was written a moment ago."""
        if not self._unwritten or (not now and time.monotonic() < self._next_write):
            return
        began = time.monotonic()
        for path in dict.fromkeys(stage.path for stage in self._unwritten):
            stages = [stage for stage in self._unwritten if stage.path == path]
            file = stages[0].dvcfile
            if isinstance(file, ProjectFile):
                if path not in self._known:
                    self._known[path] = set(file.lockfile_contents.get("stages", {}))
                file.dump_stages(stages, update_pipeline=False)
            else:
                stages[0].dump(update_pipeline=False)
        self._written += self._unwritten
        self._unwritten.clear()
        ended = time.monotonic()
        self._next_write = ended + (ended - began) / SHARE_OF_WRITING

    @contextmanager
    def unlocked(self) -> Iterator[None]:
        """While inside, other DVC commands may work in this checkout, on files that no running stage uses."""
        self.repo.lock.unlock()
        self.repo._reset()
        try:
            yield
        finally:
            _lock(self.repo, float("inf"))  # a `dvc push` may take hours: no reason to give up what is running

    def close(self) -> None:
        """Write what is not yet written, new stages in the order in which `dvc repro` would have added them."""
        self.write(now=True)
        for path, known in self._known.items():
            new = [stage.name for stage in self._written if stage.path == path and stage.name not in known]
            in_order = [stage.name for stage in self.stages.values() if stage.path == path and stage.name in new]
            if new != in_order:
                _move_to_end(Path(path).with_suffix(".lock"), in_order)
        for lock in self._locks.values():
            lock.close()
        self._locks.clear()

    def _save(self, stage: Stage) -> None:
        uncached = any(not out.use_cache for out in stage.outs if not (out.is_metric or out.is_plot))
        stage.save(run_cache=not uncached)
        stage.commit()
        self._unwritten.append(stage)

    def _command(self, stage: Stage) -> Command:
        started = prepare_kwargs(stage)
        shell = get_executable()
        lines = tuple(_make_cmd(shell, line) for line in _enforce_cmd_list(stage.cmd))
        log = self.logs / (stage.addressing.replace("/", "_") + ".log")
        meta = stage.meta if isinstance(stage.meta, dict) else {}
        return Command(stage.addressing, lines, started["cwd"], started["env"], log, str(meta.get("runs_on", "")))

    def _hold(self, stage: Stage) -> None:
        """Mark the files of a stage as used, as DVC does: others may read its dependencies and not touch its outputs.

        DVC forgets a shared dependency when the first of two stages of one process lets it go: hence the counts.
        """
        with ExitStack() as undo:
            for path, writes in _paths(stage):
                key = (path, writes)
                if not self._users[key]:
                    lock = ExitStack()
                    reads, written = ([], [path]) if writes else ([path], [])
                    hard = self.repo.config["core"].get("hardlink_lock", False)
                    lock.enter_context(
                        rwlock(self.repo.tmp_dir, self.repo.fs, " ".join(sys.argv), reads, written, hard)
                    )
                    self._locks[key] = lock
                self._users[key] += 1
                undo.callback(self._let_go, key)
            undo.pop_all()

    def _let_go(self, key: tuple[str, bool]) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self._locks.pop(key).close()


def _chosen(repo: Repo, targets: Sequence[str]) -> list[Stage]:
    """The stages that are named, or all of dvc.yaml; DVC itself would read all files again for each target."""
    stages: list[Stage] = list(repo.index.stages)
    named = {stage.addressing: stage for stage in stages}
    whole = [stage for stage in stages if stage.relpath == PROJECT_FILE]
    if not targets and whole:
        return whole
    if targets and all(target in named for target in targets):
        return [named[target] for target in dict.fromkeys(targets)]
    return collect_stages(repo, targets or [PROJECT_FILE])  # a group (train), a file (data.dvc), or a mistake


@contextmanager
def _parameters_parsed_once() -> Iterator[None]:
    """DVC parses a file of parameters again for each stage: minutes for hundreds of stages and as many recipes."""
    parse, parsed = param.load_path, {}

    def load_path(path: str, *arguments: Any, **options: Any) -> Any:
        if not os.path.exists(path):
            return parse(path, *arguments, **options)
        state = os.stat(path)
        key = (path, state.st_ino, state.st_mtime_ns, state.st_size)
        if key not in parsed:
            parsed[key] = parse(path, *arguments, **options)
        return copy.deepcopy(parsed[key])  # what two stages shared would become an alias in dvc.lock

    param.load_path = load_path
    try:
        yield
    finally:
        param.load_path = parse


def _paths(stage: Stage) -> list[tuple[str, bool]]:
    """(path, whether it is written) of the files of a stage that DVC's file lock knows."""
    read = [dep.fs_path for dep in stage.deps if not isinstance(dep, (RepoDependency, AbstractDependency))]
    return [*((path, False) for path in dict.fromkeys(read)), *((out.fs_path, True) for out in stage.outs)]


def _lock(repo: Repo, seconds: float) -> None:
    """DVC's own wait is three seconds."""
    began, told = time.monotonic(), False
    while True:
        try:
            repo.lock.lock()
            return
        except LockError:
            if time.monotonic() - began >= seconds:
                raise UserError(
                    f"{repo.lock.lockfile}: held by another DVC command for {seconds:.0f} s; wait until it ends"
                ) from None
            if not told:
                print("waiting for another DVC command in this checkout", flush=True)
                told = True


@contextmanager
def _stage_errors() -> Iterator[None]:
    try:
        yield
    except LockError as error:
        raise Busy(_reason(error)) from error
    except (DvcException, OSError) as error:
        raise StageError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """The message of an error and of what caused it, as `dvc` prints them."""
    causes = [str(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        causes.append(str(error))
    return ": ".join(dict.fromkeys(cause for cause in causes if cause)) or type(error).__name__


def _move_to_end(lock: Path, names: Sequence[str]) -> None:
    """Put the entries `names` of a lock file at its end, in this order."""
    with modify_yaml(str(lock)) as content:
        for name in names:
            content["stages"][name] = content["stages"].pop(name)
