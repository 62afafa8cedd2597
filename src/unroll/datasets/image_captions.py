"""Photographs with captions: Flickr8k, Flickr30k, MS COCO, or your own (layouts: `data/caption_files.py`).

Images are stored as they come, encoded, under the extension that their bytes have; each is decoded once to see that it
can be. `shorter_side` makes larger ones smaller (JPEG, quality 90), which saves space and time in training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from unroll.config import DatasetEntry, check
from unroll.data.caption_files import CaptionOptions, prepare_captioned
from unroll.data.media import decode_image, encode_jpeg
from unroll.data.signatures import image_extension
from unroll.data.sources import Progress, no_progress

CHECKED_SIDE = 64


class Options(CaptionOptions):
    """shorter_side: images are shrunk until it is this many pixels."""

    shorter_side: int | None = Field(None, ge=16, le=4096)


def prepare(entry: DatasetEntry, name: str, root: Path, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Write the prepared folder `out` and give its manifest; see `prepare_captioned`."""
    options: Options = check(Options, entry.options, f"params.yaml: datasets.{name}.options")

    def convert(place: str, data: bytes) -> tuple[bytes, str]:
        pixels = decode_image(data, place, options.shorter_side or CHECKED_SIDE)
        if options.shorter_side and min(pixels.shape[:2]) > options.shorter_side:
            return encode_jpeg(shrunk(pixels, options.shorter_side)), "jpg"
        return data, str(image_extension(data))

    return prepare_captioned(entry, name, root, out, options, "image", convert, progress)


def shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    """An image with its shorter side of `side` pixels: uint8 [H,W,3]."""
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
