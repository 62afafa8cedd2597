"""How long `dvc repro` and `unroll repro` of everything take when nothing changed. Goal: <= 5 s.

The pipeline as it is, every suite of it, in a copy of the repository whose outputs are one small file each, recorded by
`dvc commit`: weeks of training are not needed to see what the walk through the graph costs. Sizes of outputs matter
little, as DVC keeps the hash of a file whose time and size stay the same.

Run: python benchmarks/no_change.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dvc.repo import Repo

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
GOAL = 5


def run(root: Path, *command: str) -> str:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(root / "src")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def finished_copy(root: Path) -> int:
    """A copy of the tracked files in which every stage has run, as far as DVC can tell; how many stages that is."""
    for name in run(ROOT, "git", "ls-files").splitlines():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, root / name)
    shutil.rmtree(root / ".dvc")
    run(root, "dvc", "init", "--no-scm", "-q", "-f")
    run(root, "python", "-m", "unroll", "dependencies")
    with Repo(root) as repo:
        stages = repo.index.stages
        for out in (out for stage in stages for out in stage.outs):
            path = Path(out.fs_path)
            if not path.exists():
                path = path if path.suffix else path / "file"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(out.def_path)
    run(root, "dvc", "commit", "-f", "-q")
    return len(stages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        count = finished_copy(root)
        for command in ("dvc", "unroll"):
            seconds = []
            for _ in range(rounds):
                began = time.perf_counter()
                said = run(root, command, "repro")
                seconds.append(time.perf_counter() - began)
                if "Running stage" in said or ": running" in said:
                    sys.exit(f"{command} repro ran a stage:\n{said}")
            median, best = statistics.median(seconds), min(seconds)
            print(
                f"{command} repro, {count} unchanged stages: median {median:.2f} s, best {best:.2f} s (goal <= {GOAL} s)"
            )


if __name__ == "__main__":
    main()
