"""Generated scenes: the share of right captions means nothing if test combinations were trained on, or truth is wrong."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unroll.config import DatasetEntry, Source
from unroll.data import tokenizers
from unroll.data.captions import caption_words
from unroll.data.media import decode_clip, decode_image
from unroll.data.shards import SampleReader, verify
from unroll.datasets import drawn_scenes
from unroll.errors import UserError

SAMPLES = {"train": 300, "validation": 30, "test": 40}


def prepare(out: Path, sources: list[Source] | None = None, **options: Any) -> dict[str, Any]:
    entry = DatasetEntry(
        preparer="drawn_scenes", licence="none", sources=sources or [], options={"samples": SAMPLES, **options}
    )
    return drawn_scenes.prepare(entry, "scenes", out.parent, out)


def samples(out: Path, split: str) -> list[dict[str, Any]]:
    reader = SampleReader(out, split)
    return [reader.sample(0, i) for i in range(reader.samples)]


CLIPS = {"media": "clip", "samples": {"train": 40, "validation": 10, "test": 12}, "frames": 8}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images") / "out"
    prepare(out)
    return out


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clips") / "out"
    prepare(out, **CLIPS)
    return out


def pairs(sample: dict[str, Any]) -> list[tuple[str, str]]:
    return [(thing["colour"], thing["shape"]) for thing in sample["truth"]["objects"]]


def test_a_sample_is_an_encoded_image_with_all_its_captions(images: Path) -> None:
    manifest = verify(images)
    tokenizer = tokenizers.load(images / "tokenizer.json")
    assert manifest["vocabulary"] == tokenizer.vocabulary_size + 2
    reader = SampleReader(images, "test")
    lengths = reader.lengths(0)
    for number, sample in enumerate(samples(images, "test")):
        assert sample["id"] == number
        assert sample["extension"] == "jpg"
        assert Image.open(io.BytesIO(sample["media"])).format == "JPEG"
        assert decode_image(sample["media"], "test").shape == (64, 64, 3)
        assert len(sample["captions"]) == len(sample["caption_ids"]) == len(set(sample["captions"])) == 5
        for text, ids in zip(sample["captions"], sample["caption_ids"], strict=True):
            assert ids.dtype == np.int64
            assert tokenizer.decode(ids) == caption_words(text) == text  # no word of test is unknown
        assert lengths[number].tolist() == [max(map(len, sample["caption_ids"])) + 1]


def test_a_clip_is_an_encoded_video_of_the_frames_asked_for(clips: Path) -> None:
    assert verify(clips)["media"] == "clip"
    for sample in samples(clips, "test"):
        assert sample["extension"] == "mp4"
        assert len(sample["truth"]["boxes"]) == 8
        assert decode_clip(sample["media"], 4, 64, "test").shape == (4, 64, 64, 3)


@pytest.mark.parametrize("media", ["image", "clip"])
@pytest.mark.parametrize("unseen", ["pair", "relation"])
def test_combinations_of_test_and_validation_are_not_in_training(media: str, unseen: str) -> None:
    options = drawn_scenes.Options.model_validate({"media": media, "unseen": unseen, "samples": SAMPLES})

    def combinations(scene: drawn_scenes.Scene) -> list[tuple[str, ...]]:
        links = [scene.link, drawn_scenes.OPPOSITE.get(scene.link, "still")]
        both = zip(scene.things, links, strict=True)
        return [(t.colour, t.shape) + ((link,) if unseen == "relation" else ()) for t, link in both]

    drawn = {split: list(drawn_scenes.scenes(split, options)) for split in SAMPLES}
    trained = {c for scene in drawn["train"] for c in combinations(scene)}
    for split in ("validation", "test"):
        for scene in drawn[split]:
            new = [number for number, c in enumerate(combinations(scene)) if c not in trained]
            assert set(scene.unseen) <= set(new)
            assert scene.unseen
    held = [{combinations(s)[n] for s in drawn[split] for n in s.unseen} for split in ("validation", "test")]
    assert not held[0] & held[1]
    if unseen == "pair":  # every colour and every shape of a test scene is well known by itself
        for part in (0, 1):
            assert {c[part] for c in held[1]} <= {c[part] for c in trained}


def test_boxes_hold_the_colour_that_is_stated(images: Path) -> None:
    """The middle of a filled shape has its colour, what is far from both boxes is the bright ground."""
    for sample in samples(images, "test"):
        pixels = decode_image(sample["media"], "test").astype(int)
        free = np.ones((64, 64), bool)
        for thing in sample["truth"]["objects"]:
            left, top, right, bottom = (round(64 * edge) for edge in thing["box"])
            assert 0 <= left < right <= 64
            assert 0 <= top < bottom <= 64
            free[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = False
            middle = pixels[(top + bottom) // 2, (left + right) // 2]
            if thing["shape"] != "ring":
                assert np.abs(middle - drawn_scenes.COLOURS[thing["colour"]]).max() < 50, thing
        assert pixels[free].min() > 150


def test_relations_hold_between_the_boxes(images: Path) -> None:
    for split in SAMPLES:
        for sample in samples(images, split):
            first, second = (thing["box"] for thing in sample["truth"]["objects"])
            name = sample["truth"]["relation"]["name"]
            holds = {
                "left of": first[2] < second[0],
                "right of": first[0] > second[2],
                "above": first[3] < second[1],
                "below": first[1] > second[3],
            }
            assert [relation for relation, true in holds.items() if true] == [name]


def test_motions_are_those_of_the_boxes(clips: Path) -> None:
    seen = set()
    for sample in samples(clips, "train"):
        boxes = np.array(sample["truth"]["boxes"])
        moved = (boxes[-1] - boxes[0]).round(3)
        name = sample["truth"]["motion"]["name"]
        seen.add(name)
        grown = moved[2] - moved[0]
        expected = {
            "left to right": moved[0] > 0.3 and moved[1] == 0,
            "right to left": moved[0] < -0.3 and moved[1] == 0,
            "up": moved[1] < -0.3 and moved[0] == 0,
            "down": moved[1] > 0.3 and moved[0] == 0,
            "grow": grown > 0.1,
            "shrink": grown < -0.1,
            "bounce": np.ptp(boxes[:, 1]) > 0.3 and abs(moved).max() < 0.01,
        }
        assert [motion for motion, true in expected.items() if true] == [name]
    assert seen == set(drawn_scenes.MOTIONS)


def stated(caption: str, lexicon: dict[str, list[str]]) -> list[tuple[str, str]]:
    """What a caption says, in its order: (kind, name)."""
    found, rest = [], caption
    while rest:
        for phrase, (kind, name) in lexicon.items():
            if f"{rest} ".startswith(f"{phrase} "):
                found.append((kind, name))
                rest = rest[len(phrase) :].lstrip()
                break
        else:
            rest = rest.partition(" ")[2]
    return found


def test_captions_state_what_is_in_the_picture(images: Path, clips: Path) -> None:
    for folder in (images, clips):
        lexicon = verify(folder)["lexicon"]
        for sample in samples(folder, "train")[:100]:
            things = sample["truth"]["objects"]
            for caption in sample["captions"]:
                said = stated(caption, lexicon)
                colours = [name for kind, name in said if kind == "colour"]
                shapes = [name for kind, name in said if kind == "shape"]
                order = [[thing["colour"] for thing in things].index(colour) for colour in colours]
                assert sorted(order) == [0, 1], caption
                assert shapes == [things[number]["shape"] for number in order], caption
                links = [(place, name) for place, (kind, name) in enumerate(said) if kind in ("relation", "motion")]
                assert len(links) == 1, caption
                place, name = links[0]
                if folder == clips:
                    before = [order[[n for n, s in enumerate(said) if s[0] == "shape"].index(n)]
                              for n, s in enumerate(said[:place]) if s[0] == "shape"]  # fmt: skip
                    assert (name, before[-1]) == (sample["truth"]["motion"]["name"], 0), caption
                else:
                    expected = sample["truth"]["relation"]["name"]
                    assert name == (expected if order == [0, 1] else drawn_scenes.OPPOSITE[expected]), caption


@pytest.mark.parametrize("options", [{}, CLIPS])
def test_a_seed_decides_everything(tmp_path: Path, options: dict[str, Any]) -> None:
    small = {**options, "samples": {"train": 12, "test": 4}}
    prepare(tmp_path / "one", **small)
    prepare(tmp_path / "two", **small)
    prepare(tmp_path / "other", seed=2, **small)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert samples(tmp_path / "one", "test")[0]["captions"] != samples(tmp_path / "other", "test")[0]["captions"]


def test_more_training_scenes_leave_the_test_set_as_it_was() -> None:
    few, many = (drawn_scenes.Options.model_validate({"samples": {**SAMPLES, "train": count}}) for count in (5, 5000))
    for one, other in zip(drawn_scenes.scenes("test", few), drawn_scenes.scenes("test", many), strict=True):
        assert one.captions == other.captions


WRONG = [
    ({"media": "sound"}, "media: Input should be 'image' or 'clip', found 'sound'"),
    ({"samples": {"test": 5}}, "no split is named 'train', found test"),
    ({"samples": {"train": 5, "test": 0}}, "every split needs at least one sample"),
    ({"side": 65}, "side: Input should be a multiple of 2"),
    ({"samples": {"train": 1, "a": 1, "b": 1, "c": 1, "d": 1}}, "at most 3 splits beside train"),
    ({"sources": [Source(file="a.txt")]}, "scenes are generated, no source is allowed"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_options_that_do_not_fit_are_explained(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "out", **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
