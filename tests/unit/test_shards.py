"""Prepared data must come back exactly as it was written, from any place, and be the same bytes for the same input."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unroll.data import shards
from unroll.data.shards import SampleReader, TokenStream
from unroll.data.writers import SampleWriter, StreamWriter, write_manifest


def write_stream(folder: Path, ids: np.ndarray, vocabulary: int = 300, shard_bytes: int = 2000) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    with StreamWriter(folder, "train", vocabulary, record_tokens=100, shard_bytes=shard_bytes) as writer:
        for part in np.array_split(ids, 7):
            writer.write(part)
    manifest = {
        "kind": "stream",
        "token_bytes": shards.token_type(vocabulary).itemsize,
        "record_tokens": 100,
        "splits": {"train": writer.summary},
    }
    return write_manifest(folder, manifest)


def write_samples(folder: Path, samples: list[dict[str, Any]], shard_bytes: int = 6000) -> None:
    with SampleWriter(folder, "train", 300, record_samples=8, shard_bytes=shard_bytes) as writer:
        for sample in samples:
            writer.write(sample, len(sample["source"]))
    write_manifest(folder, {"kind": "samples", "token_bytes": 2, "splits": {"train": writer.summary}})


def some_samples(count: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(1)
    return [
        {
            "source": generator.integers(0, 300, generator.integers(0, 20)),
            "target": generator.integers(0, 300, 5),
            "text": f"sentence {i} \u00e9\u2028\n",
        }
        for i in range(count)
    ]


def test_any_part_of_a_stream_can_be_read(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 300, 3456)
    manifest = write_stream(tmp_path, ids)
    assert len(manifest["splits"]["train"]["shards"]) > 3
    stream = TokenStream(tmp_path, "train")
    assert stream.tokens == len(ids)
    for start, count in [(0, 3456), (0, 1), (99, 2), (250, 1000), (3455, 1), (3456, 0)]:
        found = stream.read(start, count)
        assert found.dtype == np.int64
        assert found.tolist() == ids[start : start + count].tolist()
    assert np.concatenate(list(stream.chunks(333))).tolist() == ids.tolist()
    for start, count in [(-1, 2), (3456, 1), (0, 3457)]:
        with pytest.raises(IndexError):
            stream.read(start, count)
    stream.close()
    assert stream.read(5, 3).tolist() == ids[5:8].tolist()


@pytest.mark.parametrize(("vocabulary", "size"), [(65535, 2), (65536, 4)])
def test_large_vocabularies_take_four_bytes(tmp_path: Path, vocabulary: int, size: int) -> None:
    ids = np.array([0, 1, vocabulary - 1])
    assert write_stream(tmp_path, ids, vocabulary)["token_bytes"] == size
    assert TokenStream(tmp_path, "train").read(0, 3).tolist() == ids.tolist()


def test_an_id_outside_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.299"):
        write_stream(tmp_path, np.array([5, 300]))


def test_few_open_files_are_enough_for_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(3456) % 300
    write_stream(tmp_path, ids)
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    stream = TokenStream(tmp_path, "train")
    assert stream.read(0, 3456).tolist() == ids.tolist()
    assert stream.read(100, 50).tolist() == ids[100:150].tolist()
    assert len(stream._files) <= 2


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    ids = np.arange(3000) % 300
    one, two = (write_stream(tmp_path / name, ids) for name in "ab")
    assert one == two
    for shard in one["splits"]["train"]["shards"]:
        data = (tmp_path / "a" / shard["file"]).read_bytes()
        assert data == (tmp_path / "b" / shard["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]


def test_other_tools_can_read_the_shards(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    ids = np.arange(1050) % 300
    manifest = write_stream(tmp_path, ids)
    paths = [str(tmp_path / shard["file"]) for shard in manifest["splits"]["train"]["shards"]]
    records = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [record["__key__"] for record in records] == [f"{i:09d}" for i in range(11)]
    assert np.frombuffer(b"".join(record["tokens"] for record in records), "<u2").tolist() == ids.tolist()


@pytest.mark.parametrize("shard_bytes", [4000, 10**6])
def test_samples_come_back_as_they_were_written(tmp_path: Path, shard_bytes: int) -> None:
    samples = some_samples(100)
    write_samples(tmp_path, samples, shard_bytes)
    reader = SampleReader(tmp_path, "train", keep=2)
    assert sum(reader.shard_counts) == reader.samples == 100
    places = [(shard, i) for shard, count in enumerate(reader.shard_counts) for i in range(count)]
    lengths = np.concatenate([reader.lengths(shard) for shard in range(len(reader.shard_counts))])
    assert lengths[:, 0].tolist() == [len(sample["source"]) for sample in samples]
    for place, expected in [*zip(places, samples, strict=True), (places[0], samples[0])]:
        found = reader.sample(*place)
        assert found.keys() == expected.keys()
        assert found["text"] == expected["text"]
        assert found["source"].tolist() == expected["source"].tolist()
        assert found["target"].tolist() == expected["target"].tolist()
    assert len(reader._loaded) <= 2
    shards.verify(tmp_path)
