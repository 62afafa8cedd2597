"""Copies of a run's checkpoints in an object store (S3 or whatever fsspec reaches), for machines whose disks go with them.

    <copies>/<recipe>-<hash>/seed-<seed>/step-000000120/...     as in the run's folder, `checksums.json` last
                                         journal.jsonl, best/   as they were after that checkpoint

A thread beside the training sends each new checkpoint; the training never waits, and a store that is away is tried again.
A run that starts on a machine without its folder, or with an older one, takes the newest valid copy and goes on from it.
Credentials are those of the environment (`AWS_ACCESS_KEY_ID`, a role, ...), never of a file of this project.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unroll.errors import UserError
from unroll.files import new_folder
from unroll.journal import without_passwords
from unroll.training import checkpoint

POLL_SECONDS = 2.0
LAST_SECONDS = 120.0
KEEP = 2
STEP = re.compile(r"step-\d{9}")
CHECKPOINT = (*(f"{name}.safetensors" for name in checkpoint.TENSOR_FILES), "state.json", "checksums.json")
BESIDE = ("journal.jsonl", "mlflow_run.json", "sent.json", "best/weights.safetensors", "best/model.json")


@contextmanager
def kept(run: Path, url: str) -> Iterator[None]:
    """While inside, checkpoints of the run are copied to `url` (none if empty); before, the newest copy is fetched.

    Raises:
        UserError: an address that nothing here can open, or a store that does not answer at the start.
    """
    if not url:
        yield
        return
    copies = Copies(run, url)
    copies.fetch()
    over = threading.Event()
    thread = threading.Thread(target=copies.follow, args=(over,), name="unroll-copies", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LAST_SECONDS)


class Copies:
    """The copies of one run."""

    def __init__(self, run: Path, url: str) -> None:
        """Raises UserError for an address that cannot be opened."""
        import fsspec

        self.run, self.shown = run, without_passwords(url)
        try:
            self.store: Any
            self.store, base = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"copies: {self.shown}: {error}") from None
        self.base = f"{base.rstrip('/')}/{run.parent.name}/{run.name}"
        self.sent = ""
        self.complained = False

    # --- sending ----------------------------------------------------------------------------------------------------

    def follow(self, over: threading.Event) -> None:
        """Send new checkpoints until told that the run is over; then once more, or remove all if it is finished."""
        while not over.wait(POLL_SECONDS):
            self.try_to_send()
        if (self.run / "finished.json").exists():
            self.remove()
        else:
            self.try_to_send()

    def try_to_send(self) -> None:
        """Send the newest checkpoint; one line if that does not work, and another try later."""
        try:
            self.send()
        except Exception as error:  # noqa: BLE001 - each store has errors of its own; none of them may end a training
            if not self.complained:
                print(f"copies: {self.shown}: {_first_line(error)}; trying again", flush=True)
            self.complained = True
            return
        self.complained = False

    def send(self) -> None:
        """Copy the newest checkpoint, if it is not there, and what belongs to it; remove older copies."""
        folders = sorted(path for path in (self.run / "checkpoints").glob("step-*") if STEP.fullmatch(path.name))
        if not folders or folders[-1].name == self.sent:
            return
        newest = folders[-1]
        for folder in (newest.name, "best"):
            self.store.makedirs(f"{self.base}/{folder}", exist_ok=True)
        for name in BESIDE:
            if (self.run / name).is_file():
                self.store.put_file(str(self.run / name), f"{self.base}/{name}")
        for name in CHECKPOINT:  # the checksums are last: without them it is no checkpoint
            if not newest.exists():
                return  # a newer one has taken its place meanwhile
            self.store.put_file(str(newest / name), f"{self.base}/{newest.name}/{name}")
        self.sent = newest.name
        for old in self.steps()[:-KEEP]:
            self.store.rm(f"{self.base}/{old}", recursive=True)

    def remove(self) -> None:
        """A finished run needs no checkpoints."""
        try:
            if self.store.exists(self.base):
                self.store.rm(self.base, recursive=True)
        except Exception as error:  # noqa: BLE001 - what is left costs storage, nothing else
            print(f"copies: {self.shown}: not removed: {_first_line(error)}", flush=True)

    def steps(self) -> list[str]:
        """Names of the complete copies, the newest last."""
        self.store.invalidate_cache()
        if not self.store.exists(self.base):
            return []
        names = sorted(path.rstrip("/").rpartition("/")[2] for path in self.store.ls(self.base, detail=False))
        return [name for name in names
                if STEP.fullmatch(name) and self.store.exists(f"{self.base}/{name}/checksums.json")]  # fmt: skip

    # --- fetching ---------------------------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Bring the newest valid copy into the run's folder, unless that is as far.

        Raises:
            UserError: the store does not answer.
        """
        here = sorted(path.name for path in (self.run / "checkpoints").glob("step-*") if STEP.fullmatch(path.name))
        if (self.run / "finished.json").exists():
            return
        try:
            for name in reversed(self.steps()):
                if here and name <= here[-1]:
                    return
                if self._fetch_checkpoint(name):
                    self._fetch_beside()
                    print(f"copies: {name} taken from {self.shown}", flush=True)
                    return
        except Exception as error:  # each store has errors of its own
            raise UserError(f"copies: {self.shown}: {_first_line(error)}") from error

    def _fetch_checkpoint(self, name: str) -> bool:
        """Whether the copy was whole; only then it is put in its place."""
        final = self.run / "checkpoints" / name
        arriving = self.run / "arriving"
        shutil.rmtree(arriving, ignore_errors=True)
        arriving.mkdir(parents=True)
        for file in CHECKPOINT:
            self.store.get_file(f"{self.base}/{name}/{file}", str(arriving / file))
        try:
            checkpoint.read(arriving)
        except UserError as error:
            print(f"passed over: a copy of {name}: {error}", flush=True)
            shutil.rmtree(arriving)
            return False
        with new_folder(final) as partial:
            for file in CHECKPOINT:
                shutil.move(arriving / file, partial / file)
        arriving.rmdir()
        return True

    def _fetch_beside(self) -> None:
        for name in BESIDE:
            if self.store.exists(f"{self.base}/{name}"):
                (self.run / name).parent.mkdir(parents=True, exist_ok=True)
                self.store.get_file(f"{self.base}/{name}", str(self.run / name))


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
