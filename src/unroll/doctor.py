"""Is this machine ready? Versions and their floors, processor, GPU, Java, disk, tracker, mirror and embedded data.

Nothing heavy is imported but torch: versions are read from the packages' metadata.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from unroll.config import load_datasets
from unroll.errors import UserError
from unroll.journal import without_passwords
from unroll.tracking import tracking_uri

FREE_GIGABYTES = 5
CONNECT_SECONDS = 3.0
REASONS = {
    "torch": "older ones can be made to run code or corrupt memory by a file of weights (CVE-2026-24747)",
    "ray": "the dashboard of older ones takes orders from any web page (CVE-2026-27482)",
    "mlflow": "older ones let web requests read and delete files (CVE-2023-1177, CVE-2024-1560)",
    "sacrebleu": "scores of other versions do not compare",
}


@dataclass(frozen=True)
class Check:
    """One line of the report. `ok` is false for what must be changed; something merely missing is ok, with advice."""

    name: str
    found: str
    needed: str
    ok: bool
    advice: str = ""


def checks(root: Path) -> list[Check]:
    """Everything that can be said about this machine and the project in `root`."""
    parts: list[Callable[[], list[Check]]] = [
        _python,
        _packages,
        _processor,
        _accelerator,
        _programs,
        lambda: [_disk(root), _tracker(root), _mirror(), _embedded(root)],
    ]
    return [check for part in parts for check in part()]


def print_checks(found: Sequence[Check]) -> bool:
    """Print checks as a table. Returns whether nothing must be changed."""
    widths = [max(len(value) for value in column) for column in zip(*((c.name, c.found) for c in found), strict=True)]
    for check in found:
        mark = "ok " if check.ok else "BAD"
        needed = f"needed: {check.needed}" if check.needed and not check.ok else ""
        told = "; ".join(text for text in (needed, check.advice) if text)
        print(f"{mark} {check.name:<{widths[0]}}  {check.found:<{widths[1]}}  {told}".rstrip())
    return all(check.ok for check in found)


def _python() -> list[Check]:
    ok = (3, 11) <= sys.version_info[:2] < (3, 14)
    advice = "" if ok else "make PYTHON=/path/to/python3.12"
    return [Check("Python", platform.python_version(), "3.11 to 3.13", ok, advice)]


def _packages() -> list[Check]:
    """What `pyproject.toml` demands, as recorded when `unroll` was installed."""
    from packaging.requirements import Requirement

    demands = [Requirement(text) for text in metadata.requires("unroll") or []]
    return [_package(demand.name, str(demand.specifier)) for demand in demands if demand.marker is None]


def _package(name: str, needed: str) -> Check:
    """`needed`: bounds such as `>=2.10,<2.14`."""
    from packaging.specifiers import SpecifierSet

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "not installed", needed, False, "make setup")
    ok = SpecifierSet(needed).contains(version, prereleases=True)
    advice = "" if ok else "; ".join(text for text in (REASONS.get(name), "make setup") if text)
    return Check(name, version, needed, ok, advice)


def _processor() -> list[Check]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    advice = "" if threads == cores else f"OMP_NUM_THREADS={cores} would use the cores best"
    return [Check("threads", f"{threads} on {cores} cores", "", True, advice), _bf16()]


def _bf16() -> Check:
    """Whether the processor multiplies bf16 matrices itself."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text(errors="replace").split()) if info.exists() else set()
    found = sorted(words & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
    advice = "" if found else "precision: bf16 will be slow on this processor; use fp32"
    return Check("bf16 processor", ", ".join(found) or "no", "", True, advice)


def _accelerator() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        return [Check("GPU", "none", "", True, "the suites demo and cpu need none")]
    return [Check("GPU", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}", "", True)]


def _programs() -> list[Check]:
    git = shutil.which("git") is not None
    advice = "install git: DVC and the results need it"
    return [Check("git", "found" if git else "missing", "git", git, "" if git else advice), _java()]


def _java() -> Check:
    advice = "only METEOR and the PTB tokenizer of caption metrics need a Java runtime"
    if shutil.which("java") is None:
        return Check("Java", "none", "", True, advice)
    try:
        told = subprocess.run(["java", "-version"], capture_output=True, text=True, timeout=20, check=True).stderr
    except (OSError, subprocess.SubprocessError) as error:
        return Check("Java", f"does not start ({type(error).__name__})", "", True, advice)
    return Check("Java", told.splitlines()[0] if told else "found", "", True)


def _disk(root: Path) -> Check:
    free = shutil.disk_usage(root).free / 1e9
    ok = free >= FREE_GIGABYTES
    advice = "" if ok else "free space, or move the project"
    return Check("free disk", f"{free:.1f} GB", f"{FREE_GIGABYTES} GB", ok, advice)


def _tracker(root: Path) -> Check:
    """Whether the MLflow store answers; a dead one costs training nothing, so it is no error."""
    uri = tracking_uri(root)
    try:
        state, advice = store_state(uri), ""
    except (OSError, sqlite3.Error, ValueError) as error:
        state, advice = f"not reached ({error})", "runs keep their journal; `unroll track` sends it later"
    return Check("MLflow store", f"{without_passwords(uri)}: {state}", "", True, advice)


def store_state(uri: str) -> str:
    """One or two words; raises OSError, sqlite3.Error or ValueError if the store cannot be used."""
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        if not path.exists():
            return "will be created"
        with sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=CONNECT_SECONDS) as store:
            (count,) = store.execute("select count(*) from runs").fetchone()
        return f"{count} runs"
    address = urlsplit(uri)
    if not address.hostname:
        return "not checked"
    port = address.port or (443 if address.scheme == "https" else 80)
    with socket.create_connection((address.hostname, port), timeout=CONNECT_SECONDS):
        return "answers"


def _mirror() -> Check:
    """`UNROLL_MIRROR`: a folder, or an address that only a download can test."""
    mirror = os.environ.get("UNROLL_MIRROR", "")
    if not mirror:
        return Check(
            "mirror", "none", "", True, "without a network, set UNROLL_MIRROR to a folder or address of the sources"
        )
    if "://" in mirror:
        return Check("mirror", without_passwords(mirror), "", True)
    ok = os.path.isdir(mirror) and os.access(mirror, os.R_OK | os.X_OK)
    return Check("mirror", mirror, "a readable folder", ok, "" if ok else "correct or unset UNROLL_MIRROR")


def _embedded(root: Path) -> Check:
    """Whether the data that comes with the repository is there, and the data sets are described."""
    path = root / "data" / "embedded" / "tiny-shakespeare" / "input.txt"
    ok = path.is_file() and path.stat().st_size > 0
    try:
        found = f"{len(load_datasets(root))} data sets described"
    except UserError as error:
        return Check("data", str(error), "a valid params.yaml", False)
    advice = "" if ok else "git checkout data/embedded"
    return Check("data", f"{found}, embedded text {'present' if ok else 'missing'}", str(path), ok, advice)
