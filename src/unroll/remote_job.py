"""What `unroll submit` and kuberay_job.yaml start on the cluster: bring the project to its folder, run there, pack results.

    python -m unroll.remote_job --folder /shared/unroll [--pack ARCHIVE] [--push] -- unroll repro --ray report@gpu

The working directory holds the uploaded project, or the image's. It may be gone after the job and each machine may have its
own, so the work is done in `--folder`: on storage that all machines share, where the next job finds what this one computed.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType

from unroll.errors import UserError
from unroll.files import sha256

PROJECT = (
    ".dvc/config", ".dvcignore", "LICENSE", "README.md", "cluster", "constraints.txt", "data/embedded", "dvc.lock", "dvc.yaml",
    "params.yaml", "pyproject.toml", "recipes", "results", "src",
)  # fmt: skip
"""Files and folders that make up a project: never .git, prepared data, runs, models or caches."""
RESULTS = ("dvc.lock", "results", "reports")
COMMANDS = ("unroll", "dvc")
PACK_LIMIT = 64_000_000


def mirror(source: Path, folder: Path) -> int:
    """Make the project in `folder` the one in `source`; returns the number of files that changed.

    Files that are equal stay untouched, so that DVC need not read them again. What is not part of a project stays too.
    """
    wanted = {
        path.relative_to(source) for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    there = {path.relative_to(folder) for name in PROJECT for path in (folder / name).rglob("*") if path.is_file()}
    stale = {path for path in there - wanted if "__pycache__" not in path.parts}
    for path in stale:
        (folder / path).unlink()
    changed = [path for path in sorted(wanted) if not _equal(source / path, folder / path)]
    for path in changed:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        partial = folder / path.parent / f".partial-{path.name}"
        shutil.copyfile(source / path, partial)
        os.replace(partial, folder / path)
    return len(changed) + len(stale)


def _equal(one: Path, other: Path) -> bool:
    return other.is_file() and one.stat().st_size == other.stat().st_size and sha256(one) == sha256(other)


def pack(folder: Path, archive: Path) -> None:
    """dvc.lock, results and reports as one archive; without the reports if it would be too large to be fetched."""
    for names in (RESULTS, RESULTS[:2]):
        partial = archive.with_name(f".partial-{archive.name}")
        with tarfile.open(partial, "w:gz") as tar:
            for name in names:
                if (folder / name).exists():
                    tar.add(folder / name, name)
        os.replace(partial, archive)
        if archive.stat().st_size <= PACK_LIMIT:
            return
        print(
            f"{folder}/reports: too large to be fetched (over {PACK_LIMIT / 1e6:.0f} MB); they stay there", flush=True
        )


def differences(constraints: Path) -> list[str]:
    """Packages whose installed version is not the one that constraints.txt pins."""
    found = []
    for line in constraints.read_text().splitlines():
        name, pinned, version = line.partition("==")
        if not pinned or name.startswith("#"):
            continue
        try:
            installed = metadata.version(name.strip())
        except metadata.PackageNotFoundError:
            continue
        if installed.partition("+")[0] != version.strip().partition("+")[0]:
            found.append(f"{name.strip()} {installed} (pinned: {version.strip()})")
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One job at a time in a folder: the next would change the code that this one runs."""
    place = folder / ".dvc" / "tmp"
    place.mkdir(parents=True, exist_ok=True)
    with (place / "remote_job.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another job in {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: Sequence[str], folder: Path) -> int:
    """A command of the project, with the code of the project; stop signals are passed on. Returns its exit code."""
    if not command or command[0] not in COMMANDS:
        raise UserError(f"command {' '.join(command)!r}: allowed are {' and '.join(COMMANDS)}")
    paths = [str(folder / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, env=environment)

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=Path, help="where the project lives on the cluster")
    parser.add_argument("--pack", type=Path, help="write dvc.lock, results and reports into this archive")
    parser.add_argument("--push", action="store_true", help="`dvc push` what was computed")
    parser.add_argument("command", nargs="+", help="unroll or dvc, with arguments")
    options = parser.parse_args(arguments)
    folder, source = options.folder.expanduser().absolute(), Path.cwd()
    with _alone(folder):
        if folder != source:
            print(f"{mirror(source, folder)} files changed in {folder}", flush=True)
        if (folder / "constraints.txt").exists() and (other := differences(folder / "constraints.txt")):
            print(f"not as in constraints.txt: {', '.join(other)}", flush=True)
        if not (folder / ".git").exists():
            run(["dvc", "config", "--local", "core.no_scm", "true"], folder)
        code = run(options.command, folder)
        if options.push:
            code = run(["dvc", "push", "--quiet"], folder) or code
        if options.pack:
            pack(folder, options.pack.expanduser())
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
