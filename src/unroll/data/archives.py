"""Archives of media, read member by member: .tar, .tar.gz, .tgz and .zip, or a plain file, which is its own member.

Nothing is unpacked to disk, and a member is read only if somebody asks for it and it is not too large, so a name cannot
lead out of a folder and a small archive cannot swell. An archive with a name that tries to, a link or a device in it is
refused all the same: whoever made it means no good.
"""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unroll.data.shards import NAME_LIMIT
from unroll.errors import UserError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
MOST_MEMBERS = 5_000_000

Read = Callable[[int], bytes | None]
"""The content of a member, or none if it has more bytes than this."""


def is_archive(name: str) -> bool:
    """Whether a file of this name is read as an archive."""
    return name.lower().endswith(ARCHIVES)


def members(path: Path) -> Iterator[tuple[str, Read]]:
    """(name, how to read it) of each file in an archive, in its order. Read it before the next one.

    Raises:
        UserError: a damaged archive, or one with a member that is refused.
    """
    if not is_archive(path.name):
        yield path.name, lambda most: path.read_bytes() if path.stat().st_size <= most else None
        return
    found = _zip_members(path) if path.name.lower().endswith(".zip") else _tar_members(path)
    with _named(path):
        for number, (name, read) in enumerate(found):
            if number >= MOST_MEMBERS:
                raise UserError(f"{path}: more than {MOST_MEMBERS} members")
            yield name, _safely(path, read)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what the libraries raise for a damaged archive into one line that names it."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, NotImplementedError) as error:
        raise UserError(f"{path}: damaged archive: {error}") from None


def _safely(path: Path, read: Read) -> Read:
    def named(most: int) -> bytes | None:
        with _named(path):
            return read(most)

    return named


def _refuse(path: Path, name: str, problem: str) -> None:
    raise UserError(f"{path}: member {name[:NAME_LIMIT]!r} {problem}: refused")


def _check_name(path: Path, name: str) -> None:
    if name.startswith(("/", "\\")) or name[1:2] == ":":
        _refuse(path, name, "has an absolute path")
    if ".." in name.replace("\\", "/").split("/"):
        _refuse(path, name, "leads out of its folder")


def _tar_members(path: Path) -> Iterator[tuple[str, Read]]:
    with tarfile.open(path, "r|*" if path.suffix != ".tar" else "r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it remembers every file of the archive
            _check_name(path, member.name)
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                _refuse(path, member.name, "is a link or a device, not a file")
            yield member.name, _tar_reader(tar, member)


def _tar_reader(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Read:
    def read(most: int) -> bytes | None:
        if member.size > most:
            return None
        file: Any = tar.extractfile(member)
        data: bytes = file.read()
        if len(data) != member.size:
            raise EOFError(f"it ends within member {member.name[:NAME_LIMIT]!r}")
        return data

    return read


def _zip_members(path: Path) -> Iterator[tuple[str, Read]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            _check_name(path, member.filename)
            kind = member.external_attr >> 28  # of a Unix file mode; 0 where another system made the archive
            if kind not in (0, 4, 8):
                _refuse(path, member.filename, "is a link or a device, not a file")
            if member.flag_bits & 1:
                _refuse(path, member.filename, "is encrypted")
            if not member.is_dir():
                yield member.filename, _zip_reader(archive, member)


def _zip_reader(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Read:
    def read(most: int) -> bytes | None:
        if member.file_size > most:
            return None
        with archive.open(member) as file:
            data = file.read(most + 1)
        return None if len(data) > most else data

    return read
