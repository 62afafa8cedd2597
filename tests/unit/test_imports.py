"""Imports go one way, every module loads alone, plain training needs torch alone, and what DVC compares names every file
that a training reads."""

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from project import project

from unroll.dependencies import DECIDING, LEFT_OUT, LOOP, files_read
from unroll.stages.predict import predict
from unroll.stages.train import train

PACKAGE = Path(__file__).parents[2] / "src" / "unroll"
MODULES = sorted(PACKAGE.rglob("*.py"))
LOADED = [path for path in MODULES if path.name != "__main__.py"]  # which runs the command as it loads

# A part may import only what stands in its line, and its own kind.
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "config": {"errors"},
    "journal": {"errors", "files"},
    "progress": {"errors"},
    "layers": {"errors", "config"},
    "models": {"errors", "config", "layers"},
    "losses": {"errors", "config", "layers", "metrics", "decoding"},
    "data": {"errors", "config", "files"},
    "datasets": {"errors", "config", "device", "files", "data", "layers"},
    "decoding": {"errors", "config", "layers"},
    "metrics": {"errors", "config"},
    "tasks": {"errors", "config", "data", "decoding", "layers", "losses", "metrics", "progress", "training"},
    "training": {
        "errors",
        "files",
        "config",
        "journal",
        "device",
        "memory",
        "notice",
        "progress",
        "layers",
        "data",
        "tasks",
        "dependencies",
        "place",
    },
    "dependencies": {"errors", "files", "config"},
    "device": set(),
    "notice": {"errors"},
    "place": {"errors", "config", "data", "dependencies"},
    "copies": {"errors", "files", "journal", "training"},
    "memory": set(),
    "pictures": {"errors", "config", "data", "metrics"},
    "report": {"errors", "config", "files", "metrics"},
    "repro": {"errors", "progress", "tracking", "training"},
    "remote_job": {"errors", "files"},
    "submit": {"errors", "journal", "remote_job"},
    "tracking": {"errors", "journal"},
    "sender": {"errors", "journal", "tracking"},
}
HEAVY = {
    "ray": {"training/launch.py", "doctor.py", "doctor_cluster.py", "submit.py"},
    "mlflow": {"sender.py", "doctor.py"},
    "dvc": {"repro/pipeline.py"},
}


@functools.cache
def imported(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    return ".".join(["unroll", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def test_modules_are_found() -> None:
    assert len(MODULES) > 30


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    parts = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    used = {name.split(".")[1] for name in imported(path) if name.startswith("unroll.")} & parts
    if part in ALLOWED:
        assert used - ALLOWED[part] - {part} == set()
    for package, owners in HEAVY.items():
        if any(name == package or name.startswith(f"{package}.") for name in imported(path)):
            assert str(path.relative_to(PACKAGE)) in owners, f"{package} belongs in {owners} alone"


def test_tasks_know_the_loop_only_by_the_worker_context() -> None:
    for path in (PACKAGE / "tasks").glob("*.py"):
        used = {name for name in imported(path) if name.startswith("unroll.training")}
        names = {"WorkerContext", "row_slices"}
        assert used <= {"unroll.training.context", *(f"unroll.training.context.{name}" for name in names)}


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """Of one fresh process: what is in it after `plain training` has loaded, and the package's files that each module
    loads. A process for each module is slow; one that forgets the package before each import finds the same.

    It remembers what loads first, alone, and imports nothing but one another: whoever imports them closes no circle.
    """
    first = ["unroll", "unroll.errors", "unroll.config"]
    code = (
        "import gc, importlib, json, sys\n"
        "gc.disable()\n"
        "own = lambda: {name for name in sys.modules if name.split('.')[0] == 'unroll'}\n"
        f"for name in {first!r}:\n"
        "    importlib.import_module(name)\n"
        f"assert own() == set({first!r}), own()\n"
        "import unroll.stages.train, unroll.tasks.language_modeling, unroll.models.recurrent_lm, unroll.datasets.text\n"
        "loaded = {'plain training': sorted(sys.modules)}\n"
        "known = own()\n"
        f"for name in {[module_name(path) for path in LOADED]!r}:\n"
        f"    for forgotten in known - set({first!r}):\n"
        "        del sys.modules[forgotten]\n"
        "    importlib.import_module(name)\n"
        "    known = own()\n"
        "    loaded[name] = [sys.modules[one].__file__ for one in known]\n"
        "print(json.dumps(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_plain_training_loads_neither_ray_nor_mlflow_nor_dvc(loaded: dict[str, list[str]]) -> None:
    assert {"ray", "mlflow", "dvc", "webdataset", "matplotlib"}.isdisjoint(loaded["plain training"])


def test_preparing_and_scoring_load_no_torch(tmp_path: Path) -> None:
    """Two seconds for each stage. The one preparer that runs a network needs it."""
    parts = [path for part in ("metrics", "pictures", "datasets") for path in (PACKAGE / part).glob("[!_]*.py")]
    names = [module_name(path) for path in parts if path.stem != "caption_features"]
    names += [f"unroll.stages.{stage}" for stage in ("prepare", "evaluate", "report")]
    project(tmp_path, model={"name": "ngram", "order": 2}, train={"counting": True})
    train(tmp_path, "small", plain=True, track=False)
    predict(tmp_path, "small")
    scoring = f"unroll.stages.evaluate.evaluate(pathlib.Path({str(tmp_path)!r}), 'small', track=False)"
    code = f"import pathlib, sys, {', '.join(names)}\n{scoring}\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


def test_every_module_loads_alone(loaded: dict[str, list[str]]) -> None:
    assert loaded.keys() == {"plain training", *map(module_name, LOADED)}


def test_every_file_that_is_loaded_is_listed(loaded: dict[str, list[str]]) -> None:
    """Of the package, a training may load what its stage lists and what decides no number."""
    starts = [path for part in ("models", "tasks") for path in (PACKAGE / part).glob("[!_]*.py")]
    unlisted = {}
    for start in [*(str(path.relative_to(PACKAGE)) for path in starts), LOOP]:
        names = {str(Path(file).relative_to(PACKAGE)) for file in loaded[module_name(PACKAGE / start)]}
        assert start in names
        deciding = {file for file in names if file.split("/")[0] in DECIDING} - LEFT_OUT
        unlisted[start] = deciding - {f"{start.split('/')[0]}/__init__.py"} - set(files_read(start))
    assert {start: files for start, files in unlisted.items() if files} == {}
