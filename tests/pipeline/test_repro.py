"""The real thing in small: `dvc repro` of every demo recipe's tiny twin, reruns, and a killed training."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from unroll.cli import app
from unroll.config import merge
from unroll.files import sha256

ROOT = Path(__file__).parents[2]
TEXT_BYTES = 60_000
pytestmark = pytest.mark.pipeline


def twin_project(root: Path, suite: str) -> list[str]:
    """A copy of the project that holds the tiny twins of one suite, on the first part of the embedded text."""
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copyfile(ROOT / name, root / name)
    for name in ("src", "cluster"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    text = (ROOT / "data/embedded/tiny-shakespeare/input.txt").read_bytes()[:TEXT_BYTES]
    (root / "short.txt").write_bytes(text)
    (root / "data").mkdir()
    (root / "data/embedded").symlink_to(ROOT / "data/embedded")
    (root / "recipes").mkdir()
    twins: dict[str, Any] = {}
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        entries = yaml.safe_load(path.read_text())["recipes"]
        own = {name: merge(entry, entry.get("tiny", {})) for name, entry in entries.items() if entry["suite"] == suite}
        (root / "recipes" / path.name).write_text(yaml.safe_dump({"recipes": own}))
        twins |= own
    described = yaml.safe_load((ROOT / "params.yaml").read_text())["datasets"]
    datasets = {twin["dataset"]: described[twin["dataset"]] for twin in twins.values()}
    datasets["tiny-shakespeare"]["sources"] = [{"file": "short.txt", "sha256": sha256(root / "short.txt")}]
    (root / "params.yaml").write_text(yaml.safe_dump({"datasets": datasets, "suites": {suite: None}}))
    assert run(root, "dvc", "init", "--no-scm", "-q").returncode == 0
    return list(twins)


def environment(root: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "UNROLL_TRACK": "0"}
    return {**os.environ, **own}


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("twins")
    names = twin_project(root, "demo")
    done = run(root, "dvc", "repro", "report@demo")
    assert done.returncode == 0, done.stdout + done.stderr
    return root, names


def test_every_demo_recipe_has_a_twin_that_reaches_the_report(reproduced: tuple[Path, list[str]]) -> None:
    root, names = reproduced
    assert len(names) >= 4
    page = (root / "reports/demo/index.html").read_text()
    for name in names:
        result = json.loads((root / f"results/demo/{name}.json").read_text())
        score = result["metrics"][result["primary"]]
        assert score["low"] <= score["value"] <= score["high"]
        assert result["title"] in page


def test_a_second_repro_runs_nothing(reproduced: tuple[Path, list[str]]) -> None:
    root, _ = reproduced
    again = run(root, "dvc", "repro", "report@demo")
    assert again.returncode == 0
    assert "Running stage" not in again.stdout


def test_a_dry_run_says_what_each_kind_of_system_would_cost(
    reproduced: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, names = reproduced
    monkeypatch.chdir(root)
    for name in names:
        shown = CliRunner().invoke(app, ["show", name])
        assert shown.exit_code == 0, f"{name}: {shown.exception!r}"
        assert "minutes a seed" in shown.output or "one pass of counting" in shown.output, name


def test_a_new_metric_rescores_without_training_or_predicting(reproduced: tuple[Path, list[str]]) -> None:
    root, _ = reproduced
    path = root / "recipes/language_modeling.yaml"
    recipes = yaml.safe_load(path.read_text())
    name = next(iter(recipes["recipes"]))
    recipes["recipes"][name]["evaluate"]["metrics"].append("bits_per_token")
    path.write_text(yaml.safe_dump(recipes))
    again = run(root, "dvc", "repro", "report@demo")
    started = [line for line in again.stdout.splitlines() if line.startswith("Running stage")]
    stages = [line.split("'")[1] for line in started]
    assert stages == ["dependencies", f"evaluate@{name}", "report@demo"]  # the first looks for cells that recipes name


@pytest.mark.fault
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_training_killed_at_random_steps_ends_with_identical_weights(tmp_path: Path, kills: int) -> None:
    weights = []
    for name, times in (("undisturbed", 0), ("killed", kills)):
        root = tmp_path / name
        root.mkdir()
        twin_project(root, "demo")
        lengthen(root, 40 + 10 * kills)
        draw = random.Random(kills)
        for number in range(times):
            kill_training(root, after=draw.randint(4, 9) + 10 * number)
        done = run(root, "dvc", "repro", "train@demo_lstm")
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("resumed at step" in done.stdout) == bool(times)
        weights.append((root / "models/demo_lstm/seed-1/weights.safetensors").read_bytes())
    assert weights[0] == weights[1]


def lengthen(root: Path, steps: int) -> None:
    path = root / "recipes/language_modeling.yaml"
    recipes = yaml.safe_load(path.read_text())
    train: dict[str, Any] = recipes["recipes"]["demo_lstm"]["train"]
    train.pop("epochs", None)
    train |= {"steps": steps, "checkpoint_every": 3, "validate_every": 20, "log_every": 1}
    path.write_text(yaml.safe_dump(recipes))


def kill_training(root: Path, after: int) -> None:
    """Start `dvc repro`, wait until the run has journalled step `after`, kill -9 everything of it."""
    log = (root / "dvc.log").open("a")
    dvc = subprocess.Popen(
        ["dvc", "repro", "train@demo_lstm"],
        cwd=root,
        env=environment(root),
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while f'"step":{after},' not in "".join(
        path.read_text() for path in root.glob("runs/demo_lstm-*/seed-1/journal.jsonl")
    ):
        assert dvc.poll() is None, (root / "dvc.log").read_text()
        assert time.monotonic() < deadline, (root / "dvc.log").read_text()
        time.sleep(0.01)
    os.killpg(dvc.pid, signal.SIGKILL)
    dvc.wait()
