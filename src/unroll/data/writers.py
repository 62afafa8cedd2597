"""Writing prepared data: the tar shards of a folder and its manifest (layout: `shards.py`)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from unroll.config import hash_json
from unroll.data.shards import FRAMES, TAR_BLOCK, lengths_name, padded, record_key, token_type
from unroll.data.signatures import image_extension

RECORD_TOKENS = 65536
RECORD_SAMPLES = 256
SHARD_BYTES = 64 * 2**20
MOST_FRAMES = 10_000


class _HashedFile:
    """A file that knows the SHA-256 and size of what was written to it."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class _TarShards:
    """Records in `<split>-00000.tar`, `<split>-00001.tar`, ...; a shard ends before it would pass `shard_bytes`."""

    def __init__(self, folder: Path, split: str, shard_bytes: int) -> None:
        self.folder, self.split, self.shard_bytes = folder, split, shard_bytes
        self.shards: list[dict[str, Any]] = []
        self.records = 0
        self.open_file: _HashedFile | None = None
        self.tar: Any = None
        self.used = 0

    def write(self, members: Mapping[str, bytes], counted: str, count: int) -> None:
        """One record. `counted`: name of the manifest key of the shard that `count` is added to."""
        size = sum(TAR_BLOCK + padded(len(data)) for data in members.values())
        if self.open_file is None or (self.shards[-1]["records"] and self.used + size > self.shard_bytes):
            self._next_shard(counted)
        self.used += size
        self.tar.write({"__key__": record_key(self.records), **members})
        self.records += 1
        self.shards[-1]["records"] += 1
        self.shards[-1][counted] += count

    def _next_shard(self, counted: str) -> None:
        import webdataset  # here, because it takes a second and readers do not need it

        self.close()
        name = f"{self.split}-{len(self.shards):05d}.tar"
        self.open_file, self.used = _HashedFile(self.folder / name), 0
        self.tar = webdataset.TarWriter(
            self.open_file, user="root", group="root", mode=0o444, mtime=0, encoder=False, compress=False
        )
        self.shards.append({"file": name, "records": 0, counted: 0})

    def close(self) -> None:
        """End the shard that is open and note its hash and size."""
        if self.open_file is None:
            return
        self.tar.close()
        self.open_file.close()
        self.shards[-1].update(sha256=self.open_file.hash.hexdigest(), bytes=self.open_file.size)
        self.open_file = None


class StreamWriter:
    """Writes the token ids of one split as a stream; memory is one record.

    Use as a context manager; `summary` afterwards is this split's part of the manifest.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        vocabulary: int,
        record_tokens: int = RECORD_TOKENS,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.vocabulary = vocabulary
        self.tokens = 0
        self._shards = _TarShards(folder, split, shard_bytes)
        self._record = np.empty(record_tokens, token_type(vocabulary))
        self._filled = 0

    def __enter__(self) -> Self:
        return self

    def write(self, ids: np.ndarray) -> None:
        """Append token ids [T].

        Raises:
            ValueError: an id outside the vocabulary.
        """
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            raise ValueError(f"token id outside 0..{self.vocabulary - 1}")
        self.tokens += len(ids)
        while len(ids):
            part = ids[: len(self._record) - self._filled]
            self._record[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            ids = ids[len(part) :]
            if self._filled == len(self._record):
                self._flush()

    def _flush(self) -> None:
        self._shards.write({"tokens": self._record[: self._filled].tobytes()}, "tokens", self._filled)
        self._filled = 0

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self._filled:
            self._flush()
        self._shards.close()

    @property
    def summary(self) -> dict[str, Any]:
        """Tokens and shards, for the manifest."""
        return {"tokens": self.tokens, "shards": self._shards.shards}


class SampleWriter:
    """Writes the samples of one split, many to a record; memory is one record and the lengths of one shard.

    Use as a context manager; `summary` afterwards is this split's part of the manifest.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        vocabulary: int,
        record_samples: int = RECORD_SAMPLES,
        shard_bytes: int = SHARD_BYTES // 4,
    ) -> None:
        self.folder, self.record_samples = folder, record_samples
        self.type = token_type(vocabulary)
        self.samples = self.tokens = 0
        self._shards = _TarShards(folder, split, shard_bytes)
        self._lines: list[str] = []
        self._ids: list[np.ndarray] = []
        self._start = 0
        self._lengths: list[tuple[int, ...]] = []

    def __enter__(self) -> Self:
        return self

    def write(self, sample: Mapping[str, Any], *lengths: int) -> None:
        """Append a sample: integer arrays [T] and lists of them are stored as token ids, everything else as JSON.

        `lengths`, one for each sequence in it, the most important first, is what the plan sorts and cuts batches by,
        in tokens. Every sample gives as many.
        """
        if not lengths or (self._lengths and len(lengths) != len(self._lengths[-1])):
            raise ValueError(f"{len(lengths)} lengths, every sample of a split has the same number of them")
        places: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for field, value in sample.items():
            if isinstance(value, np.ndarray):
                places[field] = self._place(field, value)
            elif isinstance(value, list) and value and all(isinstance(ids, np.ndarray) for ids in value):
                places[field] = [self._place(field, ids) for ids in value]
            else:
                rest[field] = value
        self._lines.append(json.dumps({"json": rest, "tokens": places}, separators=(",", ":")))
        self._lengths.append(lengths)
        if len(self._lines) == self.record_samples:
            self._flush()

    def _place(self, field: str, ids: np.ndarray) -> list[int]:
        """Append ids to the record; [start, count] says where they are in it."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= np.iinfo(self.type).max:
            raise ValueError(f"{field}: a token id does not fit into {self.type}")
        place = [self._start, len(ids)]
        self._start += len(ids)
        self._ids.append(ids.astype(self.type))
        return place

    def _members(self) -> dict[str, bytes]:
        """The members of the record that is full."""
        return {"jsonl": ("\n".join(self._lines) + "\n").encode()}

    def _flush(self) -> None:
        if not self._lines:
            return
        shard = len(self._shards.shards)
        members = {**self._members(), "tokens": b"".join(ids.tobytes() for ids in self._ids)}
        self._shards.write(members, "samples", len(self._lines))
        if len(self._shards.shards) > shard > 0:
            self._write_lengths(shard - 1, self._lengths[: -len(self._lines)])
            self._lengths = self._lengths[-len(self._lines) :]
        self.samples += len(self._lines)
        self.tokens += self._start
        self._lines, self._ids, self._start = [], [], 0

    def _write_lengths(self, shard: int, lengths: Sequence[tuple[int, ...]]) -> None:
        entry = self._shards.shards[shard]
        data = np.asarray(lengths, "<u4").tobytes()
        (self.folder / lengths_name(entry["file"])).write_bytes(data)
        entry["lengths_sha256"] = hashlib.sha256(data).hexdigest()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()
        self._shards.close()
        if kind is None and self._shards.shards:
            self._write_lengths(len(self._shards.shards) - 1, self._lengths)

    @property
    def summary(self) -> dict[str, Any]:
        """Samples, tokens and shards, for the manifest."""
        return {"samples": self.samples, "tokens": self.tokens, "shards": self._shards.shards}


class MediaWriter(SampleWriter):
    """Writes samples with media, one to a record: its encoded bytes are a member that other tools can read, too.

    A sample's `media` are the bytes of an image or clip, or a list of the images of its frames, and `extension` is what
    they are: jpg, png, webp, gif, mp4, avi, ... or frames.
    """

    def __init__(self, folder: Path, split: str, vocabulary: int, shard_bytes: int = SHARD_BYTES // 4) -> None:
        super().__init__(folder, split, vocabulary, 1, shard_bytes)
        self._media: dict[str, bytes] = {}

    def write(self, sample: Mapping[str, Any], *lengths: int) -> None:
        """Append a sample; see `SampleWriter.write`."""
        media, extension = sample["media"], sample["extension"]
        if extension == FRAMES:
            if not 0 < len(media) <= MOST_FRAMES:
                raise ValueError(f"{len(media)} frames, 1 to {MOST_FRAMES} are allowed")
            self._media = {f"{n:04d}.{image_extension(frame) or 'bin'}": frame for n, frame in enumerate(media)}
        elif re.fullmatch(r"[a-z0-9]+", extension) and extension not in ("json", "jsonl", "tokens"):
            self._media = {extension: media}
        else:
            raise ValueError(f"extension {extension!r}")
        super().write({field: value for field, value in sample.items() if field != "media"}, *lengths)

    def _members(self) -> dict[str, bytes]:
        return {**self._media, "json": self._lines[0].encode()}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write `manifest.json` and give its content; `hash` is added over everything else in it."""
    content = {**manifest, "hash": hash_json(manifest)}
    (folder / "manifest.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return content
