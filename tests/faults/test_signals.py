"""A run that is told to stop, or that meets a bad disk: what the user sees, and that nothing is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from project import project, write_project

from unroll.stages.prepare import prepare
from unroll.training import checkpoint
from unroll.training.context import WorkerContext
from unroll.training.loop import Preempted
from unroll.training.runs import train_one

pytestmark = pytest.mark.fault
LONG = {"steps": 100_000, "validate_every": 50_000, "checkpoint_every": 50_000}


def start(root: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "unroll", "train", "small", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "UNROLL_TRACK": "0"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=root, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for_journal(root: Path, process: subprocess.Popen[str], text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in "".join(path.read_text() for path in root.glob("runs/*/*/journal.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("options", [["--plain"], []], ids=["plain", "ray"])
def test_sigterm_saves_and_ends_with_its_own_exit_code(tmp_path: Path, options: list[str]) -> None:
    recipe, place = project(tmp_path, train=LONG)
    process = start(tmp_path, *options)
    wait_for_journal(tmp_path, process, '"step":20,')
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 75
    assert errors.strip().splitlines()[-1].endswith("run the same command again to go on")
    found, _ = checkpoint.newest(place.run(recipe, 1) / "checkpoints")
    assert found is not None
    assert found.state["step"] >= 20
    journal = (place.run(recipe, 1) / "journal.jsonl").read_text()
    assert '"status":"KILLED"' in journal.splitlines()[-1]


def test_a_second_process_on_the_same_run_is_refused(tmp_path: Path) -> None:
    project(tmp_path, train=LONG)
    first = start(tmp_path, "--plain")
    wait_for_journal(tmp_path, first, '"step":5,')
    second = start(tmp_path, "--plain")
    _, errors = second.communicate(timeout=60)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert "another process is writing it" in errors


def test_a_mistake_is_one_line_and_exit_code_two(tmp_path: Path) -> None:
    write_project(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "unroll", "train", "smal"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: recipes: no recipe 'smal'; did you mean 'small'? (allowed: small)"


@pytest.mark.parametrize(
    ("error", "words"),
    [("ENOSPC", "the disk is full"), ("EROFS", "the file system is read-only"), ("EACCES", "no permission to write")],
)
def test_a_disk_that_fails_is_one_line_and_the_last_checkpoint_loads(tmp_path: Path, error: str, words: str) -> None:
    """A disk that fills up, or that the system makes read-only after an error, while a run is on."""
    model = {"name": "recurrent_lm", "layers": 1, "width": 64, "embedding": 16}
    recipe, place = project(tmp_path, model=model, train={"steps": 30, "checkpoint_every": 5})
    code = (
        "import errno, os, sys\n"
        "from unroll.training import checkpoint\n"
        "from unroll.cli import main\n"
        "save, calls = checkpoint.save_file, []\n"
        "def failing(*arguments):\n"
        "    calls.append(1)\n"
        f"    if len(calls) > 7: raise OSError(errno.{error}, os.strerror(errno.{error}))\n"
        "    return save(*arguments)\n"
        "checkpoint.save_file = failing\n"
        "sys.argv = ['unroll', 'train', 'small', '--plain']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: runs/small-")
    assert f"{words}; what was saved before is intact" in done.stderr
    assert "Traceback" not in done.stderr
    found, damaged = checkpoint.newest(place.run(recipe, 1) / "checkpoints")
    assert found is not None
    assert found.state["step"] == 10
    assert damaged == []


def mounted_read_only(folder: Path) -> list[str]:
    """What to put before a command so that it, and it alone, sees the folder as a read-only file system."""
    shell = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    return ["unshare", "--mount", "--map-root-user", "sh", "-c", shell, str(folder)]


def forbidden(folder: Path) -> list[str]:
    """The same by permission, which does not bind root."""
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return []


@pytest.mark.parametrize("read_only", [mounted_read_only, forbidden])
@pytest.mark.parametrize("place_of_it", ["runs/*/seed-1", "runs"])
def test_a_read_only_folder_is_one_line_and_the_last_checkpoint_loads(
    tmp_path: Path, read_only: Callable[[Path], list[str]], place_of_it: str
) -> None:
    recipe, place = project(tmp_path / "p", train={"steps": 30, "checkpoint_every": 5})
    train = [sys.executable, "-m", "unroll", "train", "small", "--plain"]
    with pytest.raises(Preempted):
        train_one(recipe, 1, place, StopAt(12))
    folder = next((tmp_path / "p").glob(place_of_it)).absolute()
    before = read_only(folder)
    if subprocess.run([*before, "sh", "-c", f"! touch {folder}/probe"], capture_output=True).returncode:
        pytest.skip("this user cannot mount, or is root")
    done = subprocess.run([*before, *train], cwd=tmp_path / "p", capture_output=True, text=True)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: runs/small-")
    assert "; what was saved before is intact" in done.stderr
    assert checkpoint.newest(place.run(recipe, 1) / "checkpoints")[0].state["step"] == 12  # type: ignore[union-attr]
    subprocess.run(train, cwd=tmp_path / "p", check=True, capture_output=True)
    assert (place.model(recipe, 1) / "weights.safetensors").exists()


class StopAt(WorkerContext):
    """Asked to stop at one step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.calls, self.step = 0, step

    def wants_stop(self) -> bool:
        self.calls += 1
        return self.calls == self.step


def test_a_model_of_other_data_is_refused_at_prediction(tmp_path: Path) -> None:
    project(tmp_path, train={"steps": 3})
    run = [sys.executable, "-m", "unroll"]
    subprocess.run([*run, "train", "small", "--plain"], cwd=tmp_path, check=True, capture_output=True)
    text = tmp_path / "own.txt"
    text.write_text("line 1 says 1 things.\n" + text.read_text())
    prepare(tmp_path, "own")
    done = subprocess.run([*run, "predict", "small"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "trained on data" in done.stderr
    assert "train again" in done.stderr
