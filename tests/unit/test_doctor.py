"""`unroll doctor` must find what stops a newcomer, and must not call a mere absence an error."""

import socket
import sqlite3
import sys
from importlib import metadata
from pathlib import Path

import pytest

from unroll import doctor
from unroll.doctor import Check, checks, print_checks

PARAMS = """
datasets:
  tiny:
    preparer: text
    licence: none
    sources: [{file: a.txt}]
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("UNROLL_MIRROR", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params.yaml").write_text(PARAMS)
    text = tmp_path / "data" / "embedded" / "tiny-shakespeare" / "input.txt"
    text.parent.mkdir(parents=True)
    text.write_text("First Citizen:\n")
    return tmp_path


def find(root: Path, name: str) -> Check:
    return next(check for check in checks(root) if check.name == name)


def test_a_machine_that_runs_these_tests_is_ready(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_checks(checks(root))
    told = capsys.readouterr().out
    for name in ("Python", "torch", "ray", "mlflow", "threads", "bf16 processor", "GPU", "Java", "free disk", "mirror"):
        assert name in told
    assert "BAD" not in told


@pytest.mark.parametrize(
    ("name", "version", "ok"),
    [
        ("torch", "2.9.1+cpu", False),
        ("torch", "2.10.0", True),
        ("torch", "2.14.0", False),
        ("ray", "2.53.0", False),
        ("ray", "2.54.0", True),
        ("mlflow", "2.22.0", False),
    ],
)
def test_versions_outside_the_bounds_are_named_with_the_reason(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, version: str, ok: bool
) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda asked: version if asked == name else real(asked))
    assert print_checks(checks(root)) == ok
    line = next(line for line in capsys.readouterr().out.splitlines() if f" {name} " in line)
    assert version in line
    assert ("CVE" in line) == (not ok)


def test_a_missing_package_is_bad(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert find(root, "ray") == Check("ray", "not installed", ">=2.54", False, "make setup")


def test_missing_data_full_disk_and_wrong_mirror_are_bad(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "data/embedded/tiny-shakespeare/input.txt").unlink()
    monkeypatch.setenv("UNROLL_MIRROR", str(root / "nowhere"))
    monkeypatch.setattr(doctor, "FREE_GIGABYTES", 1e9)
    assert [check.name for check in checks(root) if not check.ok] == ["free disk", "mirror", "data"]
    monkeypatch.setenv("UNROLL_MIRROR", str(root))
    assert find(root, "mirror").ok
    monkeypatch.setenv("UNROLL_MIRROR", "https://ann:secret@example.org/sources")
    assert find(root, "mirror").found == "https://example.org/sources"


def test_a_params_file_with_a_mistake_is_quoted(root: Path) -> None:
    (root / "params.yaml").write_text(PARAMS.replace("preparer", "prepare"))
    data = find(root, "data")
    assert not data.ok
    assert "did you mean" in data.found or "missing" in data.found


def test_the_tracker_is_told_apart_dead_or_alive(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(root, "MLflow store").found.endswith("will be created")
    with sqlite3.connect(root / "mlflow.db") as store:
        store.execute("create table runs (id)")
    assert find(root, "MLflow store").found.endswith("0 runs")
    (root / "mlflow.db").write_text("not a database, but long enough to be read as one" * 9)
    assert "not reached" in find(root, "MLflow store").found
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret@127.0.0.1:{port}")
        assert find(root, "MLflow store").found == f"http://127.0.0.1:{port}: answers"
    dead = find(root, "MLflow store")
    assert dead.ok
    assert "not reached" in dead.found
    assert "unroll track" in dead.advice


def test_a_missing_java_is_advice_and_a_missing_git_is_bad(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert find(root, "Java") == Check("Java", "none", "", True, find(root, "Java").advice)
    assert "METEOR" in find(root, "Java").advice
    assert not find(root, "git").ok


def test_nothing_heavy_is_imported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "mlflow", "dvc", "webdataset", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would raise
    assert print_checks(checks(root))
