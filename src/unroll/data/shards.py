"""Prepared data on disk: WebDataset tar shards, their manifest, and readers that find any record without an index
(writing: `writers.py`).

A prepared folder holds `manifest.json`, `tokenizer.json` and `<split>-00000.tar`, ... The same input gives the same
bytes: times, owners and modes of the tar members are fixed. Two kinds of data set:

- `stream`: one long row of token ids. Member `<9-digit record>.tokens` holds exactly `record_tokens` little-endian
  uint16 or uint32 ids (fewer in the last record of a split), so the place of any token is computed, not searched.
- `samples`: many short samples to a record, because a tar member costs 1 kB of header and padding.
  `<9-digit record>.jsonl` has one line a sample, `{"json": {...}, "tokens": {field: [start, count]}}`, and
  `<9-digit record>.tokens` the ids those lines point into. A sample with media (an image, a clip, the frames of one) is
  a record of its own: the encoded bytes in `<9-digit record>.jpg`, `.mp4`, ... (`.0000.jpg`, `.0001.jpg`, ... for
  frames), its line in `.json`, its ids in `.tokens`. `<split>-00000.lengths` beside the tar is one raw little-endian
  uint32 for each sequence of a sample: all that the plan needs.

A tar reader stops without a word at a block of zeros, so nothing here trusts the archive's end: counts, sizes and
SHA-256 stand in the manifest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unroll.config import hash_json
from unroll.data.sources import file_sha256
from unroll.errors import UserError

TAR_BLOCK = 512
NAME_LIMIT = 100
OPEN_FILES = 64
REFUSED_SUFFIXES = (".pkl", ".pickle", ".pth", ".pyd")
AGAIN = "the shard is damaged, prepare the data set again"


def token_type(vocabulary: int) -> np.dtype[Any]:
    """The little-endian type that token ids of this vocabulary are stored in."""
    return np.dtype("<u2") if vocabulary <= 65535 else np.dtype("<u4")


def record_key(number: int) -> str:
    """Name of a record in its shard, counted over the whole split."""
    return f"{number:09d}"


def lengths_name(shard: str) -> str:
    """Name of the file of sample lengths that belongs to a shard."""
    return shard.removesuffix(".tar") + ".lengths"


def padded(size: int) -> int:
    """Bytes that a tar member of this size takes, without its header."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        UserError: missing, not ours, changed by hand, or naming files outside the folder.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; prepare the data set first") from None
    except ValueError as error:
        raise UserError(f"{path}: not a manifest: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("splits"), dict):
        raise UserError(f"{path}: not a manifest: no 'splits' in it")
    if manifest.get("hash") != hash_json({key: value for key, value in manifest.items() if key != "hash"}):
        raise UserError(f"{path}: its hash does not match its content; prepare the data set again")
    for split, entry in manifest["splits"].items():
        for shard in entry["shards"]:
            if missing := {"file", "bytes", "sha256", "records"} - set(shard):
                raise UserError(f"{path}: splits.{split}: a shard without {', '.join(sorted(missing))}")
            if not re.fullmatch(r"\w[\w.-]*\.tar", shard["file"]):
                raise UserError(f"{path}: splits.{split}: shard {shard['file']!r} is not a plain tar file name")
    return manifest


def split_entry(folder: Path, manifest: Mapping[str, Any], split: str, kind: str) -> dict[str, Any]:
    """The manifest's part about one split, after checking that its shards are there in full size.

    Raises:
        UserError: no such split, another kind of data set, or a shard that is missing or of another size.
    """
    if manifest["kind"] != kind:
        raise UserError(f"{folder / 'manifest.json'}: kind: found {manifest['kind']!r}, expected {kind!r}")
    if split not in manifest["splits"]:
        raise UserError(f"{folder / 'manifest.json'}: no split {split!r} (allowed: {', '.join(manifest['splits'])})")
    entry: dict[str, Any] = manifest["splits"][split]
    for shard in entry["shards"]:
        _check_size(folder / shard["file"], shard["bytes"])
    return entry


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file; prepare the data set again")
    if path.stat().st_size != expected:
        raise UserError(f"{path}: {path.stat().st_size} bytes found, {expected} expected; {AGAIN}")


class TokenStream:
    """One split of a stream, read at any place by computed offsets; nothing is mapped or read as a whole.

    Safe to use from several threads. At most `OPEN_FILES` shards are open at a time.
    """

    def __init__(self, folder: Path, split: str) -> None:
        manifest = load_manifest(folder)
        entry = split_entry(folder, manifest, split, "stream")
        self.folder, self.split = folder, split
        self.tokens: int = entry["tokens"]
        self.record_tokens: int = manifest["record_tokens"]
        self.type = np.dtype(f"<u{manifest['token_bytes']}")
        self.paths = [folder / shard["file"] for shard in entry["shards"]]
        self._first_records = np.cumsum([0] + [shard["records"] for shard in entry["shards"]])
        if int(self._first_records[-1]) != -(-self.tokens // self.record_tokens):
            raise UserError(f"{folder / 'manifest.json'}: splits.{split}: records and tokens do not agree")
        self._seen = np.zeros(int(self._first_records[-1]), bool)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, start: int, count: int) -> np.ndarray:
        """Token ids `start` .. `start + count - 1` as int64 [count].

        Raises:
            UserError: a damaged shard.
            IndexError: a place outside the split.
        """
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"tokens {start}..{start + count - 1} of {self.tokens}")
        ids, done = np.empty(count, np.int64), 0
        while done < count:
            record, place = divmod(start + done, self.record_tokens)
            size = min(count - done, self.record_tokens - place)
            ids[done : done + size] = self._read_record(record, place, size)
            done += size
        return ids

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """The whole split in order, `size` ids at a time (the last piece is shorter)."""
        for start in range(0, self.tokens, size):
            yield self.read(start, min(size, self.tokens - start))

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _read_record(self, record: int, place: int, count: int) -> np.ndarray:
        shard = int(np.searchsorted(self._first_records, record, side="right")) - 1
        whole = TAR_BLOCK + padded(self.record_tokens * self.type.itemsize)
        offset = (record - int(self._first_records[shard])) * whole
        with self._lock:
            descriptor = self._open(shard)
            if not self._seen[record]:
                self._check_header(record, self.paths[shard], offset, os.pread(descriptor, TAR_BLOCK, offset))
            start, size = offset + TAR_BLOCK + place * self.type.itemsize, count * self.type.itemsize
            data = os.pread(descriptor, size, start)
        if len(data) != size:
            raise UserError(f"{self.paths[shard]}: ends within record {record_key(record)}; {AGAIN}")
        return np.frombuffer(data, self.type)

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _check_header(self, record: int, path: Path, offset: int, header: bytes) -> None:
        tokens = min(self.record_tokens, self.tokens - record * self.record_tokens)
        expected = (f"{record_key(record)}.tokens", tokens * self.type.itemsize)
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise UserError(f"{path}: byte {offset}: {error} where {expected[0]!r} should start; {AGAIN}") from None
        if (member.name, member.size) != expected or not member.isreg():
            found = f"{member.name!r} of {member.size} bytes"
            raise UserError(f"{path}: byte {offset}: found {found}, expected {expected[0]!r} of {expected[1]}; {AGAIN}")
        self._seen[record] = True


FRAMES = "frames"
"""What stands for the extension of a sample whose media are several encoded frames."""


class _Stored(NamedTuple):
    """A sample as it lies in its shard: its line, the ids of its record, the media members."""

    line: memoryview | bytes
    ids: np.ndarray
    media: list[memoryview]


class SampleReader:
    """One split of samples. Whole shards are read at a time, and the last `keep` kept. A shard is checked against its
    SHA-256 when it is first read, and again if the file has changed since (`_state`): a check costs 2 % of decoding.

    Safe to use from several threads. Memory is `keep` shards, whatever the size of the data set.
    """

    def __init__(self, folder: Path, split: str, keep: int = 8) -> None:
        manifest = load_manifest(folder)
        entry = split_entry(folder, manifest, split, "samples")
        self.folder, self.split, self.keep = folder, split, keep
        self.shards: list[dict[str, Any]] = entry["shards"]
        self.shard_counts: list[int] = [shard["samples"] for shard in self.shards]
        self.samples: int = entry["samples"]
        self.type = np.dtype(f"<u{manifest['token_bytes']}")
        self._loaded: OrderedDict[int, list[_Stored]] = OrderedDict()
        self._checked: dict[int, tuple[int, ...]] = {}
        self._lock = threading.Lock()

    def lengths(self, shard: int, epoch: int = 0) -> np.ndarray:
        """Lengths of each sample of a shard, for the plan, the same in every epoch: int64 [samples, sequences]."""
        entry = self.shards[shard]
        path = self.folder / lengths_name(entry["file"])
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != entry["lengths_sha256"]:
            raise UserError(f"{path}: missing or damaged; prepare the data set again")
        return np.frombuffer(data, "<u4").astype(np.int64).reshape(entry["samples"], -1)

    def sample(self, shard: int, index: int) -> dict[str, Any]:
        """One sample as it was written: token fields as int64 [T], or as a list of them; `media` as encoded bytes (a
        list of them for frames)."""
        with self._lock:
            if shard not in self._loaded:
                if len(self._loaded) >= self.keep:
                    self._loaded.popitem(last=False)
                self._loaded[shard] = self._load(shard)
            self._loaded.move_to_end(shard)
            line, ids, media = self._loaded[shard][index]
        stored = json.loads(bytes(line))
        sample: dict[str, Any] = stored["json"]
        for field, place in stored["tokens"].items():
            several = bool(place) and isinstance(place[0], list)
            places = place if several or not place else [place]
            found = [ids[first : first + count].astype(np.int64) for first, count in places]
            sample[field] = found if several or not place else found[0]
        if media:
            sample["media"] = [bytes(m) for m in media] if sample["extension"] == FRAMES else bytes(media[0])
        return sample

    def _load(self, shard: int) -> list[_Stored]:
        entry = self.shards[shard]
        path = self.folder / entry["file"]
        with path.open("rb") as file:
            state, data = _state(file.fileno()), file.read()
        if self._checked.get(shard) != state:
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise UserError(f"{path}: SHA-256 is not {entry['sha256']}; {AGAIN}")
            self._checked[shard] = state
        samples: list[_Stored] = []
        for key, record in itertools.groupby(_members(memoryview(data), path), key=lambda member: member[0]):
            members = {extension: content for _, extension, content in record}
            ids = np.frombuffer(members.pop("tokens", b""), self.type)
            if lines := members.pop("jsonl", None):
                samples.extend(_Stored(line, ids, []) for line in bytes(lines).splitlines())
            elif "json" in members:
                samples.append(_Stored(members.pop("json"), ids, [members[name] for name in sorted(members)]))
            else:
                raise UserError(f"{path}: record {key} holds no sample; {AGAIN}")
        if len(samples) != entry["samples"]:
            raise UserError(f"{path}: {len(samples)} samples found, {entry['samples']} expected; {AGAIN}")
        return samples


def _state(descriptor: int) -> tuple[int, ...]:
    """What changes when a file does: which one it is, its size and the time of its last change, in nanoseconds."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _members(data: memoryview, path: Path) -> Iterator[tuple[str, str, memoryview]]:
    """(record, extension, content) of each member of a tar that this project wrote; the content is not copied.

    `tarfile` takes about 50 microseconds a member, as long as it takes to decode a small image.
    """
    offset = 0
    while offset + TAR_BLOCK <= len(data):
        header = bytes(data[offset : offset + TAR_BLOCK])
        if not header.strip(b"\0"):
            return
        name, _, _ = header[:NAME_LIMIT].partition(b"\0")
        start = offset + TAR_BLOCK
        try:
            size = int(header[124:136].strip(b" \0"), 8)
            key, _, extension = name.decode("ascii").partition(".")
        except ValueError:
            size, key, extension = len(data), "", ""
        if header[156:157] not in b"0\0" or not key or not extension or start + size > len(data):
            raise UserError(f"{path}: byte {offset}: no plain tar member; {AGAIN}")
        yield key, extension, data[start : start + size]
        offset = start + padded(size)


# ---------------------------------------------------------------- checking


def verify(
    folder: Path, worker: int = 0, workers: int = 1, progress: Callable[[int], object] = lambda count: None
) -> dict[str, Any]:
    """Compare every file of a prepared folder with the manifest, which is returned.

    Several workers may share the shards, so that each is read by one of them. `progress` is called with the bytes read.

    Raises:
        UserError: names the first file that is missing, changed, or not what a shard may be.
    """
    manifest = load_manifest(folder)
    entries = [split_entry(folder, manifest, split, manifest["kind"]) for split in manifest["splits"]]
    for shard in [shard for entry in entries for shard in entry["shards"]][worker::workers]:
        path = folder / shard["file"]
        _check_hash(path, shard["sha256"])
        if "lengths_sha256" in shard:
            _check_hash(folder / lengths_name(shard["file"]), shard["lengths_sha256"])
        records = check_members(path)
        if records != shard["records"]:
            raise UserError(f"{path}: {records} records found, {shard['records']} expected; {AGAIN}")
        progress(shard["bytes"])
    for tokenizer in ("tokenizer", "source_tokenizer"):
        if manifest.get(tokenizer):
            _check_hash(folder / manifest[tokenizer], manifest[f"{tokenizer}_sha256"])
    return manifest


def _check_hash(path: Path, expected: str) -> None:
    found = file_sha256(path) if path.is_file() else "no file"
    if found != expected:
        raise UserError(f"{path}: SHA-256 {expected} expected, found {found}; prepare the data set again")


def check_members(path: Path | str) -> int:
    """Look at every member of a tar of records without unpacking it; gives the number of records.

    Raises:
        UserError: a `pipe:` address, a damaged archive, or a member that could leave its folder, is no regular file,
            could run code when loaded, has a name over 100 characters, or breaks the order of records.
    """
    if re.match(r"\w+:", str(path)):
        raise UserError(f"{path}: a shard must be a file; an address such as pipe: or http: is not allowed")
    keys: set[str] = set()
    names: set[str] = set()
    last = None
    try:
        with Path(path).open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                problem = _member_problem(member)
                key = member.name.rpartition("/")[0] + "/" + member.name.rpartition("/")[2].partition(".")[0]
                if member.name in names:
                    problem = "appears twice"
                elif key != last and key in keys:
                    problem = "stands apart from the other members of its record"
                if problem:
                    raise UserError(f"{path}: member {member.name[:120]!r} {problem}: refused")
                names.add(member.name)
                keys.add(key)
                last = key
            _check_end(Path(path), file, tar)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: damaged tar archive: {error}") from None
    return len(keys)


def _member_problem(member: tarfile.TarInfo) -> str | None:
    name = member.name
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "has an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "leads out of its folder"
    if not member.isreg():
        return "is a link, a device or a folder, not a file"
    if len(name) > NAME_LIMIT:
        return f"has a name of {len(name)} characters, {NAME_LIMIT} are allowed,"
    if name.lower().endswith(REFUSED_SUFFIXES):
        return "can run code when it is loaded"
    return None


def _check_end(path: Path, file: Any, tar: tarfile.TarFile) -> None:
    """A tar ends with zeros; anything after the first block of zeros was hidden by damage."""
    file.seek(tar.offset)
    while block := file.read(2**20):
        if block.strip(b"\0"):
            raise UserError(f"{path}: data after the end mark at byte {tar.offset}; {AGAIN}")
