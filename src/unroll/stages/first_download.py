"""Sources that nobody here could vouch for: an address in `params.yaml`, and no SHA-256.

Such a source is refused until somebody says `unroll prepare NAME --trust-first-download`. What comes then is hashed, and
the hash goes into `hashes.yaml` beside `params.yaml`, under the address. From then on it counts as if the entry stated
it: each later use, by whomever shares the file, is checked against it. That makes sure that the data stay the same, not
that they were the right ones; a notice says so.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import yaml

from unroll.config import DatasetEntry, Source
from unroll.data.sources import NetworkError, Progress, download
from unroll.errors import UserError
from unroll.files import readable_errors

RECORD = "hashes.yaml"
HEAD = """# SHA-256 of downloads whose makers state none: what came when `unroll prepare NAME --trust-first-download` fetched them.
# Commit this file, so that everybody has the same data. Remove a line to trust the next download instead.
"""


def with_hashes(entry: DatasetEntry, root: Path, name: str, trust: bool, progress: Progress) -> DatasetEntry:
    """The entry with the recorded hash of each source that states an address alone; with `trust` such a source that has
    no record is downloaded and recorded first.

    Raises:
        UserError: no record and no `trust`; a damaged record; a download that failed.
    """
    if not any(_unknown(source) for source in entry.sources):
        return entry
    sources = []
    for source in entry.sources:
        if _unknown(source):
            found = recorded(root).get(str(source.url))
            if found is None and not trust:
                raise UserError(
                    f"datasets.{name}: source {source.file}: no SHA-256 is known of {source.url}; "
                    f"`unroll prepare {name} --trust-first-download` downloads it and records the hash in {RECORD}"
                )
            source = source.model_copy(update={"sha256": found or _download(source, root, progress)})
        sources.append(source)
    return entry.model_copy(update={"sources": sources})


def recorded(root: Path) -> dict[str, str]:
    """Address -> SHA-256.

    Raises:
        UserError: the record is not such a table.
    """
    path = root / RECORD
    if not path.exists():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())[:200]}") from None
    for address, value in found.items() if isinstance(found, dict) else [("", found)]:
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            raise UserError(
                f"{path}: {address}: found {str(value)[:80]!r}, a SHA-256 of 64 hexadecimal digits expected"
            )
    return dict(found)


def _unknown(source: Source) -> bool:
    return source.url is not None and source.sha256 is None


def _download(source: Source, root: Path, progress: Progress) -> str:
    """Fetch a source into data/downloads, record its hash and give it."""
    address = str(source.url)
    if not address.startswith(("http://", "https://")):
        raise UserError(f"source {source.file}: address {address}: http or https is expected")
    found = ""

    def record(sha256: str) -> None:
        nonlocal found
        found = sha256
        _record(root, address, sha256)

    try:
        download(address, source.file, root, progress, record)
    except NetworkError as error:
        raise UserError(f"{address}: {error}") from None
    print(
        f"{address}: SHA-256 {found}, recorded in {RECORD} at this first download; nobody has vouched for it",
        file=sys.stderr,
        flush=True,
    )
    return found


def _record(root: Path, address: str, found: str) -> None:
    path = root / RECORD
    partial = path.with_name(f"{RECORD}.{os.getpid()}.partial")
    lines = yaml.safe_dump({**recorded(root), address: found}, sort_keys=True, width=1000)
    with readable_errors(path):
        partial.write_text(HEAD + lines, encoding="utf-8")
        partial.rename(path)
