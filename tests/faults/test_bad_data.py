"""Damaged, hostile or missing data: one line that names file and place, and nothing that was prepared is lost."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from project import project

from unroll.config import DatasetEntry, Source, hash_json
from unroll.data import shards
from unroll.data.sources import RawFile, locate
from unroll.data.writers import SampleWriter, write_manifest
from unroll.datasets import text
from unroll.errors import UserError
from unroll.stages.predict import predict
from unroll.stages.prepare import prepare as prepare_stage
from unroll.training.context import WorkerContext
from unroll.training.runs import train_one

CONTENT = b"some text\n" * 300
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNROLL_MIRROR", raising=False)


def refused(action: Callable[[], Any], *words: str) -> None:
    """The action ends in a UserError of one line that holds all these words."""
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on this machine; `cut` ends every answer that many bytes early."""

    def __init__(self, folder: Path, cut: int = 0) -> None:
        self.asked: list[str] = []
        self.cut = cut
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        self.server.asked.append(self.path)

    def copyfile(self, source: Any, outputfile: Any) -> None:
        content = source.read()
        outputfile.write(content[: len(content) - self.server.cut])
        self.close_connection = True


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(folder: Path, cut: int = 0) -> Server:
        servers.append(Server(folder, cut))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def put(path: Path, content: bytes = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


SOURCE = Source(file="set/a.txt", sha256=SHA256)


# ---------------------------------------------------------------- sources


def test_a_mirror_by_address_is_used_and_its_files_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., Server]
) -> None:
    put(tmp_path / "mirror" / "set" / "a.txt")
    server = serve(tmp_path / "mirror")
    monkeypatch.setenv("UNROLL_MIRROR", server.address + "/")
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        found = locate(SOURCE, tmp_path / "project", lambda *counts: seen.append(counts))
        assert found == tmp_path / "project" / "data" / "downloads" / "set" / "a.txt"
        assert found.read_bytes() == CONTENT
    assert server.asked == ["/set/a.txt"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_mirror_that_lacks_the_file_or_is_down_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., Server]
) -> None:
    put(tmp_path / "origin" / "a.txt")
    source = Source(file="set/a.txt", sha256=SHA256, url=serve(tmp_path / "origin").address + "/a.txt")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("UNROLL_MIRROR", serve(tmp_path / "empty").address)
    assert locate(source, tmp_path / "one").read_bytes() == CONTENT
    monkeypatch.setenv("UNROLL_MIRROR", "http://127.0.0.1:9")
    assert locate(source, tmp_path / "two").read_bytes() == CONTENT


@pytest.mark.parametrize("cut", [0, 17])
def test_a_wrong_or_partial_download_is_never_left_as_good(
    tmp_path: Path, serve: Callable[..., Server], cut: int
) -> None:
    put(tmp_path / "origin" / "a.txt", CONTENT if cut else b"another text")
    server = serve(tmp_path / "origin", cut)
    source = Source(file="set/a.txt", sha256=SHA256, url=server.address + "/a.txt")
    refused(lambda: locate(source, tmp_path), "/a.txt", "" if cut else f"SHA-256 {SHA256} expected, found ")
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == []


def test_a_damaged_download_is_fetched_again(tmp_path: Path, serve: Callable[..., Server]) -> None:
    put(tmp_path / "origin" / "a.txt")
    kept = put(tmp_path / "data" / "downloads" / "set" / "a.txt", b"damaged")
    server = serve(tmp_path / "origin")
    source = Source(file="set/a.txt", sha256=SHA256, url=server.address + "/a.txt")
    assert locate(source, tmp_path) == kept
    assert kept.read_bytes() == CONTENT


def test_a_wrong_hash_names_file_expected_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "mirror" / "set" / "a.txt", b"another text")
    monkeypatch.setenv("UNROLL_MIRROR", str(tmp_path / "mirror"))
    found = hashlib.sha256(b"another text").hexdigest()
    refused(lambda: locate(SOURCE, tmp_path / "project"), str(path), f"SHA-256 {SHA256} expected, found {found}")


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNROLL_MIRROR", str(tmp_path / "mirror"))
    source = Source(file="set/a.txt", sha256=SHA256, url="http://127.0.0.1:9/a.txt")
    refused(
        lambda: locate(source, tmp_path / "project"),
        "source set/a.txt was not found",
        str(tmp_path / "mirror" / "set" / "a.txt"),
        str(tmp_path / "project" / "data" / "embedded"),
        str(tmp_path / "project" / "data" / "downloads"),
        "http://127.0.0.1:9/a.txt (",
        "set UNROLL_MIRROR to a folder or an http address",
    )


# ---------------------------------------------------------------- text


def entry(file: str, **options: Any) -> DatasetEntry:
    options = {"tokenizer": {"kind": "characters"}, "split": {"train": 0.9, "validation": 0.1}, **options}
    return DatasetEntry(preparer="text", licence="mine", sources=[Source(file=file)], options=options)


def prepare(root: Path, file: str = "my.txt", **options: Any) -> dict[str, Any]:
    return text.prepare(entry(file, **options), "mine", root, root / "out")


def test_a_truncated_archive_names_its_place(tmp_path: Path) -> None:
    packed = gzip.compress(np.random.default_rng(0).bytes(3000).hex().encode())
    put(tmp_path / "my.txt.gz", packed[:-100])
    refused(lambda: prepare(tmp_path, "my.txt.gz"), "my.txt.gz", "damaged archive after ", " unpacked bytes")
    put(tmp_path / "my.txt.gz", packed[:200] + b"\x55" * 50 + packed[250:])
    refused(lambda: prepare(tmp_path, "my.txt.gz"), "my.txt.gz", "damaged archive after ")
    put(tmp_path / "my.txt.gz", CONTENT)
    refused(lambda: prepare(tmp_path, "my.txt.gz"), "my.txt.gz", "damaged archive after 0 unpacked bytes")


@pytest.mark.parametrize("size", [1, 2, 7, 10**6])
@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"abc\xffdef", "byte 3: not UTF-8 (0xff"),
        ("abc\u20ac".encode()[:-1], "byte 3: not UTF-8 (0xe2"),
        (b"ab\xe2\x82def", "byte 2: not UTF-8 (0xe2"),
        ("\u20ac".encode() * 7 + b"\x80", "byte 21: not UTF-8 (0x80"),
    ],
)
def test_text_that_is_not_utf8_names_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, content: bytes, place: str
) -> None:
    monkeypatch.setattr("unroll.data.sources.PIECE_BYTES", size)
    path = put(tmp_path / "my.txt", content)
    refused(lambda: list(RawFile(path).text()), f"{path}: {place}")


@pytest.mark.parametrize("kind", ["bytes", "characters", "words", "bpe"])
def test_every_tokenizer_passes_the_error_on(tmp_path: Path, kind: str) -> None:
    path = put(tmp_path / "my.txt", CONTENT + b"\xff")
    options = {"tokenizer": {"kind": kind}}
    sources = [Source(file="my.txt", split="train")]
    bad = DatasetEntry(preparer="text", licence="mine", sources=sources, options=options)
    refused(lambda: text.prepare(bad, "mine", tmp_path, tmp_path / "out"), f"{path}: byte {len(CONTENT)}: not UTF-8")


@pytest.mark.parametrize(
    ("content", "kind", "split"),
    [
        (b"", "characters", "train"),
        (b"a", "characters", "train"),
        (b"a", "bpe", "train"),
        (b"a \n" * 9 + b"   ", "words", "validation"),
    ],
)
def test_an_empty_split_is_named(tmp_path: Path, content: bytes, kind: str, split: str) -> None:
    put(tmp_path / "my.txt", content)
    refused(
        lambda: prepare(tmp_path, tokenizer={"kind": kind}),
        f"params.yaml: datasets.mine: split {split!r} is empty",
        str(tmp_path / "my.txt"),
    )


def test_a_failed_prepare_leaves_what_was_prepared(tmp_path: Path) -> None:
    put(tmp_path / "my.txt", CONTENT)
    before = prepare(tmp_path)
    put(tmp_path / "my.txt", CONTENT + b"\xff")
    refused(lambda: prepare(tmp_path), "my.txt", f"byte {len(CONTENT)}")
    assert shards.verify(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.txt", "out"]


def test_a_copy_with_other_content_is_found_out(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt")
    source = Source(file="a.txt", sha256=SHA256, content_sha256="0" * 64)
    options = {"tokenizer": {"kind": "bytes"}, "split": {"train": 1.0}}
    bad = DatasetEntry(preparer="text", licence="mine", sources=[source], options=options)
    refused(lambda: text.prepare(bad, "mine", tmp_path, tmp_path / "out"), str(path), f"{'0' * 64} expected, found")


# ---------------------------------------------------------------- shards


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    put(tmp_path / "my.txt")
    prepare(tmp_path, record_tokens=500)
    return tmp_path / "out"


@pytest.mark.parametrize("place", [5, 700, -1])
@pytest.mark.parametrize("file", ["train-00000.tar", "validation-00000.tar", "tokenizer.json", "manifest.json"])
def test_one_flipped_byte_is_found_and_its_file_named(prepared: Path, file: str, place: int) -> None:
    content = bytearray((prepared / file).read_bytes())
    content[min(place, len(content) - 2)] ^= 1
    (prepared / file).write_bytes(content)
    refused(lambda: shards.verify(prepared), str(prepared / file))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_neither_training_nor_scoring_goes_on_with_a_flipped_byte(tmp_path: Path, split: str) -> None:
    """A stream is read at any place, so that no reader of it could tell."""
    recipe, place = project(tmp_path, train={"steps": 2})
    train_one(recipe, 1, place, WorkerContext())
    shard = place.data("own") / f"{split}-00000.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1  # within the vocabulary
    shard.write_bytes(content)
    refused(lambda: train_one(recipe, 1, place, WorkerContext()), str(shard), "SHA-256")
    refused(lambda: predict(tmp_path, "small"), str(shard), "SHA-256")


def test_a_shard_that_is_short_or_missing_is_named_at_once(prepared: Path) -> None:
    shard = prepared / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    refused(lambda: shards.TokenStream(prepared, "train"), str(shard), "bytes found")
    shard.unlink()
    refused(lambda: shards.TokenStream(prepared, "train"), str(shard), "no such file")


def test_damage_that_keeps_the_size_is_found_when_a_record_is_touched(prepared: Path) -> None:
    shard = prepared / "train-00000.tar"
    stream = shards.TokenStream(prepared, "train")
    content = bytearray(shard.read_bytes())
    content[1536 : 1536 + 512] = bytes(512)
    shard.write_bytes(content)
    assert len(stream.read(0, 500)) == 500
    refused(lambda: stream.read(0, 501), str(shard), "byte 1536", "000000001.tokens")


def test_a_split_that_is_not_there_is_named(prepared: Path) -> None:
    refused(lambda: shards.TokenStream(prepared, "test"), "manifest.json", "'test'", "train, validation")
    refused(lambda: shards.SampleReader(prepared, "train"), "manifest.json", "'stream'", "'samples'")
    refused(lambda: shards.load_manifest(prepared / "x"), str(prepared / "x" / "manifest.json"), "no such file")


@pytest.mark.parametrize("name", ["../train-00000.tar", "/etc/passwd", "pipe:cat x.tar", "a/b.tar", ".tar"])
def test_a_manifest_cannot_name_files_elsewhere(prepared: Path, name: str) -> None:
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = name
    del manifest["hash"]
    path.write_text(json.dumps({**manifest, "hash": hash_json(manifest)}))
    refused(lambda: shards.verify(prepared), str(path), repr(name))


def test_damaged_samples_are_named(tmp_path: Path) -> None:
    with SampleWriter(tmp_path, "train", 100) as writer:
        writer.write({"ids": np.arange(50)}, 50)
    write_manifest(tmp_path, {"kind": "samples", "token_bytes": 2, "splits": {"train": writer.summary}})
    shard, lengths = tmp_path / "train-00000.tar", tmp_path / "train-00000.lengths"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    lengths.write_bytes(b"\1\0\0\0")
    reader = shards.SampleReader(tmp_path, "train")
    refused(lambda: reader.sample(0, 0), str(shard), "SHA-256")
    refused(lambda: reader.lengths(0), str(lengths))


Member = tuple[str, bytes]  # name and tar type


def archive(path: Path, members: list[Member]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"abc") if member.size else None)
    return path


def regular(*names: str) -> list[Member]:
    return [(name, tarfile.REGTYPE) for name in names]


HOSTILE = {
    "parent": (regular("0.txt", "../1.txt"), "../1.txt", "leads out of its folder"),
    "inner parent": (regular("a/../../1.txt"), "a/../../1.txt", "leads out of its folder"),
    "backslash": (regular("a\\..\\1.txt"), "1.txt", "leads out of its folder"),
    "absolute": (regular("/etc/cron.d/x"), "/etc/cron.d/x", "absolute path"),
    "drive": (regular("C:/x.txt"), "C:/x.txt", "absolute path"),
    "symbolic link": ([("0.txt", tarfile.SYMTYPE)], "0.txt", "link"),
    "hard link": ([("0.txt", tarfile.LNKTYPE)], "0.txt", "link"),
    "device": ([("0.txt", tarfile.CHRTYPE)], "0.txt", "device"),
    "pipe": ([("0.txt", tarfile.FIFOTYPE)], "0.txt", "not a file"),
    "pkl": (regular("0.pkl"), "0.pkl", "can run code"),
    "pickle": (regular("0.x.pickle"), "0.x.pickle", "can run code"),
    "pth": (regular("0.PTH"), "0.PTH", "can run code"),
    "pyd": (regular("0.pyd"), "0.pyd", "can run code"),
    "twice": (regular("0.txt", "0.txt"), "0.txt", "appears twice"),
    "interleaved": (regular("0.txt", "1.txt", "0.json"), "0.json", "stands apart"),
    "long": (regular("0." + "x" * 99), "0.xxx", "101 characters"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members_are_refused(tmp_path: Path, case: str) -> None:
    members, name, reason = HOSTILE[case]
    path = archive(tmp_path / "x.tar", members)
    refused(lambda: shards.check_members(path), str(path), f"{name}"[:60], reason, "refused")


def test_good_members_are_counted(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.tar", regular("a/0.txt", "a/0.json", "a/1.txt", "b/0.txt"))
    assert shards.check_members(path) == 3


@pytest.mark.parametrize("address", ["pipe:cat x.tar", "http://127.0.0.1/x.tar", "file:x.tar"])
def test_shards_are_never_addresses(address: str) -> None:
    refused(lambda: shards.check_members(address), address, "a shard must be a file")


def test_a_tar_with_a_hole_or_an_end_missing_is_named(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.tar", regular(*(f"{i}.txt" for i in range(20))))
    content = path.read_bytes()
    path.write_bytes(content[:2048] + bytes(2048) + content[4096:])
    refused(lambda: shards.check_members(path), str(path), "data after the end mark at byte")
    path.write_bytes(content[: 1024 * 5 + 300])
    refused(lambda: shards.check_members(path), str(path))
    path.write_bytes(b"no tar at all" * 100)
    refused(lambda: shards.check_members(path), str(path), "damaged tar archive")


# ---------------------------------------------------------------- addresses without a known hash


def addressed(root: Path, address: str) -> Path:
    """A project with one data set, of which only the address is known."""
    root.mkdir(exist_ok=True)
    (root / "params.yaml").write_text(f"""
datasets:
  far:
    preparer: text
    licence: none
    sources: [{{file: far/a.txt, url: "{address}"}}]
    options: {{tokenizer: {{kind: characters}}, split: {{train: 0.8, validation: 0.2}}}}
""")
    return root


def test_an_unknown_download_is_recorded_once_it_is_trusted_and_checked_ever_after(
    tmp_path: Path, serve: Callable[..., Server], capsys: pytest.CaptureFixture[str]
) -> None:
    far = put(tmp_path / "origin" / "a.txt")
    server = serve(tmp_path / "origin")
    address = f"{server.address}/a.txt"
    root = addressed(tmp_path / "project", address)
    refused(lambda: prepare_stage(root, "far"), address, "`unroll prepare far --trust-first-download`", "hashes.yaml")
    assert server.asked == []

    prepare_stage(root, "far", trust_first_download=True)
    assert yaml.safe_load((root / "hashes.yaml").read_text()) == {address: SHA256}
    assert f"{address}: SHA-256 {SHA256}, recorded in hashes.yaml" in capsys.readouterr().err
    prepare_stage(root, "far")
    prepare_stage(root, "far", trust_first_download=True)
    assert server.asked == ["/a.txt"]

    (root / "data" / "downloads" / "far" / "a.txt").unlink()
    far.write_bytes(b"another text\n")
    refused(lambda: prepare_stage(root, "far", trust_first_download=True), f"SHA-256 {SHA256} expected, found ")


def test_half_a_first_download_is_neither_kept_nor_recorded(tmp_path: Path, serve: Callable[..., Server]) -> None:
    put(tmp_path / "origin" / "a.txt")
    root = addressed(tmp_path / "project", f"{serve(tmp_path / 'origin', cut=17).address}/a.txt")
    refused(lambda: prepare_stage(root, "far", trust_first_download=True), "/a.txt")
    root = addressed(root, "http://127.0.0.1:9/a.txt")
    refused(lambda: prepare_stage(root, "far", trust_first_download=True), "http://127.0.0.1:9/a.txt")
    root = addressed(root, (tmp_path / "origin" / "a.txt").as_uri())
    refused(lambda: prepare_stage(root, "far", trust_first_download=True), "http or https is expected")
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["params.yaml"]


@pytest.mark.parametrize("content", ["- a list", "http://a: not a hash", "{", "\0"])
def test_a_damaged_record_of_hashes_is_named(tmp_path: Path, content: str) -> None:
    root = addressed(tmp_path / "project", "http://127.0.0.1:9/a.txt")
    (root / "hashes.yaml").write_text(content)
    refused(lambda: prepare_stage(root, "far"), str(root / "hashes.yaml"))
