"""Writing so that a crash at any moment leaves either the old or the new content, never half of one."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unroll.errors import UserError


@contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder into one line that names it."""
    try:
        yield
    except OSError as error:
        known = {errno.ENOSPC: "the disk is full", errno.EROFS: "the file system is read-only",
                 errno.EACCES: "no permission to write", errno.EPERM: "no permission to write",
                 errno.EDQUOT: "the quota is used up"}  # fmt: skip
        if error.errno in known:
            raise UserError(f"{path}: {known[error.errno]}; what was saved before is intact") from error
        raise


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder that appears under its final name only when it is complete and on disk.

    An existing folder of that name is replaced: moved aside first, removed after the rename. If a kill came between
    the two, the old one is moved back the next time.

    Raises:
        UserError: the disk is full or may not be written to.
    """
    partial, old = final.with_name(f".partial-{final.name}"), final.with_name(f".old-{final.name}")
    try:
        with readable_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            if old.exists() and not final.exists():
                os.rename(old, final)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            for path in sorted(partial.rglob("*")):
                flush_to_disk(path)
            flush_to_disk(partial)
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                os.rename(final, old)
            os.rename(partial, final)
            flush_to_disk(final.parent)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
