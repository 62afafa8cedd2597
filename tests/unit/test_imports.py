"""Imports go one way, every module loads alone, and plain training needs torch alone."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "unroll"
MODULES = sorted(PACKAGE.rglob("*.py"))

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
    "datasets": {"errors", "config", "files", "data", "layers"},
    "decoding": {"errors", "config", "layers"},
    "metrics": {"errors", "config"},
    "tasks": {"errors", "config", "data", "decoding", "layers", "losses", "metrics", "progress", "training"},
    "training": {
        "errors",
        "files",
        "config",
        "journal",
        "memory",
        "notice",
        "progress",
        "layers",
        "data",
        "tasks",
        "dependencies",
    },
    "dependencies": {"errors", "files", "config"},
    "notice": {"errors"},
    "copies": {"errors", "files", "journal", "training"},
    "memory": set(),
    "pictures": {"errors", "config", "data", "metrics"},
    "report": {"errors", "config", "files", "metrics"},
    "repro": {"errors", "progress", "training"},
    "remote_job": {"errors", "files"},
    "submit": {"errors", "journal", "remote_job"},
    "tracking": {"errors", "config", "files", "journal", "progress"},
}
HEAVY = {
    "ray": {"training/launch.py", "doctor.py", "doctor_cluster.py", "submit.py"},
    "mlflow": {"tracking.py", "doctor.py"},
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


def test_plain_training_loads_neither_ray_nor_mlflow_nor_dvc() -> None:
    code = (
        "import sys, unroll.stages.train, unroll.tasks.language_modeling\n"
        "import unroll.models.recurrent_lm, unroll.datasets.text\n"
        "print([name for name in ('ray', 'mlflow', 'dvc', 'webdataset', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_module_loads_alone() -> None:
    """One fresh process a module is slow; one process that forgets the package before each import is the same test.

    It remembers what loads first, alone, and imports nothing but one another: whoever imports them closes no circle.
    """
    first = ["unroll", "unroll.errors", "unroll.config"]
    names = [
        ".".join(["unroll", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        for path in MODULES
        if path.name != "__main__.py"
    ]
    code = (
        "import importlib, sys\n"
        "own = lambda: {name for name in sys.modules if name.startswith('unroll')}\n"
        f"for name in {first!r}:\n"
        "    importlib.import_module(name)\n"
        f"assert own() == set({first!r}), own()\n"
        f"for name in {names!r}:\n"
        f"    for loaded in own() - set({first!r}):\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
