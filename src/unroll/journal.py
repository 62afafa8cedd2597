"""The history of a run: an append-only file in the run's folder, written first and sent to a tracker second.

    runs/<recipe>-<hash>/seed-<seed>/journal.jsonl        one JSON object a line, flushed line by line
      {"kind": "params",   "time": 1.7e9, "values": {...}}                  may be nested
      {"kind": "metrics",  "time": 1.7e9, "step": 10, "values": {"train/loss": 2.1}}
      {"kind": "tag",      "time": 1.7e9, "values": {"recipe": ...}}        the first line names the run
      {"kind": "artifact", "time": 1.7e9, "path": relative to the run, "to": folder in the tracker}
      {"kind": "model",    "time": 1.7e9, "path": relative to the run, "name": name in the model registry}
      {"kind": "end",      "time": 1.7e9, "status": "FINISHED" | "FAILED" | "KILLED"}

Training depends on nothing but this file, so a tracking server that is slow, dead or back later costs no step and no
metric. Numbers that JSON lacks are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import resource
import sys
import time as clock
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

from unroll.errors import UserError
from unroll.files import readable_errors

STATUSES = ("FINISHED", "FAILED", "KILLED")


class Point(NamedTuple):
    """One value of one metric; `time` in unix seconds."""

    step: int
    time: float
    value: float


class Journal:
    """The journal of one run, open for writing by one process at a time.

    Opening cuts off a line that a killed process left half written. Of a metric, only steps later than those recorded
    are written: a resumed run replays identical values, and nothing appears twice.
    """

    def __init__(self, folder: Path, patience: float = 10.0) -> None:
        """Open or create `folder/journal.jsonl`; wait `patience` seconds for a process that still has it open.

        Raises:
            UserError: another process writes it, a line is damaged, or the folder cannot be written.
        """
        self.folder = folder
        self.path = folder / "journal.jsonl"
        self._last_step: dict[str, int] = {}
        self._last_value: dict[str, float | str] = {}
        self._known: dict[str, dict[str, Any]] = {"params": {}, "tag": {}}
        with readable_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        try:
            self._lock(patience)
            self._file.truncate(_complete_size(self.path))
            for line in read(folder):
                self._recall(line)
        except BaseException:
            self._file.close()
            raise

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters; nested mappings are allowed, values already recorded are not repeated."""
        self._write_new("params", values)

    def tag(self, values: Mapping[str, Any]) -> None:
        """Record tags. The first call of a run names it: recipe, task, suite, dataset, model, seed, commit, data."""
        self._write_new("tag", values)

    def metrics(self, step: int, values: Mapping[str, float], time: float | None = None) -> None:
        """Record numbers of one step (>= 0); `time` in unix seconds, now if not given.

        Raises:
            UserError: the disk is full or read-only.
        """
        last = self._last_step
        self._write_metrics(step, {key: value for key, value in values.items() if step > last.get(key, -1)}, time)

    def scores(self, values: Mapping[str, float]) -> None:
        """Record numbers about the whole run; one that was recorded before is written if it changed.

        They stand at step 0: MLflow then draws them as bars, the runs of a table side by side, and not as curves.
        """
        last = self._last_value
        self._write_metrics(0, {key: value for key, value in values.items() if last.get(key) != _number(value)}, None)

    def artifact(self, path: Path, to: str = "") -> None:
        """Name a file or folder to be kept with the run, under the folder `to` of the tracker."""
        self._write({"kind": "artifact", "path": os.path.relpath(path, self.folder), "to": to})

    def model(self, path: Path, name: str) -> None:
        """Name an exported model folder to be registered under `name`."""
        self._write({"kind": "model", "path": os.path.relpath(path, self.folder), "name": name})

    def end(self, status: str) -> None:
        """Say how the run ended. A journal without this last line belongs to a run that is going on, or was killed."""
        if status not in STATUSES:
            raise ValueError(f"status {status!r} (allowed: {', '.join(STATUSES)})")
        self._write({"kind": "end", "status": status})

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _lock(self, patience: float) -> None:
        # The kernel lets go of the lock when the process ends, however it ends.
        deadline = clock.monotonic() + patience
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if clock.monotonic() >= deadline:
                    raise UserError(f"{self.path}: another process is writing it; wait for it or end it") from None
                clock.sleep(0.05)

    def _recall(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "metrics":
            for key, value in line["values"].items():
                self._last_step[key] = max(line["step"], self._last_step.get(key, -1))
                self._last_value[key] = _number(value)
        elif line["kind"] in self._known:
            self._known[line["kind"]].update(line["values"])

    def _write_metrics(self, step: int, values: Mapping[str, float], time: float | None) -> None:
        if values:
            line = {"kind": "metrics", "time": time, "step": step, "values": {k: _number(v) for k, v in values.items()}}
            self._write(line)
            self._recall(line)

    def _write_new(self, kind: str, values: Mapping[str, Any]) -> None:
        plain = json.loads(json.dumps(_safe(values), default=str))
        known = self._known[kind]
        fresh = {key: value for key, value in plain.items() if key not in known or known[key] != value}
        if fresh:
            self._write({"kind": kind, "values": fresh})
            known.update(fresh)

    def _write(self, line: dict[str, Any]) -> None:
        if line.get("time") is None:
            line["time"] = round(clock.time(), 3)
        text = memoryview((_encode(line) + "\n").encode())
        try:
            while text:
                text = text[self._file.write(text) :]
        except OSError:
            with readable_errors(self.path):
                raise


_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def _number(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _safe(value: Any) -> Any:
    """A JSON value with its infinities and NaNs as strings."""
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return {str(key): _safe(entry) for key, entry in value.items()}
    return [_safe(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _complete_size(path: Path) -> int:
    """Bytes of a journal up to its last line end: all but a line torn by a kill."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def lines(folder: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Every complete line after byte `offset`, with the offset of the next one. Safe while the run is going on.

    Raises:
        UserError: a line is damaged.
    """
    path = folder / "journal.jsonl"
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            try:
                line = json.loads(raw)
                kind = line["kind"]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path}: damaged at byte {offset}: a JSON object with a kind was expected") from None
            if kind == "metrics":
                line["values"] = {key: float(value) for key, value in line["values"].items()}
            offset += len(raw)
            yield line, offset


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """Every line of the journal in `folder`, in the order written; metric values are floats."""
    return (line for line, _ in lines(folder))


def is_being_written(folder: Path) -> bool:
    """Whether a living process has the journal open for writing."""
    try:
        with (folder / "journal.jsonl").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def history(folder: Path, keys: Iterable[str] | None = None, limit: int | None = None) -> dict[str, list[Point]]:
    """The points of each metric (of `keys`, or all), in order; at most `limit` (>= 2) each, evenly spread, ends kept.

    With a limit, memory does not grow with the length of the run.
    """
    wanted = None if keys is None else set(keys)
    curves: dict[str, _Curve] = {}
    for line in read(folder):
        if line["kind"] != "metrics":
            continue
        for key, value in line["values"].items():
            if wanted is None or key in wanted:
                curves.setdefault(key, _Curve(limit)).add(Point(line["step"], line["time"], value))
    return {key: curve.result() for key, curve in curves.items()}


class _Curve:
    """Collects points; at twice the limit every other one is dropped, and from then on half as many are taken."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.stride = 1
        self.seen = 0
        self.points: list[Point] = []
        self.last: Point | None = None

    def add(self, point: Point) -> None:
        if self.seen % self.stride == 0:
            self.points.append(point)
        self.seen += 1
        self.last = point
        if self.limit is not None and len(self.points) >= 2 * self.limit:
            self.points = self.points[::2]
            self.stride *= 2

    def result(self) -> list[Point]:
        points = self.points if self.last is self.points[-1] or self.last is None else [*self.points, self.last]
        if self.limit is None or len(points) <= self.limit:
            return points
        gap = (len(points) - 1) / (self.limit - 1)
        return [points[round(number * gap)] for number in range(self.limit)]


def system_metrics() -> dict[str, float]:
    """Memory and processor use of this process, to be journalled: `system/rss_mb` (10^6 bytes) and
    `system/cpu_percent` (100 = one core busy) since the call before."""
    wall, busy = clock.perf_counter(), clock.process_time()
    since_wall, since_busy = _clocks
    _clocks[:] = [wall, busy]
    percent = 100 * (busy - since_busy) / max(wall - since_wall, 1e-9)
    return {"system/rss_mb": _resident_bytes() / 1e6, "system/cpu_percent": percent}


_clocks = [clock.perf_counter(), clock.process_time()]


@cache
def _process() -> Any:
    try:
        import psutil
    except ImportError:  # the plain trainer needs torch alone; see `_resident_bytes`
        return None
    return psutil.Process()


def _resident_bytes() -> int:
    if _process() is not None:
        return int(_process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as `a.b.c` -> text fit to be shown to others (see `public`)."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = public(value if isinstance(value, str) else json.dumps(value))
    return flat


_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_FOLDER = re.compile(r"(?<![\w:/.~-])(?:file:/{2})?~?/(?:[^\s'\",;/]+/)*(?=[^\s'\",;/])")


def without_passwords(text: str) -> str:
    """`text` without the user and password of the addresses in it."""
    return _LOGIN.sub("", text)


def public(text: str) -> str:
    """`text` without passwords, and without the folders of this machine: of a path only the file's name stays."""
    return _FOLDER.sub("", without_passwords(text))
