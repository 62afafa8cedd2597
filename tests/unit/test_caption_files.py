"""Captioned photographs and clips as their authors hand them out: every layout ends in the same samples."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_files import clip, encoded, grey_steps, picture

from unroll.config import DatasetEntry, Source
from unroll.data import tokenizers
from unroll.data.captions import CaptionWriter, caption_words, clean_caption
from unroll.data.media import decode_clip, decode_image
from unroll.data.shards import SampleReader, verify
from unroll.datasets import image_captions, video_captions
from unroll.errors import UserError

IMAGES = {f"{n}.jpg": encoded(picture(40 + n, 30), "JPEG") for n in range(6)}
SPLITS = {"0.jpg": "train", "1.jpg": "train", "2.jpg": "train", "3.jpg": "val", "4.jpg": "test", "5.jpg": "test"}
CAPTIONS = {name: [f"Picture {n} is wide .", f"A picture, number {n}!"] for n, name in enumerate(IMAGES)}


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def prepare(root: Path, sources: list[Any], preparer: Any = image_captions, **options: Any) -> dict[str, Any]:
    """`sources`: paths under root, or (path, split)."""
    listed = [(s, None) if isinstance(s, Path) else s for s in sources]
    entry = DatasetEntry(
        preparer=preparer.__name__.rpartition(".")[2],
        licence="own",
        sources=[Source(file=str(path.relative_to(root)), split=split) for path, split in listed],
        options={"layout": "jsonl", **options},
    )
    return preparer.prepare(entry, "set", root, root / "out")


def samples(root: Path, split: str) -> list[dict[str, Any]]:
    reader = SampleReader(root / "out", split)
    return [reader.sample(shard, i) for shard, count in enumerate(reader.shard_counts) for i in range(count)]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def jsonl(root: Path, rows: list[dict[str, Any]]) -> Path:
    return write(root / "captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def rows() -> list[dict[str, Any]]:
    return [{"image": name, "split": SPLITS[name], "captions": CAPTIONS[name]} for name in IMAGES]


def layouts(root: Path) -> dict[str, list[Any]]:
    """The same data set in every layout for images: {layout: text sources}."""
    numbered = [(name, text) for name in IMAGES for text in CAPTIONS[name]]
    karpathy = {
        "images": [
            {"filename": name, "split": SPLITS[name], "sentences": [{"raw": text} for text in CAPTIONS[name]]}
            for name in IMAGES
        ]
    }
    coco = {}
    for split in ("train", "val", "test"):
        names = [name for name in IMAGES if SPLITS[name] == split]
        said = [(name, text) for name, text in numbered if name in names]
        content = {
            "images": [{"id": 100 + int(name[0]), "file_name": name} for name in names],
            "annotations": [{"image_id": 100 + int(name[0]), "caption": text} for name, text in said],
        }
        coco[split] = (write(root / f"captions_{split}.json", json.dumps(content)), split)
    lists = [
        (write(root / f"{split}.txt", "".join(f"{n}\n" for n in IMAGES if SPLITS[n] == split)), split)
        for split in ("train", "val", "test")
    ]
    token = write(
        root / "Flickr.token.txt", "".join(f"{name}#{i}\t{text}\n" for i, (name, text) in enumerate(numbered))
    )
    return {
        "jsonl": [jsonl(root, rows())],
        "karpathy": [write(root / "dataset.json", json.dumps(karpathy))],
        "coco": list(coco.values()),
        "flickr": [token, *lists],
    }


@pytest.mark.parametrize("layout", ["jsonl", "karpathy", "coco", "flickr"])
@pytest.mark.parametrize("archive", ["images.tar", "images.tgz", "images.zip"])
def test_every_layout_and_archive_gives_the_same_samples(tmp_path: Path, layout: str, archive: str) -> None:
    pack = zipped if archive.endswith("zip") else tar
    media = pack(tmp_path / archive, {f"folder/inner/{name}": data for name, data in IMAGES.items()})
    prepared = prepare(tmp_path, [media, *layouts(tmp_path)[layout]], layout=layout)
    assert verify(tmp_path / "out") == prepared
    assert {split: entry["samples"] for split, entry in prepared["splits"].items()} == {
        "train": 3,
        "validation": 1,
        "test": 2,
    }
    tokenizer = tokenizers.load(tmp_path / "out/tokenizer.json")
    for number, sample in enumerate(samples(tmp_path, "test")):
        name = sample["key"]
        assert sample["id"] == number
        assert sample["media"] == IMAGES[name]  # as it came, not encoded again
        assert sample["captions"] == CAPTIONS[name]
        words = [caption_words(text).split() for text in CAPTIONS[name]]
        known = [[word if word in tokenizer.words else "<unk>" for word in text] for text in words]
        assert [tokenizer.decode(ids).split() for ids in sample["caption_ids"]] == known
    assert not any(prepared["skipped"].values())


def test_only_training_captions_teach_words(tmp_path: Path) -> None:
    prepare(tmp_path, [tar(tmp_path / "a.tar", IMAGES), jsonl(tmp_path, rows())])
    words = tokenizers.load(tmp_path / "out/tokenizer.json").content()["words"]
    assert {"0", "1", "2"} <= set(words)
    assert not {"3", "4", "5"} & set(words)


def test_a_split_by_names_keeps_an_image_where_it_is(tmp_path: Path) -> None:
    unsplit = [{key: value for key, value in row.items() if key != "split"} for row in rows()]
    sources = [tar(tmp_path / "a.tar", IMAGES), jsonl(tmp_path, unsplit)]
    split = {"train": 0.5, "test": 0.5}
    with pytest.raises(UserError, match=r"line 1: 0.jpg is in no split; give options.split"):
        prepare(tmp_path, sources)
    one = prepare(tmp_path, sources, split=split)
    first = {s["key"] for s in samples(tmp_path, "train")}
    assert prepare(tmp_path, sources, split=split) == one
    assert first == {s["key"] for s in samples(tmp_path, "train")}
    assert 0 < len(first) < 6


def test_larger_images_are_shrunk_on_request(tmp_path: Path) -> None:
    big = {"0.jpg": encoded(picture(400, 200), "JPEG"), "1.jpg": encoded(picture(60, 50), "JPEG")}
    said = [{"image": name, "split": "train", "captions": ["a"]} for name in big]
    prepare(tmp_path, [tar(tmp_path / "a.tar", big), jsonl(tmp_path, said)], shorter_side=64)
    shapes = [decode_image(sample["media"], "image").shape for sample in samples(tmp_path, "train")]
    assert shapes == [(64, 128, 3), (50, 60, 3)]


def test_many_images_go_to_many_shards_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CaptionWriter.__init__, "__defaults__", (4000,))
    prepare(tmp_path, [tar(tmp_path / "a.tar", IMAGES), jsonl(tmp_path, rows())])
    reader = SampleReader(tmp_path / "out", "train")
    assert len(reader.shards) > 1
    assert {s["key"]: s["media"] for s in samples(tmp_path, "train")} == {
        name: data for name, data in IMAGES.items() if SPLITS[name] == "train"
    }
    lengths = np.concatenate([reader.lengths(shard) for shard in range(len(reader.shards))])
    assert lengths.tolist() == [[5]] * 3


# ---------------------------------------------------------------- clips


CLIPS = {f"video{n}": clip(grey_steps([20 * n + 10 * i for i in range(6)])) for n in range(3)}


def test_clips_are_found_by_their_names_without_extension(tmp_path: Path) -> None:
    media = zipped(tmp_path / "TrainValVideo.zip", {f"TrainValVideo/{name}.mp4": data for name, data in CLIPS.items()})
    content = {
        "videos": [{"video_id": f"video{n}", "split": split} for n, split in enumerate(["train", "validate", "test"])],
        "sentences": [{"video_id": f"video{n}", "caption": f"clip {n}", "sen_id": n} for n in (0, 1, 2, 0)],
    }
    said = write(tmp_path / "videodatainfo.json", json.dumps(content))
    prepared = prepare(tmp_path, [media, said], video_captions, layout="msrvtt")
    assert prepared["media"] == "clip"
    assert {split: entry["captions"] for split, entry in prepared["splits"].items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    sample = samples(tmp_path, "test")[0]
    assert (sample["key"], sample["extension"], sample["media"]) == ("video2", "mp4", CLIPS["video2"])


def test_the_layout_of_msvd(tmp_path: Path) -> None:
    files = [tmp_path / f"video{n}.avi" for n in range(3)]
    for path in files:
        path.write_bytes(CLIPS[path.stem])
    text = "# a comment\nvideo0 a man sings\nvideo0 someone sings\nvideo1 a dog\nvideo2 a cat\nvideo9 in no list\n"
    said = write(tmp_path / "AllVideoDescriptions.txt", text)
    lists = [
        (write(tmp_path / f"{split}_list.txt", f"video{n}.avi\n"), split) for n, split in ((0, "train"), (1, "test"))
    ]
    prepared = prepare(tmp_path, [*files, said, *lists], video_captions, layout="msvd")
    assert {split: entry["samples"] for split, entry in prepared["splits"].items()} == {"train": 1, "test": 1}
    assert samples(tmp_path, "train")[0]["captions"] == ["a man sings", "someone sings"]
    assert samples(tmp_path, "train")[0]["extension"] == "mp4"  # whatever its name says
    assert prepared["unused_media"] == 1


def test_folders_of_frames_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    frames = {f"frames/{c}/{n}.jpg": encoded(grey_steps([20 * n])[0], "JPEG") for c in "ab" for n in (9, 10, 2, 0)}
    said = jsonl(tmp_path, [{"clip": c, "video": "x", "split": "train", "captions": [c]} for c in "ab"])
    prepare(tmp_path, [tar(tmp_path / "frames.tar", frames), said], video_captions, input="frames")
    for sample in samples(tmp_path, "train"):
        assert sample["extension"] == "frames"
        assert sample["media"] == [frames[f"frames/{sample['key']}/{n}.jpg"] for n in (0, 2, 9, 10)]


def test_clips_can_be_stored_as_frames(tmp_path: Path) -> None:
    media = zipped(tmp_path / "a.zip", {f"{name}.mp4": data for name, data in CLIPS.items()})
    said = jsonl(tmp_path, [{"video": name, "split": "train", "captions": ["a"]} for name in CLIPS])
    prepare(tmp_path, [media, said], video_captions, frames=3, side=16)
    for sample in samples(tmp_path, "train"):
        assert len(sample["media"]) == 3
        expected = decode_clip(CLIPS[sample["key"]], 3, 16, "clip").mean((1, 2, 3))
        assert np.allclose(decode_clip(sample["media"], 3, 16, "frames").mean((1, 2, 3)), expected, atol=3)


def test_captions_are_cleaned_and_split_into_words() -> None:
    assert clean_caption(" a\r\nb\t|||c || d||||\u2028e ") == "a b c || d e"
    assert caption_words("It's a well-kept, GREEN park . <eos>") == "it's a well-kept green park eos"
    assert caption_words("—!?") == ""
