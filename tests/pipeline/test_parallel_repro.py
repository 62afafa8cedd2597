"""`unroll repro`: the same lock file and outputs as `dvc repro`, in less time, and nothing left over."""

import errno
import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from dvc.exceptions import ReproductionError
from dvc.repo import Repo

from unroll.errors import UserError
from unroll.repro import pipeline, schedule
from unroll.repro.processes import Ended, Processes, stop
from unroll.repro.ray_tasks import resources
from unroll.repro.schedule import repro
from unroll.training.launch import Profile

pytestmark = pytest.mark.pipeline
PYTHON = sys.executable
PARAMS = {"letters": {"a": 1, "b": 2, "c": 3}, "shared": {"list": [1, 2, 3]}}

# Later letters end sooner, so that stages end in another order than the serial run's.
STAGES = """
vars: [params.yaml]
stages:
  text:
    cmd: ["echo one > text", "echo two >> text"]
    deps: [source]
    outs: [text]
  letter:
    foreach: ${letters}
    do:
      cmd: sleep 0.$((4 - ${item})); mkdir -p letters/${key}; cat text > letters/${key}/x; echo ${item} >> letters/${key}/x
      deps: [text]
      params: ["letters.${key}", shared]
      outs: ["letters/${key}"]
  count:
    cmd: cat letters/*/x | wc -l > count.json; echo another run >> kept
    deps: [letters]
    metrics: [{count.json: {cache: false}}]
    outs: [{kept: {persist: true, cache: false}}]
  broken:
    cmd: echo a word of explanation; exit ${shared.list[2]}
    deps: [text]
    outs: [never]
  after_broken:
    cmd: cp never ever
    deps: [never]
    outs: [ever]
"""


def write_project(root: Path, stages: str = STAGES) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dvc.yaml").write_text(stages)
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    (root / "source").write_text("source")
    (root / "added").write_text("data")
    Repo.init(str(root), no_scm=True).close()
    return root


def serial(root: Path) -> None:
    """`dvc repro --keep-going`."""
    with Repo(str(root)) as repo:
        with pytest.raises(ReproductionError, match="broken"):
            repo.reproduce(on_error="keep-going")


def content(root: Path) -> dict[str, str]:
    """Hash of every file of the workspace, of DVC's cache and its run cache."""
    files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if not name.startswith(".dvc/tmp")
    }


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write_project(tmp_path / "parallel")
    monkeypatch.chdir(root)
    return root


STARTED: list[subprocess.Popen[str]] = []


def start(root: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [PYTHON, "-m", "unroll", "repro", *arguments]
    with (root / "log").open("a") as log:
        STARTED.append(subprocess.Popen(command, cwd=root, text=True, **{"stdout": log, "stderr": log, **options}))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Commands that a failed test leaves."""
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait()


def until(reached: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def started_by_stages(root: Path) -> list[psutil.Process]:
    """Living processes that stages of this project started."""
    found = []
    for process in psutil.process_iter(["environ", "status"]):
        variables = process.info["environ"] or {}
        if variables.get("DVC_ROOT") == str(root) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_lock_file_outputs_and_cache_are_those_of_the_serial_run(project: Path, tmp_path: Path) -> None:
    other = write_project(tmp_path / "serial")
    for root in (project, other):
        os.chdir(root)
        with Repo() as repo:
            repo.add("added")
    changes: list[Callable[[Path], object]] = [
        lambda root: None,
        lambda root: (root / "text").unlink(),  # restored from the cache
        lambda root: (root / "source").write_text("changed"),  # reruns `text`, with the same output
        lambda root: (root / "params.yaml").write_text(yaml.safe_dump({**PARAMS, "letters": {"a": 1, "b": 1, "d": 2}})),
        lambda root: (root / "params.yaml").write_text(yaml.safe_dump(PARAMS)),  # from the run cache
    ]
    for number, change in enumerate(changes):
        change(other)
        os.chdir(other)
        serial(other)
        change(project)
        os.chdir(project)
        assert repro([], jobs=3) == 1, "`broken` is broken"
        assert (project / "dvc.lock").read_text() == (other / "dvc.lock").read_text(), f"change {number}"
        assert content(project) == content(other), f"change {number}"


def test_a_failure_stops_what_depends_on_it_alone(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert repro([], jobs=2) == 1
    told = capsys.readouterr().out
    assert (project / "count.json").exists()
    assert "broken | a word of explanation" in told
    assert "broken: failed: exit code 3; its output: " in told
    assert "1 failed, 5 done, 1 not run" in told
    assert repro(["count"]) == 0
    assert "5 stages: 5 cached" in capsys.readouterr().out


def test_a_target_runs_what_it_needs_and_no_more(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert repro(["letter@b"]) == 0
    assert [path.name for path in (project / "letters").iterdir()] == ["b"]
    assert repro(["letter"]) == 0
    assert "4 stages: 2 done, 2 cached" in capsys.readouterr().out
    with pytest.raises(UserError, match="'lettre' not found"):
        repro(["lettre"])


def test_outputs_that_a_command_did_not_write_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {"lazy": {"cmd": "true", "outs": ["nothing"]}, "lost": {"cmd": "true", "deps": ["gone"], "outs": ["x"]}}
    monkeypatch.chdir(write_project(tmp_path, yaml.safe_dump({"stages": stages})))
    assert repro([]) == 1
    told = capsys.readouterr().out
    assert "lazy: failed: output 'nothing' does not exist" in told.replace(str(tmp_path) + "/", "")
    assert "lost: failed: missing data 'source': gone" in told or "gone" in told


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_takes_longest_by_the_kept_results_starts_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    """Side by side, that is; one after the other the order saves nothing, and stays the one of DVC."""
    train = {"cmd": "echo ${key} >> begun; sleep ${item}; echo > ${key}", "deps": ["${key}.data"], "outs": ["${key}"]}
    stages = {
        "train": {"foreach": {"first": 1, "second": 0, "third": 2, "fourth": 0}, "do": train},
        "data": {"cmd": "echo data >> begun; echo > third.data", "outs": ["third.data"]},
    }
    root = write_project(tmp_path / "project", yaml.safe_dump({"stages": stages}))
    monkeypatch.chdir(root)
    for name in ("first", "second", "fourth"):
        (root / f"{name}.data").write_text("data")
    (root / "results" / "cpu").mkdir(parents=True)
    for name, minutes in {"first": 2, "second": 1, "third": 9}.items():
        result = {"cost": {"minutes": minutes}, "seeds": [1]}
        (root / "results" / "cpu" / f"{name}.json").write_text(json.dumps(result))
    (root / "results" / "cpu" / "fourth.json").write_text("damaged")
    with pipeline.opened([]) as stages_of_dvc:
        serial = [name.removeprefix("train@") for name in stages_of_dvc.order]
    assert serial[-1] == "third"
    assert repro([], jobs=jobs) == 0
    began = (root / "begun").read_text().split()
    assert began == (serial if jobs == 1 else ["data", "first", "third", "second", "fourth"])


@pytest.mark.parametrize(("jobs", "set_by_user", "expected"), [(2, None, "{}"), (2, "5", "5"), (1, None, "unset")])
def test_jobs_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, set_by_user: str | None, expected: str
) -> None:
    stages = {"threads": {"cmd": "echo ${OMP_NUM_THREADS:-unset} > threads", "outs": ["threads"]}}
    monkeypatch.chdir(write_project(tmp_path, yaml.safe_dump({"stages": stages}).replace("${", "\\${")))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    assert repro([], jobs=jobs) == 0
    cores = len(os.sched_getaffinity(0))
    assert (tmp_path / "threads").read_text().strip() == expected.format(max(1, cores // jobs))


STUBBORN = {
    "saves": {"cmd": "trap 'echo saved > save; exit 75' TERM; sleep 600; true", "outs": ["x"]},
    "starts_others": {"cmd": "sleep 601 | sleep 602", "outs": ["y"]},
}


@pytest.mark.parametrize("track", [True, False])
def test_stages_know_who_sends_their_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, track: bool) -> None:
    """One process loads MLflow, not one for each stage."""
    root = write_project(tmp_path, "stages: {say: {cmd: 'echo \"$UNROLL_SENDER $UNROLL_TRACK\" > who', outs: [who]}}")
    monkeypatch.chdir(root)
    flag = "--track" if track else "--no-track"
    subprocess.run([PYTHON, "-m", "unroll", "repro", flag], check=True, env={**os.environ, "UNROLL_TRACK": ""})
    assert (root / "who").read_text() == (f"{root} 1\n" if track else " 0\n")
    assert (root / "runs").exists() == track


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stop_ends_everything_that_stages_started(tmp_path: Path, number: int, code: int) -> None:
    root = write_project(tmp_path, yaml.safe_dump({"stages": STUBBORN}))
    process = start(root, "--jobs", "2")
    until(lambda: len(started_by_stages(root)) >= 5)
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    assert started_by_stages(root) == []
    assert (root / "save").exists() == (number == signal.SIGTERM)
    assert json.loads((root / ".dvc/tmp/rwlock").read_text()) == {"read": {}}
    assert "2 stopped" in (root / "log").read_text()


def test_commands_in_one_checkout_take_turns(tmp_path: Path) -> None:
    stages = {"once": {"cmd": "echo x >> ../runs; sleep 1; echo x > out", "outs": ["out"]}}
    root = write_project(tmp_path / "project", yaml.safe_dump({"stages": stages}))
    commands = [start(root) for _ in range(2)]
    assert [command.wait(timeout=60) for command in commands] == [0, 0]
    assert (tmp_path / "runs").read_text() == "x\n"
    assert "waiting for another unroll repro" in (root / "log").read_text()


def test_a_dvc_command_in_the_checkout_is_waited_for(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "from dvc.repo import Repo; import time; r = Repo(); r.lock.lock(); print('held', flush=True); time.sleep(2)"
    with subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr("dvc.lock.DEFAULT_TIMEOUT", 0.3)
        monkeypatch.setattr(pipeline, "LOCK_SECONDS", 0.0)
        with pytest.raises(UserError, match="held by another DVC command"):
            repro(["text"])
        monkeypatch.setattr(pipeline, "LOCK_SECONDS", 60.0)
        assert repro(["text"]) == 0
    assert "waiting for another DVC command" in capsys.readouterr().out


def test_files_that_a_dvc_command_uses_are_waited_for(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rwlock = project / ".dvc/tmp/rwlock"
    rwlock.parent.mkdir(exist_ok=True)
    user = {"pid": os.getppid(), "cmd": "dvc repro"}
    rwlock.write_text(json.dumps({"read": {}, "write": {str(project / "text"): user}}))
    monkeypatch.setattr(schedule, "LOCK_SECONDS", 1.0)
    assert repro(["text"]) == 1
    rwlock.write_text("{}")
    assert repro(["text"]) == 0


def test_the_table_on_a_terminal_shows_stages_states_and_times(project: Path) -> None:
    ours, theirs = pty.openpty()
    process = start(
        project, "--jobs", "2", stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError as error:
        if error.errno != errno.EIO:  # the other end is closed: the command has ended
            raise
    assert process.wait() == 1
    text = shown.decode()
    for word in ("letter@a", "running", "waiting", "done", "a word of explanation", "7 stages: 1 failed"):
        assert word in text


@pytest.mark.slow
def test_eight_commands_started_at_once_all_end_well(tmp_path: Path) -> None:
    root = write_project(tmp_path)
    commands = [start(root, "count", "--jobs", "2") for _ in range(8)]
    assert [command.wait(timeout=300) for command in commands] == [0] * 8


@pytest.mark.fault
def test_a_killed_command_takes_its_stages_along_and_the_next_one_waits_for_them(tmp_path: Path) -> None:
    """The stages are told to save, and no two of one output run at a time."""
    script = "trap 'sleep 2; echo saved; exit 75' TERM; echo begun; sleep 5; echo done; echo x > out"
    stages = {"slow": {"cmd": f"({script}) >> ../told", "outs": ["out"]}}
    root = write_project(tmp_path / "project", yaml.safe_dump({"stages": stages}))
    killed = start(root)
    until((tmp_path / "told").exists)
    killed.kill()
    killed.wait()
    assert start(root).wait(timeout=120) == 0
    assert (tmp_path / "told").read_text().split() == ["begun", "saved", "begun", "done"]


class Losing(Processes):
    """Machines that are lost, the first `losses` times."""

    retries = 2

    def __init__(self, losses: int, saved: bool = False) -> None:
        super().__init__()
        self.losses, self.saved = losses, saved

    def wait(self, seconds: float) -> list[Ended]:
        if self.losses and self.groups:
            self.losses -= 1
            stage, group = self.groups.popitem()
            stop([group], signal.SIGKILL)
            return [Ended(stage, None, "its machine was lost", self.saved)]
        return super().wait(seconds)


@pytest.mark.parametrize(("losses", "saved", "code"), [(2, False, 0), (3, False, 1), (3, True, 0)])
def test_a_stage_whose_machine_was_lost_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: int, saved: bool, code: int
) -> None:
    """As often as its profile says; a stage that saved because its machine goes is not counted."""
    stages = {"slow": {"cmd": "sleep 0.5; echo x > out", "outs": ["out"]}}
    monkeypatch.chdir(write_project(tmp_path, yaml.safe_dump({"stages": stages})))
    monkeypatch.setattr(schedule, "_runner", lambda *_: Losing(losses, saved))
    assert repro([]) == code
    assert (tmp_path / "out").exists() == (code == 0)


@pytest.mark.parametrize(
    ("profile", "runs_on", "expected"),
    [
        ({"workers": 2, "gpu": True, "cpus_per_worker": 4}, "workers", (0, 0)),  # its worker group asks
        ({"workers": 2, "gpu": True, "cpus_per_worker": 4}, "device", (4, 1)),
        ({"workers": 2, "gpu": True, "cpus_per_worker": 4}, "", (4, 0)),
        ({"workers": 0, "gpu": True, "cpus_per_worker": 2}, "workers", (2, 1)),
        ({"workers": 0}, "device", (1, 0)),
    ],
)
def test_tasks_ask_for_what_the_profile_says(profile: dict[str, Any], runs_on: str, expected: tuple[int, int]) -> None:
    assert resources(Profile(**profile), runs_on) == expected


RAY_PROFILES = {"profiles": {"tasks": {"workers": 0, "cpus_per_worker": 1}}}


@pytest.mark.slow
def test_ray_tasks_give_the_lock_file_and_outputs_of_the_serial_run(tmp_path: Path) -> None:
    roots = [write_project(tmp_path / name) for name in ("ray", "serial")]
    for root in roots:
        (root / "cluster").mkdir()
        (root / "cluster/profiles.yaml").write_text(yaml.safe_dump(RAY_PROFILES))
    assert start(roots[0], "--ray", "--profile", "tasks").wait(timeout=200) == 1
    os.chdir(roots[1])
    serial(roots[1])
    (roots[0] / "log").unlink()
    assert content(roots[0]) == content(roots[1])


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_nothing_of_a_stopped_or_killed_command_stays_on_a_ray_cluster(tmp_path: Path, number: int, code: int) -> None:
    root = write_project(tmp_path, yaml.safe_dump({"stages": STUBBORN}))
    (root / "cluster").mkdir()
    (root / "cluster/profiles.yaml").write_text(yaml.safe_dump(RAY_PROFILES))
    process = start(root, "--ray", "--profile", "tasks")
    until(lambda: len(started_by_stages(root)) >= 5, seconds=200)
    process.send_signal(number)
    assert process.wait(timeout=100) == code
    until(lambda: started_by_stages(root) == [], seconds=60)
    assert (root / "save").exists()
