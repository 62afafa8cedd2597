"""A model that says nothing, as after a few steps of training, or far too much: its pictures are drawn all the same."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unroll.pictures import filmstrip, image_attention


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
