"""Sends journals to MLflow, from a process of its own. The only file that imports mlflow.

    python -m unroll.sender [runs/<recipe>-<hash>/seed-<seed>] [--root FOLDER]      until standard input closes

The sender reads the journal behind the training at the lowest priority, and whatever the server does (absent, slow,
killed, back later) it tries again until the driver lets go. Without a folder it follows every run of the root whose
journal changes. Every metric arrives exactly once, because sending twice does no harm:

- MLflow's SQL stores keep one row for each (run, key, timestamp, step, value), and time stamps come from the journal;
- the run carries a tag made up before the run was created, so a run whose number was lost is found again.

Beside the journal lie `mlflow_run.json` (which run, in which store) and `sent.json` (how many bytes of the journal the
store has). The store is `MLFLOW_TRACKING_URI`, or `<root>/mlflow.db` with files in `<root>/mlartifacts`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import posixpath
import re
import select
import socket
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from unroll.errors import UserError
from unroll.journal import flatten, is_being_written, lines, without_passwords
from unroll.tracking import LATER, changed_runs, read_json, root_of, sent_of, store_name, tracking_uri, unsent

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

POLL_SECONDS = 2.0
LONGEST_PAUSE = 30.0
PATIENCE_AFTER_DRIVER = 60.0
METRICS_PER_CALL, TEXTS_PER_CALL = 1000, 20  # limits of MLflow's REST API, on numbers and on bytes
LONGEST_KEY, LONGEST_TEXT = 250, 6000
RUN_TAG = "unroll.run"
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the sender has its own pauses
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # a server that takes 30 s to answer is slow, not dead
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
}


@dataclass
class Sent:
    """What `send_pending` did: runs that are complete in the store now, and one line for each that is not."""

    runs: int
    problems: list[str]


def send_pending(root: Path) -> Sent:
    """Send what is left in every `runs/*/*/journal.jsonl`; a UserError says that the store cannot be reached."""
    sent = Sent(0, [])
    client: MlflowClient | None = None
    for path in sorted((root / "runs").glob("*/*/journal.jsonl")):
        folder = path.parent
        try:
            if _is_complete(folder, root):
                continue
            with _alone(folder):
                client = client or connect(root)
                sender = Sender(folder, root, client)
                sender.send()
                sender.settle()
            sent.runs += 1
        except UserError as error:
            sent.problems.append(str(error))
        except _outages() as error:
            raise UserError(f"{folder}: not sent: {_reason(error, root)}; {LATER}") from None
    return sent


def _is_complete(folder: Path, root: Path) -> bool:
    """Whether there is nothing to send or to say about the run."""
    return not unsent(folder, root) and (bool(sent_of(folder, root).get("status")) or is_being_written(folder))


def connect(root: Path) -> MlflowClient:
    """A client of the store of `root`; see `_outages` for what it can fail with."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    uri = tracking_uri(root)
    if uri.startswith("http"):
        _knock(uri)
    from mlflow import MlflowClient

    if not uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    # MLflow creates its tables in steps: two processes that do so at once fail, and a kill leaves a file of no use.
    file = Path(uri.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            partial = file.with_name(f"{file.name}.partial")
            for old in file.parent.glob(f"{partial.name}*"):  # and the rollback journal of a killed process
                old.unlink()
            MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
            os.replace(partial, file)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _knock(uri: str) -> None:
    """Raise an OSError if nobody is there: to learn it from mlflow costs the training two seconds of a core."""
    address = f"{without_passwords(uri).rstrip('/')}/health"
    try:
        with suppress(HTTPException):
            urllib.request.urlopen(address, timeout=float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])).close()
    except urllib.error.URLError as error:  # of other errors (status, certificate) mlflow knows more
        if isinstance(error.reason, ConnectionError | socket.gaierror | TimeoutError):
            raise


def _outages() -> tuple[type[Exception], ...]:
    """What a store can fail with; none of it may end a sender that still has time."""
    if "mlflow" not in sys.modules:
        return (OSError,)
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, CommandError, OSError


def _reason(error: BaseException, root: Path) -> str:
    """What went wrong with the store, as one short line without passwords."""
    while error.__context__ is not None:  # "connection refused" lies under layers of HTTP libraries
        error = error.__context__
    text = " ".join(str(error).split()) or type(error).__name__
    return without_passwords(f"{tracking_uri(root)}: {text}")[:300]


class Sender:
    """Sends the journal of one run. State between calls is on disk; a killed sender is replaced by a new one."""

    def __init__(self, folder: Path, root: Path, client: MlflowClient | None = None) -> None:
        self.folder = folder
        self.root = root
        self.client: Any = client
        self.run: Run | None = None
        self.offset = 0
        self.status = ""
        self.journal = 0

    def send(self) -> None:
        """Send every complete line that the store does not have.

        Raises:
            UserError: the journal is damaged, or the run was deleted from the store.
        """
        path = self.folder / "journal.jsonl"
        if next(lines(self.folder), None) is None:
            return
        if path.stat().st_ino != self.journal:  # the first look, or the folder was removed and the run begun anew
            self.run, self.offset, self.status, self.journal = None, 0, "", path.stat().st_ino
        if self.client is None:
            self.client = connect(self.root)
        self.run = self.run or self._find_run()
        waiting: list[Metric] = []
        end = self.offset
        for line, after in lines(self.folder, self.offset):
            found = _metrics(line)
            if waiting and (not found or len(waiting) + len(found) > METRICS_PER_CALL):
                self._send_metrics(waiting, end)
                waiting = []
            if found:
                waiting += found
            else:
                self._send_other(line)
                self._remember(after)
            end = after
        self._send_metrics(waiting, end)

    def settle(self) -> None:
        """When all is sent: a run that no process writes and that has no end was killed."""
        if self.run is None:
            return
        if not self.status and not is_being_written(self.folder):
            self._terminate("KILLED", time.time())
            self._remember(self.offset)
        identity = read_json(self.folder / "mlflow_run.json")["uuid"]
        for run in self._runs_tagged(self.run.info.experiment_id, identity):
            if run.info.run_id != self._run_id:  # a request that timed out here was carried out there after all
                self.client.delete_run(run.info.run_id)

    def _find_run(self) -> Run:
        """The run of this journal in the store, created if there is none."""
        path = self.folder / "mlflow_run.json"
        known = {"uuid": uuid.uuid4().hex, **read_json(path)}
        _write_json(path, known)  # before a run carries it
        run = self._known_run(known.get(store_name())) or self._tagged_run(known["uuid"])
        run_id = run.info.run_id
        if run.info.lifecycle_stage == "deleted":
            raise UserError(f"{self.folder}: its MLflow run {run_id} was deleted; restore it, or remove {path.name}")
        _write_json(path, {**known, store_name(): run_id})
        sent = sent_of(self.folder, self.root)
        if sent.get("run_id") == run_id:
            self.offset, self.status = sent["offset"], sent["status"]
        return run

    def _known_run(self, run_id: str | None) -> Run | None:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id) if run_id else None
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # another database under the old name
                return None
            raise

    def _tagged_run(self, identity: str) -> Run:
        first = next(lines(self.folder), ({}, 0))[0]
        tags = _tags(first["values"]) if first["kind"] == "tag" else {}
        experiment = self._experiment(tags.get("task", "unroll"))
        name = f"{tags.get('recipe', self.folder.parent.name)} seed {tags.get('seed', '1')}"
        if not self._runs_tagged(experiment, identity):
            start = round(first["time"] * 1000)
            self.client.create_run(experiment, start_time=start, tags={RUN_TAG: identity, **tags}, run_name=name)
        return self._runs_tagged(experiment, identity)[0]

    def _runs_tagged(self, experiment: str, identity: str) -> list[Run]:
        found = self.client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{identity}'")
        return sorted(found, key=lambda run: run.info.run_id)

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        local = tracking_uri(self.root).startswith("sqlite:")
        place = (self.root.absolute() / "mlartifacts").as_uri() if local else None
        try:
            return self.client.create_experiment(name, artifact_location=place)
        except _outages():
            found = self.client.get_experiment_by_name(name)  # another sender was first
            if found is None:
                raise
            return found.experiment_id

    def _send_metrics(self, metrics: list[Metric], end: int) -> None:
        if metrics:
            self._reopen()
            self._log("metrics", metrics)
            self._remember(end)

    def _send_other(self, line: Mapping[str, Any]) -> None:
        kind = line["kind"]
        if kind == "end":
            self._terminate(line["status"], line["time"])
        else:
            self._reopen()
        if kind == "params":
            self._send_params(_texts(line["values"]))
        elif kind == "tag":
            self._send_tags(_tags(line["values"]))
            self._send_dataset(line["values"])
        elif kind in ("artifact", "model"):
            path = Path(os.path.normpath(self.folder.absolute() / line["path"]))
            if not path.exists():
                print(f"{path}: named in the journal, but no longer there; not sent", flush=True)
            elif kind == "artifact":
                self._keep(path, line["to"])
            else:
                self._register(path, line["name"])

    def _send_params(self, values: dict[str, str]) -> None:
        """MLflow never changes a parameter: a value that differs after a resume becomes a tag beside it."""
        from mlflow.entities import Param

        known = self.client.get_run(self._run_id).data.params
        self._log("params", [Param(key, value) for key, value in values.items() if key not in known])
        self._send_tags({_key(f"changed.{key}"): new for key, new in values.items() if known.get(key, new) != new})

    def _send_tags(self, values: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self._log("tags", [RunTag(key, value) for key, value in values.items()])

    def _send_dataset(self, tags: Mapping[str, Any]) -> None:
        """Name the data set as an input of the run; MLflow keeps it once however often it is sent."""
        if not {"dataset", "data_hash"} <= tags.keys():
            return
        from mlflow.entities import Dataset, DatasetInput

        name, digest = str(tags["dataset"]), str(tags["data_hash"])[:12]
        source = json.dumps({"uri": f"data/prepared/{name}"})
        self.client.log_inputs(self._run_id, datasets=[DatasetInput(Dataset(name, digest, "local", source))])

    def _log(self, kind: str, entries: list[Any]) -> None:
        size = METRICS_PER_CALL if kind == "metrics" else TEXTS_PER_CALL
        for start in range(0, len(entries), size):
            self.client.log_batch(self._run_id, **{kind: entries[start : start + size]})

    def _keep(self, path: Path, to: str) -> None:
        """Send a file or the files of a folder."""
        assert self.run is not None
        place = urlsplit(self.run.info.artifact_uri)
        remote = tracking_uri(self.root).startswith("http") and place.scheme in ("", "file")
        if remote and not Path(unquote(place.path)).parents[1].exists():  # a folder of the server's machine
            print(f"{path}: not sent: this server takes no files (start it with --serve-artifacts)", flush=True)
        elif path.is_dir():
            self.client.log_artifacts(self._run_id, str(path), to or None)
        else:
            self.client.log_artifact(self._run_id, str(path), to or None)

    def _register(self, folder: Path, name: str) -> None:
        """Keep an exported model (safetensors and JSON, never a pickle) with its run and make it a version of `name`.

        A run makes one version; MLflow itself calls the newest `models:/<name>@latest`.
        """
        self._keep(folder, "model")
        if not self.client.search_registered_models(f"name = '{name}'"):
            self.client.create_registered_model(name)
        if not self.client.search_model_versions(f"name = '{name}' and run_id = '{self._run_id}'"):
            self.client.create_model_version(name, source=f"runs:/{self._run_id}/model", run_id=self._run_id)

    @property
    def _run_id(self) -> str:
        assert self.run is not None
        return str(self.run.info.run_id)

    def _reopen(self) -> None:
        """A run that failed or was killed goes on: say so. One that finished stays so; scores are added to it."""
        if self.status and self.status != "FINISHED":
            self.client.update_run(self._run_id, status="RUNNING")
            self.status = ""

    def _terminate(self, status: str, at: float) -> None:
        self.client.set_terminated(self._run_id, status, round(at * 1000))
        self.status = status

    def _remember(self, offset: int) -> None:
        self.offset = offset
        state = {"store": store_name(), "run_id": self._run_id, "offset": offset, "status": self.status}
        _write_json(self.folder / "sent.json", state)


class Senders:
    """One for each run of `root` whose journal has changed since `since` (unix time)."""

    def __init__(self, root: Path, since: float) -> None:
        self.root, self.since = root, since
        self.client: MlflowClient | None = None
        self.senders: dict[Path, Sender] = {}
        self.said: set[str] = set()

    def send(self) -> None:
        """Every run has its turn, also after one that the store does not take."""
        failed: Exception | None = None
        for folder in changed_runs(self.root, self.since):
            try:
                self._act(folder, Sender.send)
            except _outages() as error:
                failed = error
        if failed is not None:
            raise failed

    def settle(self) -> None:
        for folder in self.senders:
            self._act(folder, Sender.settle)

    def _act(self, folder: Path, action: Callable[[Sender], None]) -> None:
        """What is wrong with one run is said once, and does not hold up the others."""
        try:
            with _alone(folder):
                self.client = self.client or connect(self.root)
                action(self.senders.setdefault(folder, Sender(folder, self.root, self.client)))
        except UserError as error:
            if str(error) not in self.said:
                print(error, flush=True)
            self.said.add(str(error))


def follow(sender: Sender | Senders, driver: int) -> None:
    """Send what grows until the driver closes the other end of the descriptor `driver`, then the rest."""
    pause, said = POLL_SECONDS, ""
    released: float | None = None
    while True:
        try:
            sender.send()
            if released is not None:
                return sender.settle()
            pause = POLL_SECONDS
        except _outages() as error:
            if (reason := _reason(error, sender.root)) != said:
                print(reason, flush=True)
            said, pause = reason, min(2 * pause, LONGEST_PAUSE)
            if released is not None and time.monotonic() > released + PATIENCE_AFTER_DRIVER:
                return None
        if released is not None:
            time.sleep(1.0)
        elif select.select([driver], [], [], pause)[0]:
            released = time.monotonic()


def _metrics(line: Mapping[str, Any]) -> list[Metric]:
    from mlflow.entities import Metric

    if line["kind"] != "metrics":
        return []
    stamp = round(line["time"] * 1000)
    return [Metric(_key(key), value, stamp, line["step"]) for key, value in line["values"].items()]


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Parameters or tags as MLflow takes them: flat, public, and no longer than it allows."""
    return {_key(key): text[:LONGEST_TEXT] for key, text in flatten(values).items()}


def _tags(values: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a run, and those that MLflow shows in columns of its own under its names for them too."""
    shown = {}
    if "recipe" in values:
        shown = {"mlflow.source.name": f"unroll train {values['recipe']}", "mlflow.source.type": "LOCAL"}
    if "commit" in values:
        shown["mlflow.source.git.commit"] = values["commit"]
    return _texts({**values, **shown})


def _key(name: str) -> str:
    """A name that MLflow accepts."""
    return posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)).strip("/.")[:LONGEST_KEY] or "_"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value))
    os.replace(partial, path)


@contextmanager
def _alone(folder: Path, wait: bool = False) -> Iterator[None]:
    """While inside, no other process sends this journal; a UserError (or a wait) if one does already."""
    with (folder / ".sending").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{folder}: another process is sending it") from None
        yield


def main(arguments: list[str] | None = None) -> int:
    """The sender's process."""
    parser = argparse.ArgumentParser("python -m unroll.sender", description="Send journals of runs to MLflow.")
    parser.add_argument("folder", type=Path, nargs="?", help="one run; otherwise all of --root that change")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--since", type=float, default=time.time(), help="unix time from which on a change counts")
    options = parser.parse_args(arguments)
    root = root_of(options.folder, options.root)
    os.nice(19)
    try:
        if options.folder is None:
            follow(Senders(root, options.since), sys.stdin.fileno())
            return 0
        with _alone(options.folder, wait=True):
            follow(Sender(options.folder, root), sys.stdin.fileno())
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
