"""What a user sees in MLflow must be what the journal says: whole, once, and without secrets of the machine."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unroll import tracking
from unroll.errors import UserError
from unroll.journal import Journal
from unroll.sender import RUN_TAG, Sender, Sent, connect, send_pending

IDENTITY = {
    "recipe": "lstm", "task": "language_modeling", "suite": "demo", "seed": 3, "commit": "0123abc", "dataset": "wikitext-2",
    "data_hash": "89ab" * 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """A root with an empty store, and a client of it: importing mlflow and creating the tables takes seconds."""
    before = os.environ.pop("MLFLOW_TRACKING_URI", None)
    root = tmp_path_factory.mktemp("root")
    yield root, connect(root)
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture
def root(store: tuple[Path, Any]) -> Iterator[Path]:
    yield store[0]
    shutil.rmtree(store[0] / "runs", ignore_errors=True)


@pytest.fixture
def client(store: tuple[Path, Any]) -> Any:
    return store[1]


@pytest.fixture
def folder(root: Path) -> Path:
    folder = root / "runs" / "lstm-0123" / "seed-3"
    with Journal(folder) as journal:
        journal.tag(IDENTITY)
    return folder


def send(folder: Path, root: Path, client: Any) -> Any:
    """Everything in the journal, by a sender of its own. Returns the run as the store has it."""
    sender = Sender(folder, root, client)
    sender.send()
    sender.settle()
    return client.get_run(json.loads((folder / "mlflow_run.json").read_text())["default"])


def points(client: Any, run: Any, key: str) -> list[tuple[int, int, float]]:
    return [(point.step, point.timestamp, point.value) for point in client.get_metric_history(run.info.run_id, key)]


def active_runs(client: Any) -> list[str]:
    experiment = client.get_experiment_by_name("language_modeling")
    return [run.info.run_id for run in client.search_runs([experiment.experiment_id])]


def test_a_whole_run_arrives(folder: Path, root: Path, client: Any) -> None:
    (folder / "samples.jsonl").write_text("{}\n")
    with Journal(folder) as journal:
        journal.params({"model": {"width": 64, "tied": True, "cell": "lstm"}, "betas": [0.9, 0.999], "clip": None})
        for step in range(1200):
            journal.metrics(step, {"train/loss": 1.0 / (step + 1)}, time=1.7e9 + step / 8)
        journal.metrics(1200, {"bad": math.nan, "worse": math.inf})
        journal.artifact(folder / "samples.jsonl", "samples")
        journal.end("FINISHED")
    run = send(folder, root, client)
    assert (run.info.run_name, run.info.status) == ("lstm seed 3", "FINISHED")
    assert client.get_experiment(run.info.experiment_id).name == "language_modeling"
    expected = {"model.width": "64", "model.tied": "true", "model.cell": "lstm", "betas": "[0.9, 0.999]"}
    assert run.data.params == {**expected, "clip": "null"}
    assert {key: run.data.tags[key] for key in IDENTITY} == {key: str(value) for key, value in IDENTITY.items()}
    assert run.data.tags["mlflow.source.git.commit"] == "0123abc"
    assert run.data.tags["mlflow.source.name"] == "unroll train lstm"
    inputs = [(entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs]
    assert inputs == [("wikitext-2", "89ab89ab89ab")]
    loss = [(step, round((1.7e9 + step / 8) * 1000), 1.0 / (step + 1)) for step in range(1200)]
    assert points(client, run, "train/loss") == loss
    assert math.isnan(points(client, run, "bad")[0][2])
    assert points(client, run, "worse")[0][2] > 1e308
    assert [file.path for file in client.list_artifacts(run.info.run_id, "samples")] == ["samples/samples.jsonl"]
    assert list((root / "mlartifacts").rglob("samples.jsonl"))
    assert tracking.unsent(folder) == 0


def test_what_was_sent_and_forgotten_does_not_appear_twice(folder: Path, root: Path, client: Any) -> None:
    with Journal(folder) as journal:
        for step in range(150):
            journal.metrics(step, {"loss": float(step % 3), "undefined": math.nan})
        journal.end("FINISHED")
    first = send(folder, root, client)
    stored = json.loads((folder / "mlflow_run.json").read_text())
    (folder / "sent.json").unlink()
    (folder / "mlflow_run.json").write_text(json.dumps({"uuid": stored["uuid"]}))  # killed before the id was kept
    before = active_runs(client)
    again = send(folder, root, client)
    assert again.info.run_id == first.info.run_id
    assert active_runs(client) == before
    assert len(again.inputs.dataset_inputs) == 1
    assert [step for step, _, _ in points(client, again, "loss")] == list(range(150))
    assert [step for step, _, _ in points(client, again, "undefined")] == list(range(150))


def test_a_retried_run_goes_on_under_its_own_id(folder: Path, root: Path, client: Any) -> None:
    with Journal(folder) as journal:
        journal.metrics(1, {"loss": 2.0})
        journal.end("FAILED")
    failed = send(folder, root, client)
    with Journal(folder) as journal:
        journal.metrics(1, {"loss": 2.0})
        journal.metrics(2, {"loss": 1.0})
        going_on = send(folder, root, client)
        journal.end("FINISHED")
    finished = send(folder, root, client)
    assert [run.info.status for run in (failed, going_on, finished)] == ["FAILED", "RUNNING", "FINISHED"]
    assert failed.info.run_id == going_on.info.run_id == finished.info.run_id
    assert [(step, value) for step, _, value in points(client, finished, "loss")] == [(1, 2.0), (2, 1.0)]


def test_a_run_whose_process_is_gone_without_an_end_was_killed(folder: Path, root: Path, client: Any) -> None:
    assert send(folder, root, client).info.status == "KILLED"
    with Journal(folder) as journal:
        journal.metrics(1, {"loss": 2.0})
        assert send(folder, root, client).info.status == "RUNNING"
    assert tracking.unsent(folder) == 0
    assert send_pending(root).runs == 1  # nothing to send, but an end to tell
    assert send(folder, root, client).info.status == "KILLED"


def test_scores_added_to_a_finished_run_leave_it_finished(folder: Path, root: Path, client: Any) -> None:
    with Journal(folder) as journal:
        journal.end("FINISHED")
    ended = send(folder, root, client).info.end_time
    with Journal(folder) as journal:
        journal.metrics(5, {"test/perplexity": 9.0})
    run = send(folder, root, client)
    assert (run.info.status, run.info.end_time) == ("FINISHED", ended)
    assert run.data.metrics == {"test/perplexity": 9.0}


def test_a_run_begun_anew_under_a_living_sender_is_another_run(folder: Path, root: Path, client: Any) -> None:
    sender = Sender(folder, root, client)
    with Journal(folder) as journal:
        journal.metrics(1, {"loss": 1.0})
    sender.send()
    first = sender.run
    (folder / "journal.jsonl").rename(root / "old.jsonl")  # keeps its inode, as a removed file that is read may not
    shutil.rmtree(folder)
    with Journal(folder) as journal:
        journal.tag(IDENTITY)
        journal.metrics(1, {"loss": 2.0})
        journal.end("FINISHED")
    sender.send()
    assert first is not None
    assert sender.run is not None
    assert sender.run.info.run_id != first.info.run_id
    assert points(client, sender.run, "loss")[0][2] == 2.0
    assert tracking.unsent(folder) == 0
    (root / "old.jsonl").unlink()


def test_a_run_created_twice_by_a_slow_server_is_one_again(folder: Path, root: Path, client: Any) -> None:
    run = send(folder, root, client)
    before = active_runs(client)
    identity = json.loads((folder / "mlflow_run.json").read_text())["uuid"]
    client.create_run(run.info.experiment_id, tags={RUN_TAG: identity})
    send(folder, root, client)
    assert active_runs(client) == before


def test_a_parameter_changed_by_a_resume_is_kept_beside_the_first(folder: Path, root: Path, client: Any) -> None:
    for workers in (1, 2):
        with Journal(folder) as journal:
            journal.params({"workers": workers, "width": 64})
        run = send(folder, root, client)
    assert run.data.params == {"workers": "1", "width": "64"}
    assert run.data.tags["changed.workers"] == "2"
    assert "changed.width" not in run.data.tags


def test_names_and_texts_that_mlflow_refuses_are_made_to_fit(folder: Path, root: Path, client: Any) -> None:
    with Journal(folder) as journal:
        journal.params(
            {"text": "x" * 9000, "k" * 400: 1, "weird: [name]": {"ü(1)": 2}, **{f"p{n}": n for n in range(250)}}
        )
        journal.metrics(1, {"acc@1": 0.5, "/a//b/../c": 1.0})
        journal.metrics(2, {f"m{number}": 1.0 for number in range(1100)})
    run = send(folder, root, client)
    assert run.data.params["text"] == "x" * 6000
    assert run.data.params["k" * 250] == "1"
    assert run.data.params["weird: _name_._(1)".replace("(1)", "_1_")] == "2"
    assert run.data.params["p249"] == "249"
    assert {"acc_1", "a/c", "m1099"} < set(run.data.metrics)


def test_nothing_of_this_machine_is_told(folder: Path, root: Path, client: Any) -> None:
    with Journal(folder) as journal:
        journal.params({"source": str(root / "text.txt"), "url": "https://ann:secret@example.org/a.txt"})
        journal.params({"paths": [str(Path.home() / "a.txt"), "~/b.txt"]})
    run = send(folder, root, client)
    told = json.dumps([run.data.params, run.data.tags])
    for secret in (str(root), str(root.parent), str(Path.home()) + "/", "~/", "secret", socket.gethostname()):
        assert secret not in told, secret
    assert run.data.params["source"] == "text.txt"


def test_a_missing_artifact_does_not_hold_up_the_rest(
    folder: Path, root: Path, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with Journal(folder) as journal:
        journal.artifact(folder / "gone.txt")
        journal.metrics(1, {"loss": 1.0})
        journal.end("FINISHED")
    run = send(folder, root, client)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss": 1.0}
    assert "gone.txt: named in the journal, but no longer there" in capsys.readouterr().out


def test_a_model_is_registered_once_and_without_a_pickle(folder: Path, root: Path, client: Any, tmp_path: Path) -> None:
    model = tmp_path / "exported"
    model.mkdir()
    (model / "weights.safetensors").write_bytes(b"weights")
    (model / "model.json").write_text("{}")
    for _ in range(2):
        with Journal(folder) as journal:
            journal.model(model, "lstm")
            journal.end("FINISHED")
        run = send(folder, root, client)
    version = client.get_model_version_by_alias("lstm", "latest")
    assert (version.version, version.run_id) == (1, run.info.run_id)
    assert version.source == f"runs:/{run.info.run_id}/model"
    there = Path(client.download_artifacts(run.info.run_id, "model", str(tmp_path)))
    assert sorted(path.name for path in there.iterdir()) == ["model.json", "weights.safetensors"]


def test_send_pending_sends_every_run_and_names_a_damaged_one(folder: Path, root: Path, client: Any) -> None:
    folders = [root / "runs" / f"gru-{number}" / "seed-1" for number in range(3)]
    for number, other in enumerate(folders):
        with Journal(other) as journal:
            journal.tag({"recipe": f"gru{number}", "task": "language_modeling"})
            journal.end("FINISHED")
    with (folders[1] / "journal.jsonl").open("ab") as file:
        file.write(b"}\n")
    sent = send_pending(root)
    assert sent.runs == 3
    assert len(sent.problems) == 1
    assert "gru-1/seed-1/journal.jsonl: damaged at byte" in sent.problems[0]
    assert "gru2 seed 1" in {client.get_run(run).info.run_name for run in active_runs(client)}
    (folders[1] / "journal.jsonl").unlink()
    assert send_pending(root) == Sent(0, [])


def test_a_run_deleted_in_mlflow_is_named(folder: Path, root: Path, client: Any) -> None:
    run = send(folder, root, client)
    client.delete_run(run.info.run_id)
    with Journal(folder) as journal:
        journal.metrics(1, {"loss": 1.0})
    with pytest.raises(UserError, match=rf"seed-3: its MLflow run {run.info.run_id} was deleted"):
        send(folder, root, client)


def test_another_database_gets_everything(folder: Path, root: Path, client: Any, tmp_path: Path) -> None:
    run = send(folder, root, client)
    stored = json.loads((folder / "mlflow_run.json").read_text())
    (folder / "mlflow_run.json").write_text(json.dumps({**stored, "default": "0" * 32}))  # as if `mlflow.db` were new
    assert send(folder, root, client).info.run_id == run.info.run_id
    assert tracking.unsent(folder) == 0
    assert tracking.unsent(folder, tmp_path) == 1


def test_an_unreachable_server_is_one_line_without_passwords(
    folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret@{address}")
        with pytest.raises(UserError, match=r"not sent: .*refused.*unroll track") as caught:
            send_pending(root)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


DEAD_SERVER = """
import sys
from pathlib import Path
from unroll.errors import UserError
from unroll.sender import send_pending
try:
    send_pending(Path(sys.argv[1]))
except UserError as error:
    print(error)
print({"torch", "mlflow", "ray"} & set(sys.modules))
"""


def test_nothing_heavy_is_imported_for_a_server_that_is_not_there(folder: Path, root: Path) -> None:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", DEAD_SERVER, str(root)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    assert "Connection refused" in told[0]
    assert told[1] == "set()"
