"""A tracker may be absent, slow, wrong or killed: training goes on, and every metric arrives exactly once.

The slow tests use a real MLflow server behind a door of our own, which can be closed, slow, failing, or lose answers.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from project import project

import unroll.sender
from unroll import tracking
from unroll.journal import Journal, history, read
from unroll.sender import RUN_TAG, Sender, Sent, connect, send_pending
from unroll.stages import train as stage
from unroll.training.context import WorkerContext
from unroll.training.runs import train_one

pytestmark = pytest.mark.fault

KEYS = ["train/loss", "train/gradient_norm", "learning_rate", "system/rss_mb", "system/cpu_percent"]
STEPS = 300  # 1,500 numbers: more than one request holds
MANY_STEPS = 2000
PATIENCE = 180.0
DRIVER = """
import sys, time
from pathlib import Path
from unroll import tracking
from unroll.journal import Journal
folder = Path(sys.argv[1])
tracking.start_sender(folder, folder.parents[2])
with Journal(folder) as journal:
    journal.tag({"recipe": "lstm", "task": "language_modeling"})
    journal.metrics(1, {"loss": 1.0})
    print("ready", flush=True)
    time.sleep(600)
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


class Server:
    """A real `mlflow server` on 127.0.0.1 over an SQLite file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        store += ["--artifacts-destination", str(self.folder / "files")]
        command = [sys.executable, "-m", "mlflow", "server", *store, "--workers", "1"]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(self.answers, "the MLflow server does not start")

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Door:
    """Stands before the server. `delay` seconds before an answer; `failing`: 500; `losing`: done, but not answered."""

    def __init__(self, server: Server) -> None:
        self.delay = 0.0
        self.failing = self.losing = False
        self.requests = 0
        self.port = free_port()
        self.server = server
        self.listener: ThreadingHTTPServer | None = None

    def open(self) -> None:
        door = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                door.pass_on(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

            def log_message(self, *arguments: object) -> None:
                return

        self.listener = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.listener.daemon_threads = True
        threading.Thread(target=self.listener.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        if self.listener is not None:
            self.listener.shutdown()
            self.listener.server_close()
            self.listener = None

    def pass_on(self, request: BaseHTTPRequestHandler) -> None:
        self.requests += 1
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        time.sleep(self.delay)
        if self.failing:
            return request.send_error(500)
        kept = {name: value for name, value in request.headers.items() if name.lower() not in ("host", "connection")}
        address = self.server.uri + request.path
        forwarded = urllib.request.Request(address, data=body or None, headers=kept, method=request.command)
        try:
            with urllib.request.urlopen(forwarded, timeout=60) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        if self.losing:
            return request.connection.close()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)
        return None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def door(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    door = Door(server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{door.port}")
    yield door
    door.close()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def a_run(root: Path, name: str = "lstm-0123") -> Path:
    return root / "runs" / name / "seed-1"


def train(folder: Path, start: int, end: int, seconds: float = 0.0, last: int = STEPS) -> None:
    """Journal some steps, as a training would; a run's first and last lines with its first and last steps."""
    with Journal(folder) as journal:
        if start == 0:
            journal.tag({"recipe": folder.parent.name, "task": "language_modeling", "seed": 1})
            journal.params({"model": {"width": 64}})
        for step in range(start, end):
            journal.metrics(step, {key: random.random() for key in KEYS})
            time.sleep(seconds / (end - start))
        if end == last:
            journal.end("FINISHED")


def assert_arrived_once(folder: Path, uri: str, steps: int = STEPS) -> None:
    """The store holds one run for the folder, with exactly what the journal says."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("language_modeling").experiment_id
    identity = json.loads((folder / "mlflow_run.json").read_text())["uuid"]
    runs = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{identity}'")
    assert len(runs) == 1
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.params == {"model.width": "64"}
    written = history(folder)
    assert sum(map(len, written.values())) == steps * len(KEYS)
    for key in KEYS:
        found = [(p.step, p.timestamp, p.value) for p in client.get_metric_history(runs[0].info.run_id, key)]
        assert sorted(found) == [(point.step, round(point.time * 1000), point.value) for point in written[key]]


def test_fresh_stores_are_created_once_by_senders_that_start_together(root: Path) -> None:
    folders = [a_run(root, f"lstm-{number}") for number in range(3)]
    senders = [tracking.start_sender(folder) for folder in folders]
    for folder in folders:
        train(folder, 0, STEPS)
    assert [tracking.finish(sender, PATIENCE) for sender in senders] == [None] * 3
    for folder in folders:
        assert_arrived_once(folder, tracking.tracking_uri(root))
        assert (folder / "tracking.log").read_text() == ""
    assert sorted(path.name for path in root.iterdir()) == ["mlflow.db", "mlflow.db.lock", "runs"]


def test_one_sender_follows_all_runs_that_change(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of `unroll repro`. Runs of before are left alone, and what is wrong with one does not hold up the others."""
    old = a_run(root, "old")
    train(old, 0, STEPS, 0.1)
    os.utime(old / "journal.jsonl", (1e9, 1e9))
    with tracking.all_sent_to_tracker(root, enabled=True) as variables:
        monkeypatch.setattr(tracking, "start_sender", None)  # stages start none of their own
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        folders = [a_run(root, f"lstm-{number}") for number in range(2)]
        with tracking.sent_to_tracker(folders[0], root, enabled=True):
            train(folders[0], 0, STEPS)
        damaged = a_run(root, "damaged")
        damaged.mkdir(parents=True)
        (damaged / "mlflow_run.json").write_text("{")
        train(damaged, 0, STEPS, 0.1)
        train(folders[1], 0, STEPS)
    for folder in folders:
        assert_arrived_once(folder, tracking.tracking_uri(root))
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"MLflow: {STEPS + 3} lines of {damaged}" in said
    assert "not valid JSON" in said
    assert tracking.sent_of(old, root) == {}


def test_the_sender_of_a_rerun_finds_a_clean_folder_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender that starts in the folder of the finished run would send that one's journal, and lose its own notes."""
    project(tmp_path, train={"steps": 3})
    seen: list[tuple[Path, list[str]]] = []

    def start_sender(folder: Path, root: Path) -> None:
        seen.append((folder, [line["kind"] for line in read(folder)]))
        assert not (folder / "finished.json").exists()
        (folder / "sent.json").write_text("notes of the sender")

    monkeypatch.setattr(tracking, "start_sender", start_sender)
    monkeypatch.setattr(tracking, "finish", lambda handle: None)
    monkeypatch.setattr(
        stage, "launch", lambda recipe, seed, place, *_: train_one(recipe, seed, place, WorkerContext())
    )
    for _ in range(2):
        stage.train(tmp_path, "small")
        folder, kinds = seen[-1]
        assert kinds == ["tag", "params", "tag"]  # what the finished run had measured is gone
        assert (folder / "sent.json").exists()
    assert len(seen) == 2


def test_a_dead_server_costs_no_time_and_leaves_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret@127.0.0.1:{free_port()}")
    folder = a_run(root)
    sender = tracking.start_sender(folder)
    train(folder, 0, STEPS)
    wait_for((folder / "tracking.log").read_text, "the sender does not say what is wrong")
    left = tracking.finish(sender, timeout=1.0)
    assert left is not None
    assert f"{STEPS + 3} lines of {folder / 'journal.jsonl'} are not sent (http://127.0.0.1:" in left
    assert "refused" in left
    assert "unroll track" in left
    assert "secret" not in left
    assert "\n" not in left
    assert sender.process.returncode is not None


def test_a_sender_outlives_a_killed_driver_to_say_so(root: Path) -> None:
    folder = a_run(root)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)], stdout=subprocess.PIPE)
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"ready\n"
    driver.kill()
    driver.wait()
    wait_for(lambda: tracking.sent_of(folder, root).get("status") == "KILLED", "the run is not marked as killed")
    assert tracking.unsent(folder) == 0


@pytest.mark.slow
def test_a_sender_killed_at_any_moment_sends_everything_once(root: Path) -> None:
    folder = a_run(root)
    for number in range(10):
        sender = tracking.start_sender(folder)
        start, end = MANY_STEPS * number // 10, MANY_STEPS * (number + 1) // 10
        train(folder, start, end, random.uniform(0.5, 5.0), MANY_STEPS)
        sender.process.kill()
        sender.process.wait()
    assert tracking.finish(tracking.start_sender(folder), PATIENCE) is None
    assert_arrived_once(folder, tracking.tracking_uri(root), MANY_STEPS)


def test_a_sender_killed_before_any_of_its_notes_sends_everything_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was told to the store and not yet noted in the run's folder, at every such place."""

    class Killed(BaseException):
        pass

    real = unroll.sender._write_json
    left = -1

    def write(path: Path, value: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        real(path, value)

    monkeypatch.setattr(unroll.sender, "_write_json", write)
    folder = a_run(root)
    train(folder, 0, STEPS)
    client = connect(root)
    places = 0
    while left <= 0:
        places += 1
        left = places
        (folder / "sent.json").unlink(missing_ok=True)
        sender = Sender(folder, root, client)
        with contextlib.suppress(Killed):
            sender.send()
            sender.settle()
    assert places > 6
    assert_arrived_once(folder, tracking.tracking_uri(root))


@pytest.mark.slow
def test_absent_at_the_start_then_there(root: Path, door: Door, server: Server) -> None:
    folder = a_run(root)
    sender = tracking.start_sender(folder)
    train(folder, 0, STEPS // 2)
    wait_for((folder / "tracking.log").read_text, "the sender does not notice that nobody is there")
    door.open()
    wait_for(lambda: tracking.unsent(folder) == 0, "nothing arrives although the server is there")
    train(folder, STEPS // 2, STEPS)
    assert tracking.finish(sender, PATIENCE) is None
    assert_arrived_once(folder, server.uri)


@pytest.mark.slow
def test_killed_in_mid_run_and_back_later(root: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    folder = a_run(root)
    sender = tracking.start_sender(folder)
    train(folder, 0, 50)
    wait_for(lambda: tracking.unsent(folder) == 0, "nothing arrives")
    sending = threading.Thread(target=train, args=(folder, 50, 200, 8.0))
    sending.start()
    time.sleep(4.0)
    server.kill()
    sending.join()
    assert tracking.unsent(folder) > 0
    server.start()
    train(folder, 200, STEPS)
    assert tracking.finish(sender, PATIENCE) is None
    assert_arrived_once(folder, server.uri)


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [1, 60])
def test_answers_that_take_long(
    root: Path, door: Door, server: Server, monkeypatch: pytest.MonkeyPatch, timeout: int
) -> None:
    """With the short timeout each request is carried out by the server long after the sender has given it up."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(timeout))
    door.delay = 3.0
    door.open()
    folder = a_run(root)
    sender = tracking.start_sender(folder)
    train(folder, 0, STEPS)
    if timeout < door.delay:
        wait_for(lambda: door.requests >= 4, "the sender does not try again")
        assert tracking.unsent(folder) > 0
        door.delay = 0.0
    assert tracking.finish(sender, PATIENCE) is None
    assert_arrived_once(folder, server.uri)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["failing", "losing"])
def test_errors_and_lost_answers(root: Path, door: Door, server: Server, fault: str) -> None:
    door.open()
    folder = a_run(root)
    sender = tracking.start_sender(folder)
    train(folder, 0, 50)
    for number in range(1, 4):
        setattr(door, fault, True)
        before = door.requests
        train(folder, 50 * number, 50 * number + 50)
        wait_for(lambda before=before: door.requests > before, "the sender does not try")
        setattr(door, fault, False)
        wait_for(lambda: tracking.unsent(folder) == 0, "nothing arrives")
    train(folder, 200, STEPS)
    assert tracking.finish(sender, PATIENCE) is None
    assert_arrived_once(folder, server.uri)


@pytest.mark.slow
def test_a_server_that_comes_back_after_the_end_gets_the_rest(root: Path, door: Door, server: Server) -> None:
    folders = [a_run(root, f"gru-{number}") for number in range(2)]
    for folder in folders:
        sender = tracking.start_sender(folder)
        train(folder, 0, STEPS)
        assert tracking.finish(sender, timeout=0.5) is not None
    door.open()
    assert send_pending(root) == Sent(2, [])
    for folder in folders:
        assert_arrived_once(folder, server.uri)
    assert send_pending(root) == Sent(0, [])
