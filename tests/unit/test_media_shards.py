"""Samples with media in shards: the same bytes come back, other tools can read them, and a foreign tar is refused."""

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_files import encoded, picture

from unroll.data.shards import SampleReader, verify
from unroll.data.writers import MediaWriter, SampleWriter, write_manifest
from unroll.errors import UserError

IMAGE = encoded(picture(), "JPEG")
FRAMES = [encoded(picture(20 + n, 20), kind) for n, kind in enumerate(("JPEG", "PNG", "JPEG"))]


def write(folder: Path, samples: list[dict[str, Any]], shard_bytes: int = 2**20) -> None:
    folder.mkdir(exist_ok=True)
    with MediaWriter(folder, "train", 300, shard_bytes) as writer:
        for number, sample in enumerate(samples):
            writer.write(sample, number + 1)
    write_manifest(folder, {"kind": "samples", "token_bytes": 2, "splits": {"train": writer.summary}})


def sample(media: Any, extension: str, *ids: list[int]) -> dict[str, Any]:
    return {
        "media": media,
        "extension": extension,
        "caption_ids": [np.array(i, np.int64) for i in ids],
        "place": [1, 2],
    }


def read(folder: Path) -> list[dict[str, Any]]:
    reader = SampleReader(folder, "train", keep=1)
    return [reader.sample(shard, i) for shard, count in enumerate(reader.shard_counts) for i in range(count)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = [
        sample(IMAGE, "jpg", [1, 2, 3], [], [299]),
        sample(FRAMES, "frames", [7]),
        sample(b"\0" * 1000, "mp4", [4, 5]),
        sample(IMAGE, "jpg", [9]),
    ]
    write(tmp_path / "out", written, shard_bytes=9000)
    assert len(verify(tmp_path / "out")["splits"]["train"]["shards"]) > 1
    for before, after in zip(written, read(tmp_path / "out"), strict=True):
        assert after["media"] == before["media"]
        assert after["place"] == [1, 2]
        assert [ids.tolist() for ids in after["caption_ids"]] == [ids.tolist() for ids in before["caption_ids"]]
        assert all(ids.dtype == np.int64 for ids in after["caption_ids"])
    reader = SampleReader(tmp_path / "out", "train")
    assert np.concatenate([reader.lengths(s) for s in range(len(reader.shards))]).tolist() == [[1], [2], [3], [4]]


def test_webdataset_reads_the_same_records(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    write(tmp_path / "out", [sample(IMAGE, "jpg", [1]), sample(FRAMES, "frames", [2])])
    records = list(
        webdataset.WebDataset(str(tmp_path / "out" / "train-00000.tar"), shardshuffle=False, empty_check=False)
    )
    assert records[0]["jpg"] == IMAGE
    assert [records[1][name] for name in ("0000.jpg", "0001.png", "0002.jpg")] == FRAMES


def test_samples_without_media_may_hold_lists_of_ids(tmp_path: Path) -> None:
    tmp_path.joinpath("out").mkdir()
    with SampleWriter(tmp_path / "out", "train", 100) as writer:
        writer.write({"id": 0, "several": [np.arange(3), np.arange(0)], "one": np.arange(2), "words": ["a"]}, 3)
    write_manifest(tmp_path / "out", {"kind": "samples", "token_bytes": 2, "splits": {"train": writer.summary}})
    found = read(tmp_path / "out")[0]
    assert [ids.tolist() for ids in found["several"]] == [[0, 1, 2], []]
    assert found["one"].tolist() == [0, 1]
    assert found["words"] == ["a"]


@pytest.mark.parametrize(("media", "extension"), [([], "frames"), (IMAGE, "json"), (IMAGE, "tokens"), (IMAGE, "../x")])
def test_media_that_would_break_a_record_are_refused(tmp_path: Path, media: Any, extension: str) -> None:
    with pytest.raises(ValueError):
        write(tmp_path / "out", [sample(media, extension, [1])])


def forged(folder: Path, change: Any) -> None:
    """Write a data set, change its only shard, and make the manifest agree, as a hostile maker would."""
    write(folder, [sample(IMAGE, "jpg", [1])])
    shard = verify(folder)["splits"]["train"]["shards"][0]
    path = folder / shard["file"]
    path.write_bytes(change(path.read_bytes()))
    entry = {**shard, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    split = {"samples": 1, "tokens": 1, "shards": [entry]}
    write_manifest(folder, {"kind": "samples", "token_bytes": 2, "splits": {"train": split}})


def tar_of(*members: tuple[str, bytes, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind, data in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:600], "byte 0: no plain tar member"),
        (lambda data: b"x" * len(data), "byte 0: no plain tar member"),
        (lambda data: tar_of(("0.jpg", tarfile.SYMTYPE, b"")), "byte 0: no plain tar member"),
        (lambda data: tar_of(("0.jpg", tarfile.REGTYPE, IMAGE)), "record 0 holds no sample"),
        (lambda data: bytes(len(data)), "0 samples found, 1 expected"),
    ],
    ids=["cut", "noise", "link", "no text", "zeros"],
)
def test_a_forged_shard_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    forged(tmp_path / "out", change)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "out")
