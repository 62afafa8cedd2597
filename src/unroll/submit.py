"""`unroll submit`: the pipeline as a Ray job. Upload by allow-list, follow the log, fetch what came of it.

The dashboard's address is all that is needed of the cluster: results come back in the log of a second, tiny job.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import os
import re
import secrets
import shlex
import shutil
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from unroll.errors import UserError
from unroll.journal import without_passwords
from unroll.remote_job import PACK_LIMIT, PROJECT, RESULTS

UPLOAD_LIMIT = 50_000_000
SHOWN_PATHS = 10
UNPACKED_LIMIT = 8 * PACK_LIMIT
RECONNECT_SECONDS = 2.0
OUTAGE_SECONDS = 600.0
STARTING_SECONDS = 60.0
"""For how long a cluster that has just come up may have nobody to take a job."""
LEFT_OUT = ("__pycache__", ".ipynb_checkpoints")
STOPPED = 143


@dataclass(frozen=True)
class Job:
    """What to run and where. `folder`: the project's place on the cluster, on storage that all its machines share."""

    command: list[str]
    folder: str
    profile: str
    include: list[str] = field(default_factory=list)
    install: bool = False
    push: bool = False


def project_files(root: Path, include: Sequence[str] = ()) -> list[Path]:
    """The files to upload, relative to `root`: those of the allow-list and of `include`, without caches and links.

    Raises:
        UserError: nothing there, a path outside the project, or over 50 MB: then with the largest paths.
    """
    files: set[Path] = set()
    for name in (*PROJECT, *include):
        path = root / name
        if name in include and (not path.exists() or not path.resolve().is_relative_to(root.resolve())):
            raise UserError(f"--include {name}: no such file or folder in {root.resolve()}")
        found = path.rglob("*") if path.is_dir() else [path]
        files |= {file.relative_to(root) for file in found if file.is_file() and not file.is_symlink()}
    files = {file for file in files if not set(file.parts) & set(LEFT_OUT) and not _is_build(file)}
    if Path("dvc.yaml") not in files:
        raise UserError(f"{(root / 'dvc.yaml').absolute()}: no such file; there is no pipeline to submit")
    sizes = {file: (root / file).stat().st_size for file in files}
    if sum(sizes.values()) > UPLOAD_LIMIT:
        largest = sorted(sizes, key=lambda file: -sizes[file])[:SHOWN_PATHS]
        shown = ", ".join(f"{file} {sizes[file] / 1e6:.1f} MB" for file in largest)
        total = f"{sum(sizes.values()) / 1e6:.0f} MB to upload, at most {UPLOAD_LIMIT / 1e6:.0f} MB allowed"
        raise UserError(f"{total}; put data on the cluster's storage instead; the largest: {shown}")
    return sorted(files)


def _is_build(file: Path) -> bool:
    return any(part.endswith(".egg-info") for part in file.parts)


def runtime_environment(root: Path, job: Job, upload: Path) -> dict[str, Any]:
    """Ray's description of the job's environment: the upload, variables without secrets, and packages if asked for."""
    variables = {"PYTHONPATH": "src", "UNROLL_PROFILE": job.profile}
    tracker = os.environ.get("MLFLOW_TRACKING_URI", "")
    if tracker.startswith("http"):
        if without_passwords(tracker) != tracker:
            raise UserError(
                "MLFLOW_TRACKING_URI holds a password, which a job's description would show; set it on the cluster"
            )
        variables["MLFLOW_TRACKING_URI"] = tracker
    environment: dict[str, Any] = {"working_dir": str(upload), "env_vars": variables}
    if job.install:
        wanted = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        environment["pip"] = {
            "packages": [*wanted["dependencies"], *wanted.get("optional-dependencies", {}).get("cluster", [])],
            "pip_install_options": ["--constraint=${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"],
        }
    return environment


def submit(root: Path, address: str, job: Job) -> int:
    """Run `job` on the cluster whose dashboard is at `address`; returns the job's exit code.

    Raises:
        UserError: what cannot be uploaded, or the cluster does not answer or refuses.
    """
    files = project_files(root, job.include)
    client = connect(address)
    name = f"unroll-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    with tempfile.TemporaryDirectory() as folder:
        upload = Path(folder) / "project"
        for file in files:
            (upload / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file, upload / file)
        archive = archive_of(job.folder, name)
        words = ["python", "-m", "unroll.remote_job", "--folder", job.folder, "--pack", archive]
        words += [*(["--push"] if job.push else []), "--", *job.command]
        try:
            start_job(
                client,
                entrypoint=shlex.join(words),
                submission_id=name,
                runtime_env=runtime_environment(root, job, upload),
                metadata={"unroll_archive": archive},
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{address}: {_first_line(error)}") from error
    print(f"job {name}: {' '.join(job.command)}, in {job.folder} of the cluster", flush=True)
    return watch(root, client, name)


def start_job(client: Any, **job: Any) -> str:
    """`submit_job`, asked again while the cluster is there and the process that starts its jobs is not.

    Raises:
        RuntimeError: refused for another reason, or nobody came.
    """
    deadline = time.monotonic() + STARTING_SECONDS
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(RECONNECT_SECONDS)


def watch(root: Path, client: Any, name: str) -> int:
    """Show the log of a job until it ends, fetch its results, return its exit code."""
    try:
        info = asyncio.run(follow(client, name))
    except KeyboardInterrupt:
        print(
            f"\njob {name} goes on: `unroll submit --follow {name}` shows it, `ray job stop {name}` ends it", flush=True
        )
        return 130
    archive = (info.metadata or {}).get("unroll_archive", "")
    if archive:
        fetched = fetch(client, name, archive)
        for path in unpack(fetched, root) if fetched else []:
            print(f"fetched {path}", flush=True)
    status = str(getattr(info.status, "value", info.status))
    code = exit_code(status, info.driver_exit_code)
    print(
        f"job {name}: {status.lower()}, exit code {code}{f' ({info.message})' if code and info.message else ''}",
        flush=True,
    )
    return code


def exit_code(status: str, code: int | None) -> int:
    """The exit code of a job: its command's, or 1 if it never ran, or 143 if it was stopped."""
    if status == "STOPPED":
        return STOPPED
    if code is not None and code != 0:
        return code if code > 0 else 128 - code
    return 0 if status == "SUCCEEDED" else 1


def connect(address: str) -> Any:
    """A client of Ray's job server; with the token that this user has, if any.

    Raises:
        UserError: it does not answer, or refuses the token.
    """
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if "RAY_AUTH_MODE" not in os.environ and (os.environ.get("RAY_AUTH_TOKEN") or token.is_file()):
        os.environ["RAY_AUTH_MODE"] = "token"
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(f"{address}: {_first_line(error)}; the cluster's token is needed in {token}") from error
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{address}: {_first_line(error)}; is it the address of the cluster's dashboard?") from error


async def follow(client: Any, name: str) -> Any:
    """Print a job's log as it grows, across lost connections; returns the job's details when it has ended.

    Raises:
        UserError: the cluster has not answered for ten minutes.
    """
    shown, lost_since = 0, 0.0
    while True:
        try:
            seen = 0
            async for text in client.tail_job_logs(name):
                seen += len(text)
                if seen > shown:  # a new connection begins at the log's beginning
                    print(text[max(0, len(text) - (seen - shown)) :], end="", flush=True)
                    shown = seen
                lost_since = 0.0
            info = client.get_job_info(name)
            if info.status.is_terminal():
                return info
        except (RuntimeError, OSError) as error:  # requests' and aiohttp's connection errors are OSErrors
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > OUTAGE_SECONDS:
                raise UserError(f"job {name}: the cluster does not answer ({_first_line(error)})") from error
        await asyncio.sleep(RECONNECT_SECONDS)


def archive_of(folder: str, name: str) -> str:
    """Where a job leaves its results: in its folder, which outlives it."""
    return str(PurePosixPath(folder) / ".dvc" / "tmp" / f"{name}.tar.gz")


def fetch(client: Any, name: str, archive: str) -> bytes:
    """The archive of results, read by a job whose log it is; empty if there is none."""
    quoted = shlex.quote(archive)
    if archive.startswith("~/"):
        quoted = "~/" + shlex.quote(archive[2:])
    # Ray writes a line of its own into the log, which may come after the first ones of the command: hence the second of
    # silence, and no line counts that has a space.
    command = f"sleep 1; echo BEGIN && base64 {quoted} && echo END"
    reader = start_job(client, entrypoint=command, submission_id=f"{name}-results")
    while not client.get_job_info(reader).status.is_terminal():
        time.sleep(0.5)
    found = re.search(r"^BEGIN\n(.*)^END$", client.get_job_logs(reader), re.DOTALL | re.MULTILINE)
    try:
        lines = found[1].splitlines() if found else []
        content = base64.b64decode("".join(line for line in lines if " " not in line), validate=True)
    except binascii.Error:
        content = b""
    if not content:
        print(f"{archive}: not fetched; it stays on the cluster", flush=True)
    return content


def unpack(content: bytes, root: Path) -> list[str]:
    """Write fetched results into the project; nothing but plain files under the names of results.

    Raises:
        UserError: the archive holds anything else, or is damaged.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            members = [member for member in tar.getmembers() if not member.isdir()]
            _check(members)
            for member in members:
                file = tar.extractfile(member)
                assert file is not None
                path = root / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f".partial-{path.name}")
                partial.write_bytes(file.read())
                os.replace(partial, path)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"the fetched results are damaged: {_first_line(error)}") from error
    return _summary([member.name for member in members])


def _check(members: Iterable[tarfile.TarInfo]) -> None:
    total = 0
    for member in members:
        parts = PurePosixPath(member.name).parts
        total += member.size
        if not member.isfile() or not parts or parts[0] not in RESULTS or ".." in parts or total > UNPACKED_LIMIT:
            raise UserError(f"the fetched results hold {member.name!r}, which is none of theirs; nothing was written")


def _summary(names: Sequence[str]) -> list[str]:
    """`results (12 files)` and the like."""
    tops = [PurePosixPath(name).parts[0] for name in names]
    return [
        top if tops.count(top) == 1 and top in names else f"{top} ({tops.count(top)} files)"
        for top in dict.fromkeys(tops)
    ]


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
