"""Features of a frozen encoder in the place of pictures: a captioner that reads them says what it says of the pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from media_files import clip, encoded, grey_steps, picture

from unroll.config import DatasetEntry, Recipe, Source
from unroll.data.features import decode_features, encode_features, energy
from unroll.data.media import MediaError, read_image
from unroll.data.shards import SampleReader, verify
from unroll.datasets import caption_features
from unroll.errors import UserError
from unroll.layers.vision import PretrainedNetwork, Vision, VisionOptions
from unroll.pictures import draw_all
from unroll.place import Place
from unroll.tasks.captioning import Collate, Objective, Task
from unroll.training.context import WorkerContext
from unroll.training.runs import build, train_one

NAMES = [f"{n}.jpg" for n in range(6)]
IMAGES = {name: encoded(picture(40 + 3 * n, 40), "JPEG") for n, name in enumerate(NAMES)}


class Network(torch.nn.Module):
    """Stands for a model of `transformers`: the same weights whenever it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Sizes", (), {"hidden_sizes": [4, 7]})()
        self.convolution = torch.nn.Conv2d(3, 7, 8, 8)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return type("Output", (), {"last_hidden_state": self.convolution(pixel_values)})()


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Present:
        @staticmethod
        def from_pretrained(name: str, local_files_only: bool) -> Network:
            return Network()

    fake = ModuleType("transformers")
    fake.AutoModel = Present  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", fake)


def prepare(root: Path, files: dict[str, bytes], **options: Any) -> dict[str, Any]:
    root.mkdir(exist_ok=True)
    for name, data in files.items():
        (root / name).write_bytes(data)
    splits = dict(zip(files, ["train", "train", "train", "train", "validation", "test"], strict=False))
    rows = [
        {"image": name, "split": splits[name], "captions": [f"picture {n}", "a picture"]}
        for n, name in enumerate(files)
    ]
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = DatasetEntry(
        preparer="caption_features",
        licence="own",
        sources=[Source(file=name) for name in ("captions.jsonl", *files)],
        options={"layout": "jsonl", "pretrained": "some/resnet", "side": 32, **options},
    )
    return caption_features.prepare(entry, "features", root, root / "data/prepared/features")


def samples(root: Path, split: str) -> list[dict[str, Any]]:
    reader = SampleReader(root / "data/prepared/features", split)
    return [reader.sample(0, i) for i in range(reader.samples)]


def test_what_is_stored_is_what_the_encoder_says(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, IMAGES)
    assert verify(tmp_path / "data/prepared/features") == prepared
    assert prepared["features"]["channels"] == 7
    live = Vision(VisionOptions(pretrained="some/resnet", tuned="none"), 5)
    stored = Vision(VisionOptions(stored=7), 5)
    stored.project.load_state_dict(live.project.state_dict())
    for sample in samples(tmp_path, "train"):
        pixels = torch.from_numpy(read_image(IMAGES[sample["key"]], 32, "image"))[None]
        features = torch.from_numpy(decode_features(sample["media"], "features"))[None]
        torch.testing.assert_close(stored(features), live(pixels), atol=2e-3, rtol=1e-3)


def test_the_manifest_tells_encoders_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(tmp_path, IMAGES)
    assert prepare(tmp_path, IMAGES) == first
    monkeypatch.setattr(Network, "__init__", _other(Network.__init__))
    assert prepare(tmp_path, IMAGES)["features"]["weights_sha256"] != first["features"]["weights_sha256"]


def _other(make: Any) -> Any:
    def made(self: Network) -> None:
        make(self)
        torch.nn.init.zeros_(self.convolution.bias)

    return made


@pytest.mark.parametrize("model", ["show_attend_tell", "s2vt"])
def test_a_captioner_trains_on_features_and_writes(tmp_path: Path, model: str) -> None:
    if model == "s2vt":
        clips = {f"{n}.mp4": clip(grey_steps([40 * n + 4 * i for i in range(6)])) for n in range(6)}
        prepare(tmp_path, clips, input="clips", frames=3)
        shape: dict[str, Any] = {"frame": 6, "embedding": 5, "width": 6}
    else:
        prepare(tmp_path, IMAGES)
        shape = {"region": 6, "embedding": 5, "width": 6}
    recipe = Recipe(
        name="caption", suite="demo", task="captioning", dataset="features", evaluate={},
        model={"name": model, "encoder": {"stored": 7}, **shape},
        train={"batch": 3, "steps": 3, "optimizer": {"learning_rate": 0.01}, "objective": {"side": 32, "frames": 3}},
        predict={"beam": {"width": 2, "longest": 8}},
    )  # fmt: skip
    place = Place(tmp_path)
    train_one(recipe, 1, place, WorkerContext())
    task, built = build(recipe, place)
    assert isinstance(task, Task)
    (tmp_path / "out").mkdir()
    task.predict(built.eval(), tmp_path / "out", 1, torch.device("cpu"))
    assert (tmp_path / "out" / "pictures.jsonl").read_text()
    assert draw_all(tmp_path / "out", tmp_path / "out")


def test_a_worker_without_rows_has_the_shape_of_features(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, IMAGES)
    found = Collate(prepared, Objective(), "features").pictures([], [])
    assert Vision(VisionOptions(stored=7), 5)(found["image"]).shape == (0, 1, 5)


def test_pictures_and_features_are_not_mistaken_for_each_other() -> None:
    features, pixels = torch.zeros(1, 7, 4, 4, dtype=torch.float16), torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(UserError, match="found 7, the data set holds pictures"):
        Vision(VisionOptions(stored=7), 5)(pixels)
    with pytest.raises(UserError, match="found 8, the data set holds features of 7 channels"):
        Vision(VisionOptions(stored=8), 5)(features)
    with pytest.raises(UserError, match="found None, the data set holds features of 7 channels"):
        Vision(VisionOptions(widths=[8]), 5)(features)


def test_damaged_features_are_named() -> None:
    good = encode_features(np.ones((7, 2, 2), np.float32))
    assert decode_features(good, "x").shape == (7, 2, 2)
    assert decode_features(encode_features(np.full((7, 2, 2), 1e9)), "x").max() == np.finfo(np.float16).max
    pickled = (
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128) + b"cos\nsystem\n."
    )
    for data in (b"", good[:60], good[:-3], b"\x80\x04.", pickled, encode_features(np.full((7, 2, 2), np.nan))):
        with pytest.raises(MediaError, match="^features 3: "):
            decode_features(data, "features 3")


def test_a_picture_of_features_is_bright_where_they_are_large() -> None:
    features = np.zeros((2, 7, 3, 3), np.float16)
    features[1, :, 0, 2] = 4
    shown = energy(features)
    assert shown.shape == (2, 3, 3, 3)
    assert shown[1, 0, 2].tolist() == [255] * 3
    assert shown.sum() == 3 * 255


def test_the_network_is_frozen() -> None:
    assert not PretrainedNetwork("some/resnet").train().training
