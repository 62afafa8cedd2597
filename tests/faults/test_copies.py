"""A machine is lost with its disk: the run goes on elsewhere from the copies of its checkpoints, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from project import project

from unroll.copies import Copies, kept
from unroll.errors import UserError
from unroll.journal import history
from unroll.place import Place
from unroll.training import checkpoint
from unroll.training.context import WorkerContext
from unroll.training.runs import train_one

pytestmark = pytest.mark.fault
TRAIN = {"steps": 240, "checkpoint_every": 20, "validate_every": 60, "select": "best"}
SLOW = """
import time
from unroll.training.loop import Run
step = Run.step
def slower(self, batches):
    time.sleep(0.05)
    return step(self, batches)
Run.step = slower
from unroll.cli import main
main()
"""


def start(root: Path, url: str) -> subprocess.Popen[bytes]:
    (root / "cluster").mkdir(exist_ok=True)
    (root / "cluster/profiles.yaml").write_text(f"profiles: {{run: {{workers: 0, copies: {url!r}}}}}\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "UNROLL_TRACK": "0"}
    command = [sys.executable, "-c", SLOW, "train", "small", "--profile", "run"]
    with (root / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)


def test_a_run_goes_on_from_its_copies_when_its_folder_is_lost(tmp_path: Path) -> None:
    recipe, place = project(tmp_path / "undisturbed", train=TRAIN)
    train_one(recipe, 1, place, WorkerContext())
    store = tmp_path / "store"
    _, lost = project(tmp_path / "lost", train=TRAIN)
    process = start(lost.root, f"file://{store}")
    deadline = time.monotonic() + 100
    while not list(store.glob("*/*/step-*/checksums.json")):
        assert process.poll() is None, (lost.root / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(lost.root)
    _, other = project(tmp_path / "other", train=TRAIN)
    assert start(other.root, f"file://{store}").wait(timeout=200) == 0, (other.root / "log").read_text()
    log = (other.root / "log").read_text()
    assert "taken from file://" in log
    assert "resumed at step" in log
    weights = [(at.model(recipe, 1) / "weights.safetensors").read_bytes() for at in (place, other)]
    assert weights[0] == weights[1]
    steps = [point.step for point in history(other.history(recipe, 1))["train/loss"]]
    assert steps == list(range(1, 241)), "the history is whole"
    assert not list(store.glob("*/*/*")), "a finished run removes its copies"


@pytest.fixture
def copied(tmp_path: Path) -> tuple[Place, Path, Copies]:
    """A run with checkpoints at steps 20 and 40 that were both copied."""
    recipe, place = project(tmp_path / "p", train={"steps": 60, "checkpoint_every": 20})
    run = place.run(recipe, 1)
    copies = Copies(run, f"memory://{tmp_path.name}")
    for step in (20, 40):
        content = checkpoint.Checkpoint({}, {}, {}, {"step": step})
        checkpoint.save(run / "checkpoints", content)
        (run / "journal.jsonl").write_text(f"journal of {step}")
        copies.send()
    return place, run, copies


def test_a_torn_copy_is_no_checkpoint_and_a_damaged_one_is_passed_over(
    copied: tuple[Place, Path, Copies], capsys: pytest.CaptureFixture[str]
) -> None:
    _, run, copies = copied
    assert copies.steps() == ["step-000000020", "step-000000040"]
    shutil.rmtree(run)
    copies.store.pipe_file(f"{copies.base}/step-000000040/state.json", b"{}")
    copies.store.pipe_file(f"{copies.base}/step-000000060/state.json", b"{}")  # sent in part: no checksums
    copies.fetch()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000020"]
    assert "passed over: a copy of step-000000040" in capsys.readouterr().out
    assert (run / "journal.jsonl").read_text() == "journal of 40"


def test_what_is_here_is_kept_unless_the_copy_is_newer(copied: tuple[Place, Path, Copies]) -> None:
    _, run, copies = copied
    (run / "journal.jsonl").write_text("longer here")
    copies.fetch()
    assert (run / "journal.jsonl").read_text() == "longer here"
    shutil.rmtree(run / "checkpoints" / "step-000000040")
    copies.fetch()
    assert (run / "checkpoints" / "step-000000040").exists()
    assert (run / "journal.jsonl").read_text() == "journal of 40"


def test_old_copies_are_removed(copied: tuple[Place, Path, Copies]) -> None:
    _, run, copies = copied
    checkpoint.save(run / "checkpoints", checkpoint.Checkpoint({}, {}, {}, {"step": 60}))
    copies.send()
    assert copies.steps() == ["step-000000040", "step-000000060"]


def test_a_store_that_fails_costs_one_line_and_no_training(
    copied: tuple[Place, Path, Copies], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run, copies = copied

    def fail(*arguments: object, **options: object) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(copies.store, "put_file", fail)
    checkpoint.save(run / "checkpoints", checkpoint.Checkpoint({}, {}, {}, {"step": 60}))
    copies.try_to_send()
    copies.try_to_send()
    assert capsys.readouterr().out.count("nobody answers; trying again") == 1
    monkeypatch.undo()
    copies.try_to_send()
    assert copies.steps()[-1] == "step-000000060"


@pytest.mark.parametrize("url", ["nosuch://place", "s3x://ann:secret@place"])
def test_an_address_that_nobody_can_open_is_one_line_without_its_password(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match=r"^copies: .*nosuch|^copies: .*s3x") as caught, kept(tmp_path, url):
        pass
    assert "secret" not in str(caught.value)
