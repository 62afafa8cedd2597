"""A model that says nothing, as after a few steps of training, or far too much: its pictures are drawn all the same."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unroll.errors import UserError
from unroll.pictures import captions, filmstrip, image_attention


@pytest.mark.parametrize("count", [0, 1, 70])
def test_captions_of_any_length_are_drawn(tmp_path: Path, count: int) -> None:
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    words = ["word"] * count
    data = {"files": ["a.png"], "words": words, "weights": [[0.25] * 4] * count, "reference": "a", "caption": ""}
    image_attention.draw(data, tmp_path, tmp_path / "image.png")
    assert Image.open(tmp_path / "image.png").width > 100
    if count < 20:
        strip = {**data, "files": ["a.png"] * 4}
        filmstrip.draw(strip, tmp_path, tmp_path / "strip.png")
        assert Image.open(tmp_path / "strip.png").width > 100


def test_weights_of_the_regions_of_frames_are_drawn_as_their_sums(tmp_path: Path) -> None:
    frames, words = [np.zeros((16, 16, 3), np.uint8)] * 3, ["one", "two"]
    of_regions = np.array([[8, 0, 2, 2, 1, 3], [0, 0, 8, 0, 4, 4]]) / 16  # [T,F*P], two regions a frame
    of_frames = np.array([[8, 4, 4], [0, 8, 8]]) / 16
    for name, weights in (("regions.png", of_regions), ("frames.png", of_frames)):
        filmstrip.draw_frames(frames, words, weights, "a caption", "", tmp_path / name)
    assert (tmp_path / "regions.png").read_bytes() == (tmp_path / "frames.png").read_bytes()
    with pytest.raises(UserError, match=r"found weights of shape \(2, 4\), \(2 words, 3 frames or their regions\)"):
        filmstrip.draw_frames(frames, words, of_regions[:, :4], "a caption", "", tmp_path / "x.png")


@pytest.mark.parametrize("frames", [1, 6])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_long_captions_and_words_are_not_cut_off(tmp_path: Path, frames: int, count: int) -> None:
    black = np.zeros((16, 16, 3), np.uint8)
    Image.fromarray(black).save(tmp_path / "a.png")
    text = "there is an enormously large yellow triangle to the left of an inconspicuously small orange square " * 2
    words, weights = ["inconspicuously"] * count, [[1.0 / frames] * frames] * count
    filmstrip.draw_frames([black] * frames, words, weights, text, text, tmp_path / "strip.png")
    image_attention.draw_pixels(black, words, [[0.25] * 4] * count, text, tmp_path / "image.png")
    items = [{"file": "a.png", "caption": text, "reference": text, "score": 1.0}] * count
    captions.draw({"items": items}, tmp_path, tmp_path / "page.png")
    for name in ("strip.png", "image.png", "page.png"):
        page = np.asarray(Image.open(tmp_path / name).convert("L"))
        for edge in (page[0], page[-1], page[:, 0], page[:, -1]):
            assert (edge == 255).all(), f"{name}: something reaches over the edge"
