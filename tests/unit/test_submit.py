"""`unroll submit` sends the project and nothing else, gives the job's exit code, and takes only results back."""

import asyncio
import base64
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from unroll import remote_job, submit
from unroll.errors import UserError
from unroll.remote_job import differences, mirror, pack
from unroll.submit import Job, archive_of, exit_code, project_files, runtime_environment, unpack

ROOT = Path(__file__).parents[2]
JOB = Job(["unroll", "repro", "--ray"], "/shared/unroll", "cluster")


def write(root: Path, **files: str) -> Path:
    """Files by name; __ stands for a slash, and _dot_ for a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = write(tmp_path / "project", dvc_dot_yaml="stages: {}", src__unroll__a_dot_py="a = 1", dvc_dot_lock="old")
    write(root, _dot_git__config="g", _dot_dvc__cache__x="c", _dot_dvc__tmp__x="t", _dot_dvc__config="core")
    write(
        root,
        data__prepared__x="p",
        data__embedded__x="e",
        models__m="m",
        runs__r="r",
        mlflow_dot_db="d",
        _dot_venv__x="v",
    )
    return write(root, _dot_dvc__config_dot_local="password = secret", notes="n")


def test_only_the_project_is_sent(project: Path) -> None:
    (project / "src" / "a.egg-info").mkdir()
    (project / "src" / "a.egg-info" / "x").write_text("")
    (project / "src" / "__pycache__").mkdir()
    (project / "src" / "__pycache__" / "x.pyc").write_text("")
    (project / "src" / "link").symlink_to("/etc/passwd")
    sent = {str(path) for path in project_files(project)}
    assert sent == {".dvc/config", "data/embedded/x", "dvc.lock", "dvc.yaml", "src/unroll/a.py"}
    assert Path("notes") in project_files(project, ["notes"])


@pytest.mark.parametrize("path", ["nothing", "../other", "/etc/hostname"])
def test_what_is_not_in_the_project_cannot_be_included(project: Path, path: str) -> None:
    (project.parent / "other").write_text("")
    with pytest.raises(UserError, match="no such file or folder in"):
        project_files(project, [path])


def test_too_much_is_refused_with_the_largest_paths(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        (project / "src" / f"big{number}").write_bytes(bytes(1000 * (number + 1)))
    monkeypatch.setattr(submit, "UPLOAD_LIMIT", 50_000)
    with pytest.raises(UserError) as refused:
        project_files(project)
    told = str(refused.value)
    assert told.index("src/big11") < told.index("src/big10") < told.index("src/big2 ")
    assert "src/big1 " not in told, "ten paths are shown"


def test_the_repository_itself_is_small_enough() -> None:
    files = project_files(ROOT)
    assert Path("src/unroll/submit.py") in files
    assert not [path for path in files if path.parts[0] in ("models", "runs", ".git", "reports")]


def test_a_job_has_no_secret_and_the_pinned_packages(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert runtime_environment(ROOT, JOB, project)["env_vars"] == {"PYTHONPATH": "src", "UNROLL_PROFILE": "cluster"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    described = runtime_environment(ROOT, Job(JOB.command, JOB.folder, "spot", install=True), project)
    assert described["env_vars"]["MLFLOW_TRACKING_URI"] == "http://tracker:5000"
    assert any(package.startswith("torch") for package in described["pip"]["packages"])
    assert described["pip"]["pip_install_options"] == [
        "--constraint=${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:secret@tracker:5000")
    with pytest.raises(UserError, match="password"):
        runtime_environment(ROOT, JOB, project)


@dataclass
class Info:
    status: Any
    driver_exit_code: int | None = None
    message: str = ""
    metadata: dict[str, str] | None = None


class Status(str):
    def is_terminal(self) -> bool:
        return self in ("SUCCEEDED", "FAILED", "STOPPED")


class Cluster:
    """A job server whose connection breaks `breaks` times while the log is followed."""

    def __init__(self, log: str, code: int, archive: bytes = b"", breaks: int = 0) -> None:
        self.log, self.code, self.archive, self.breaks = log, code, archive, breaks
        self.jobs: dict[str, dict[str, Any]] = {}
        self.uploaded: set[str] = set()

    def submit_job(self, **job: Any) -> str:
        self.jobs[job["submission_id"]] = job
        if upload := job.get("runtime_env", {}).get("working_dir"):
            self.uploaded = {str(path.relative_to(upload)) for path in Path(upload).rglob("*") if path.is_file()}
        return str(job["submission_id"])

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for number, start in enumerate(range(0, len(self.log), 7)):
            if self.breaks and number == 3 - self.breaks:
                self.breaks -= 1
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
            yield self.log[start : start + 7]

    def get_job_info(self, name: str) -> Info:
        if name.endswith("-results"):
            return Info(Status("SUCCEEDED"), 0)
        status = Status("SUCCEEDED" if self.code == 0 else "FAILED")
        return Info(status, self.code, "", self.jobs[name]["metadata"] if name in self.jobs else {})

    def get_job_logs(self, name: str) -> str:
        first, *others = base64.encodebytes(self.archive).decode().splitlines()
        lines = ["a warning", "BEGIN", first, f"Running entrypoint for job {name}: echo BEGIN", *others, "END"]
        return "\n".join(lines) + "\n"


def archive(**files: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name.replace("__", "/").replace("_dot_", "."))
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return content.getvalue()


@pytest.mark.parametrize("breaks", [0, 2])
def test_a_job_shows_its_log_once_and_brings_results_and_exit_code(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], breaks: int
) -> None:
    results = archive(dvc_dot_lock="new", results__demo__one_dot_json="{}", reports__demo__index_dot_html="<html>")
    cluster = Cluster("".join(f"line {number}\n" for number in range(9)), 3, results, breaks)
    monkeypatch.setattr(submit, "connect", lambda address: cluster)
    monkeypatch.setattr(submit, "RECONNECT_SECONDS", 0.0)
    assert submit.submit(project, "http://cluster", JOB) == 3
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if line.startswith("line")] == [f"line {number}" for number in range(9)]
    assert (project / "dvc.lock").read_text() == "new"
    assert (project / "results/demo/one.json").read_text() == "{}"
    assert "dvc.yaml" in cluster.uploaded
    assert not [path for path in cluster.uploaded if "git" in path or "cache" in path or "local" in path]
    entrypoint = next(iter(cluster.jobs.values()))["entrypoint"]
    assert entrypoint.startswith(
        "python -m unroll.remote_job --folder /shared/unroll --pack /shared/unroll/.dvc/tmp/unroll-"
    )
    assert entrypoint.endswith(" -- unroll repro --ray")


class JustUp(Cluster):
    """A job server whose head waits for the process that starts jobs; `left` more times."""

    def __init__(self, left: int) -> None:
        super().__init__("", 0)
        self.left = left

    def submit_job(self, **job: Any) -> str:
        if self.left:
            self.left -= 1
            raise RuntimeError(
                "Request failed with status code 500: No available agent to submit job, please try again"
            )
        return super().submit_job(**job)


def test_a_cluster_that_has_just_come_up_is_waited_for_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "RECONNECT_SECONDS", 0.0)
    assert submit.start_job(JustUp(2), entrypoint="true", submission_id="job") == "job"
    monkeypatch.setattr(submit, "STARTING_SECONDS", 0.0)
    with pytest.raises(RuntimeError, match="No available agent"):
        submit.start_job(JustUp(1000), entrypoint="true", submission_id="job")


def test_a_cluster_that_stays_away_is_one_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "RECONNECT_SECONDS", 0.0)
    monkeypatch.setattr(submit, "OUTAGE_SECONDS", 0.0)

    class Dead(Cluster):
        def get_job_info(self, name: str) -> Info:
            raise ConnectionError("refused")

    with pytest.raises(UserError, match="does not answer"):
        asyncio.run(submit.follow(Dead("", 0), "job"))


def test_an_address_where_nothing_listens_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match="is it the address of the cluster's dashboard"):
        submit.connect("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 75, 75),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", 0, 143),
        ("STOPPED", None, 143),
    ],
)
def test_exit_codes(status: str, code: int | None, expected: int) -> None:
    assert exit_code(status, code) == expected


@pytest.mark.parametrize(
    "name", ["src/unroll/cli.py", "../dvc.lock", "results/../src/x", "/etc/passwd", "dvc.yaml", ".git/hooks/x"]
)
def test_nothing_but_results_comes_back(tmp_path: Path, name: str) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("dvc.lock"))
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match="none of theirs"):
        unpack(content.getvalue(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_links_and_damage_do_not_come_back(tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        link = tarfile.TarInfo("results/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(UserError, match="none of theirs"):
        unpack(content.getvalue(), tmp_path)
    with pytest.raises(UserError, match="damaged"):
        unpack(archive(dvc_dot_lock="x" * 10_000)[:-50], tmp_path)


# --- the side on the cluster -------------------------------------------------------------------------------------------


def test_the_folder_becomes_the_project_and_keeps_what_was_computed(project: Path, tmp_path: Path) -> None:
    folder = write(
        tmp_path / "folder", src__gone_dot_py="x", models__m="kept", runs__r="kept", _dot_dvc__cache__c="kept"
    )
    same = write(folder, src__unroll__a_dot_py="a = 1") / "src/unroll/a.py"
    before = same.stat()
    source = tmp_path / "upload"
    for path in project_files(project):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((project / path).read_bytes())
    assert mirror(source, folder) > 0
    assert not (folder / "src/gone.py").exists(), "DVC hashes whole folders: a stale file would change them"
    assert (folder / "dvc.lock").read_text() == "old"
    assert {(folder / path).read_text() for path in ("models/m", "runs/r", ".dvc/cache/c")} == {"kept"}
    after = same.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert mirror(source, folder) == 0


def test_reports_that_are_too_large_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "folder", dvc_dot_lock="lock", results__a="r")
    (folder / "reports").mkdir()
    (folder / "reports" / "big").write_bytes(os.urandom(5000))
    monkeypatch.setattr(remote_job, "PACK_LIMIT", 4000)
    pack(folder, tmp_path / "archive.tar.gz")
    root = tmp_path / "root"
    assert unpack((tmp_path / "archive.tar.gz").read_bytes(), root) == ["dvc.lock", "results (1 files)"]


def test_other_versions_than_the_pinned_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("# pins\nnumpy==0.1\npytest\nno-such-package==1.0\n")
    assert [line.split()[0] for line in differences(tmp_path / "constraints.txt")] == ["numpy"]


@pytest.fixture
def remote(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """The remote side on a project whose `unroll` is a few lines."""

    def start(program: str, *arguments: str) -> subprocess.Popen[str]:
        source = write(tmp_path / "upload", src__unroll__stub="", dvc_dot_yaml="", dvc_dot_lock="lock")
        (source / "src/unroll/__init__.py").write_text("")
        (source / "src/unroll/__main__.py").write_text(program)
        (tmp_path / "folder/.git").mkdir(parents=True)
        words = ["-m", "unroll.remote_job", "--folder", str(tmp_path / "folder"), "--pack", str(tmp_path / "a.tar.gz")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, *words, "--", "unroll", *arguments], cwd=source, env=environment, stdout=pipe, text=True
        )

    return start


def test_the_command_runs_in_the_folder_with_its_code_and_gives_its_exit_code(
    tmp_path: Path, remote: Callable[..., subprocess.Popen[str]]
) -> None:
    process = remote("import os, sys; print(os.getcwd(), os.environ['PYTHONPATH']); sys.exit(5)", "repro")
    told, _ = process.communicate(timeout=60)
    folder = tmp_path / "folder"
    assert process.returncode == 5
    assert f"{folder} {folder / 'src'}:" in told
    assert unpack((tmp_path / "a.tar.gz").read_bytes(), tmp_path / "root") == ["dvc.lock"]


def test_a_stop_is_passed_on(tmp_path: Path, remote: Callable[..., subprocess.Popen[str]]) -> None:
    process = remote(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "pathlib.Path('ready').touch()\ntime.sleep(60)"
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "folder/ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "a.tar.gz").exists()


def test_an_archive_lies_in_the_folder() -> None:
    assert archive_of("~/unroll-jobs/x", "job") == "~/unroll-jobs/x/.dvc/tmp/job.tar.gz"
