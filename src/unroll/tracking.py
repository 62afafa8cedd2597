"""Has journals sent to MLflow: starts the process that does it (`unroll.sender`), and says what it could not send.

Training writes its journal and never waits for a tracker. One sender follows each run, or all runs of one `unroll repro`,
whose stages then start none: each would take three processor seconds to load MLflow.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unroll.errors import UserError
from unroll.journal import lines

LATER = "nothing is lost: `unroll track` sends the rest"
SHARED = "UNROLL_SENDER"
"""Environment variable of the stages of `unroll repro`: the project whose runs a sender follows already."""


@dataclass
class Handle:
    """A running sender of one run, or of all that change under `root`; closing its standard input asks it to send the
    rest and end."""

    folder: Path | None
    root: Path
    process: subprocess.Popen[bytes]
    log: Path
    began: float

    def folders(self) -> list[Path]:
        return [self.folder] if self.folder else changed_runs(self.root, self.began)


@contextmanager
def sent_to_tracker(run: Path, root: Path, enabled: bool) -> Iterator[None]:
    """The tracker's sender works beside as a process of its own; what it cannot send in time is left for later."""
    if not enabled or os.environ.get(SHARED) == str(root.absolute()):
        yield
        return
    with _followed(start_sender(run, root)):
        yield


@contextmanager
def all_sent_to_tracker(root: Path, enabled: bool) -> Iterator[dict[str, str]]:
    """One sender for all runs that change under `root` meanwhile; yields what is to be in the environment of those who
    train and score there."""
    if not enabled:
        yield {}
        return
    with _followed(start_sender(None, root)):
        yield {SHARED: str(root.absolute())}


@contextmanager
def _followed(sender: Handle) -> Iterator[None]:
    try:
        yield
    finally:
        left = finish(sender)
        if left:
            print(left, flush=True)


def start_sender(folder: Path | None, root: Path | None = None) -> Handle:
    """Follow the journal of a run (None: of every run of `root`) from another process; its messages go to
    `tracking.log` in the run's folder (or in `runs`)."""
    root, began = root_of(folder, root), time.time()
    place = folder or root / "runs"
    place.mkdir(parents=True, exist_ok=True)
    which = [str(folder.absolute())] if folder else ["--since", str(began)]
    command = [sys.executable, "-m", "unroll.sender", *which, "--root", str(root)]
    path = place / "tracking.log"
    with path.open("ab") as log:
        # A session of its own: Ctrl-C ends the training; the sender then sees its input close and sends the rest.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
    return Handle(folder, root, process, path, began)


def finish(handle: Handle, timeout: float = 20.0) -> str | None:
    """Let the sender send the rest, for at most `timeout` seconds. One line for the user if something is left."""
    assert handle.process.stdin is not None
    handle.process.stdin.close()
    try:
        handle.process.wait(timeout)
    except subprocess.TimeoutExpired:
        handle.process.kill()
        handle.process.wait()
    left = {folder: count for folder in handle.folders() if (count := unsent(folder, handle.root))}
    if not left:
        return None
    said = handle.log.read_text(errors="replace").splitlines() if handle.log.exists() else []
    reason = said[-1] if said else f"not done in {timeout:.0f} s"
    where = " ".join(str(folder / "journal.jsonl") for folder in left)
    return f"MLflow: {sum(left.values())} lines of {where} are not sent ({reason}); {LATER}"


def unsent(folder: Path, root: Path | None = None) -> int:
    """Number of journal lines that the store does not have yet."""
    offset = sent_of(folder, root_of(folder, root)).get("offset", 0)
    return sum(1 for _ in lines(folder, offset))


def changed_runs(root: Path, since: float) -> list[Path]:
    """Folders of the runs whose journal was written after `since` (unix time)."""
    written = {path.parent: path.stat().st_mtime for path in sorted((root / "runs").glob("*/*/journal.jsonl"))}
    return [folder for folder, last in written.items() if last >= since]


def tracking_uri(root: Path) -> str:
    """Where runs are sent: `MLFLOW_TRACKING_URI`, or an SQLite file in `root`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.absolute() / 'mlflow.db'}"


def store_name() -> str:
    """A name for the store, to be kept in a run's folder: no password, no path."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return hashlib.sha256(uri.encode()).hexdigest()[:16] if uri else "default"


def sent_of(folder: Path, root: Path) -> dict[str, Any]:
    """What the store has of a journal: `run_id`, `offset` in bytes, `status`; empty if it has nothing."""
    sent = read_json(folder / "sent.json")
    gone = store_name() == "default" and not (root / "mlflow.db").exists()
    return {} if gone or sent.get("store") != store_name() else sent


def root_of(folder: Path | None, root: Path | None) -> Path:
    """The repository a run lies in: <root>/runs/<recipe>-<hash>/seed-<seed>."""
    if root is not None:
        return root.absolute()
    return folder.absolute().parents[2] if folder is not None else Path().absolute()


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path}: not valid JSON; remove it, and the run is sent again from its beginning") from None
    return dict(content)
