"""Raw files: found on this machine, in a mirror or on the network, checked against their SHA-256, and read in pieces.

A source is looked for in this order; wherever it is found, its hash has to be right:
1. `UNROLL_MIRROR`, when it is a folder (a relative one counts from the current directory);
2. `data/embedded/`, `data/downloads/` and the project folder itself (the user's own text; an absolute path works too);
3. `UNROLL_MIRROR`, when it is an http(s) address with the same file names;
4. the source's own address. Downloads are kept in `data/downloads/`.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import itertools
import os
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from unroll.config import Copy, Source
from unroll.errors import UserError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all; 0 when not known)."""

PIECE_BYTES = 2**20
LINE_BYTES = 2**20


class NetworkError(Exception):
    """A download that failed, in one line."""


def no_progress(done: int, total: int) -> None:
    """For callers that show nothing."""


def locate(source: Source, root: Path, progress: Progress = no_progress) -> Path:
    """The file of a source, or of one of its copies, with its hash checked. Packed files stay packed.

    Raises:
        UserError: another hash than stated (file, expected, found), or nowhere to be found (everywhere that was tried).
    """
    forms: list[Copy] = [source, *source.copies]
    for form in forms:
        if form.sha256 is None and form.url is not None:
            raise UserError(f"source {form.file}: a source with an address must state its sha256")
    tried: list[str] = []
    for folder in _folders(root):
        for form in forms:
            path = _in_folder(folder, form, root, tried)
            if path is not None:
                return path
    for form in forms:
        for address in _addresses(form):
            path = _fetch(address, form, root, progress, tried)
            if path is not None:
                return path
    names = " or ".join(form.file for form in forms)
    raise UserError(
        f"source {names} was not found; looked at {'; '.join(tried)}; "
        "set UNROLL_MIRROR to a folder or an http address that holds it under this name"
    )


def _mirror() -> str:
    return os.environ.get("UNROLL_MIRROR", "").strip()


def _is_address(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _folders(root: Path) -> list[Path]:
    mirror = [] if not _mirror() or _is_address(_mirror()) else [Path(_mirror()).expanduser().absolute()]
    return [*mirror, root / "data" / "embedded", root / "data" / "downloads", root]


def _addresses(form: Copy) -> list[str]:
    if form.sha256 is None:
        return []
    mirror = [f"{_mirror().rstrip('/')}/{urllib.parse.quote(form.file)}"] if _is_address(_mirror()) else []
    return mirror + ([form.url] if form.url else [])


def _own_path_only(form: Copy) -> bool:
    """A file without a hash, or outside the project, can only be the user's own."""
    return form.sha256 is None or _leads_outside(form.file)


def _leads_outside(file: str) -> bool:
    return Path(file).is_absolute() or ".." in Path(file).parts


def _in_folder(folder: Path, form: Copy, root: Path, tried: list[str]) -> Path | None:
    if folder != root and _own_path_only(form):
        return None
    replaceable = folder == root / "data" / "downloads"
    return _checked(folder / form.file, form.sha256, tried, replaceable)


def _checked(path: Path, expected: str | None, tried: list[str], replaceable: bool = False) -> Path | None:
    """The path if it is the file meant. A wrong `replaceable` one counts as missing: it will be downloaded again."""
    if not path.is_file():
        tried.append(f"{path} (no such file)")
        return None
    found = file_sha256(path) if expected else None
    if found == expected:
        return path
    if not replaceable:
        raise UserError(f"{path}: SHA-256 {expected} expected, found {found}")
    tried.append(f"{path} (SHA-256 {found}, {expected} expected)")
    return None


def _fetch(address: str, form: Copy, root: Path, progress: Progress, tried: list[str]) -> Path | None:
    parts = urllib.parse.urlsplit(address)
    if parts.scheme == "file":
        return _checked(Path(urllib.request.url2pathname(parts.path)), form.sha256, tried)
    if parts.scheme not in ("http", "https"):
        raise UserError(f"source {form.file}: address {address}: {parts.scheme!r} is not one of https, http, file")

    def as_stated(found: str) -> None:
        if found != form.sha256:
            raise UserError(f"{address}: SHA-256 {form.sha256} expected, found {found}; the download was removed")

    try:
        return download(address, form.file, root, progress, as_stated)
    except NetworkError as error:
        tried.append(f"{address} ({error})")
        return None


def download(address: str, file: str, root: Path, progress: Progress, accept: Callable[[str], None]) -> Path:
    """Download to a temporary name in data/downloads, let `accept` raise what it has against the SHA-256 found, rename: a
    file under its own name is whole and right, and half a download leaves nothing behind.

    Raises:
        UserError: a file name that leads outside; a disk that is full or read-only; what `accept` raises.
        NetworkError: the network did not give it.
    """
    import pooch
    import requests

    if _leads_outside(file):
        raise UserError(f"source {file}: a source with an address needs a relative file name without '..'")
    target = root / "data" / "downloads" / file
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        pooch.HTTPDownloader(progressbar=_Bar(progress), chunk_size=PIECE_BYTES)(address, str(partial), None)
        accept(file_sha256(partial))
        partial.rename(target)
    except requests.exceptions.RequestException as error:
        raise NetworkError(" ".join(str(error).split())[:200]) from None
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    return target


class _Bar:
    """What pooch expects of a progress bar, passed on to a `Progress`."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.total, self.done = progress, 0, 0

    def update(self, count: int) -> None:
        self.done += count
        self.progress(min(self.done, self.total) if self.total else self.done, self.total)

    def reset(self) -> None:
        self.done = 0

    def close(self) -> None:
        """Nothing to clear: the caller owns the bar."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RawFile:
    """A raw file read in pieces of `PIECE_BYTES`, unpacked if its name ends in .gz; memory is one piece.

    After one whole pass, `sha256` and `bytes` are those of the unpacked content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.packed_bytes = path.stat().st_size
        self.sha256 = ""
        self.bytes = 0

    def pieces(self, progress: Progress = no_progress) -> Iterator[bytes]:
        """The unpacked content. `progress` counts bytes on disk.

        Raises:
            UserError: a truncated or damaged archive, with the file and the place in its unpacked content.
        """
        digest, size = hashlib.sha256(), 0
        with self.path.open("rb") as raw:
            reader: Any = gzip.GzipFile(fileobj=raw) if self.path.suffix == ".gz" else raw
            while True:
                try:
                    piece = reader.read(PIECE_BYTES)
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise UserError(f"{self.path}: damaged archive after {size} unpacked bytes: {error}") from None
                if not piece:
                    break
                digest.update(piece)
                size += len(piece)
                progress(raw.tell(), self.packed_bytes)
                yield piece
        self.sha256, self.bytes = digest.hexdigest(), size

    def text(self, progress: Progress = no_progress) -> Iterator[str]:
        """The content as text; pieces end between characters. Line ends stay as they are.

        Raises:
            UserError: bytes that are not UTF-8, with the file and the byte offset in its unpacked content.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        done = 0
        for piece in self.pieces(progress):
            yield self._decode(decoder, piece, done, final=False)
            done += len(piece)
        yield self._decode(decoder, b"", done, final=True)

    def lines(self, progress: Progress = no_progress) -> Iterator[str]:
        """The content line by line, without the line ends (LF or CR LF); every other character stays as it is.

        Raises:
            UserError: bytes that are not UTF-8, a NUL byte, or a line over `LINE_BYTES`, with the file and the line.
        """
        waiting, number = b"", 0
        for piece in itertools.chain(self.pieces(progress), [b""]):
            whole = waiting + piece
            end = whole.rfind(b"\n") + 1 if piece else len(whole)
            block, waiting = whole[:end], whole[end:]
            if len(waiting) > LINE_BYTES:
                at = number + block.count(b"\n") + 1
                raise UserError(f"{self.path}: line {at}: longer than {LINE_BYTES} bytes")
            if block:
                lines = self._decode_lines(block, number)
                number += len(lines)
                yield from lines

    def _decode_lines(self, block: bytes, before: int) -> list[str]:
        """Whole lines of text; `before`: the number of lines in front of them."""
        problem = None
        try:
            text = block.decode()
            if "\0" not in text:
                return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
            at, problem = block.index(b"\0"), "NUL byte"
        except UnicodeDecodeError as error:
            at, problem = error.start, f"not UTF-8 (0x{block[error.start]:02x}: {error.reason})"
        line = before + block.count(b"\n", 0, at) + 1
        raise UserError(f"{self.path}: line {line}: {problem}")

    def _decode(self, decoder: codecs.IncrementalDecoder, piece: bytes, done: int, final: bool) -> str:
        waiting = len(decoder.getstate()[0])
        try:
            return decoder.decode(piece, final)
        except UnicodeDecodeError as error:
            place = done - waiting + error.start
            found = error.object[error.start]
            raise UserError(f"{self.path}: byte {place}: not UTF-8 (0x{found:02x}: {error.reason})") from None


class Passes:
    """Adds the reading of several files, several times, up to one progress count of `total` bytes on disk."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.done, self.total = progress, 0, total

    def text(self, file: RawFile) -> Iterator[str]:
        """`RawFile.text`, counted."""
        yield from self._counted(file, file.text)

    def lines(self, file: RawFile) -> Iterator[str]:
        """`RawFile.lines`, counted; two files may be read side by side."""
        yield from self._counted(file, file.lines)

    def _counted(self, file: RawFile, read: Callable[[Progress], Iterator[str]]) -> Iterator[str]:
        before = 0

        def moved(done: int, _: int) -> None:
            nonlocal before
            self.done += done - before
            before = done
            self.progress(self.done, self.total)

        yield from read(moved)
        self.done += file.packed_bytes - before


def check_content(sources: Sequence[Source], files: Sequence[RawFile]) -> None:
    """Compare what was read, each file to its end, with the `content_sha256` of its source.

    Raises:
        UserError: names the first file with another content.
    """
    for source, file in zip(sources, files, strict=True):
        if source.content_sha256 not in (None, file.sha256):
            raise UserError(f"{file.path}: content SHA-256 {source.content_sha256} expected, found {file.sha256}")
