"""Clips with captions: MSVD, MSR-VTT, or your own (layouts: `data/caption_files.py`), as videos or as frame sequences.

Clips are stored as they come, encoded; each is decoded once to see that it can be. Decoding a clip takes a hundred times
as long as decoding an image: with `frames` they are stored as so many JPEGs, evenly spread over the time of the clip,
which is all that a model of that many frames sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from unroll.config import DatasetEntry, check
from unroll.data.caption_files import CaptionOptions, Kind, prepare_captioned
from unroll.data.media import decode_clip, decode_image, encode_jpeg
from unroll.data.shards import FRAMES
from unroll.data.signatures import clip_extension
from unroll.data.sources import Progress, no_progress

CHECKED_FRAMES, CHECKED_SIDE = 64, 32


class Options(CaptionOptions):
    """input: whether sources hold videos or folders of frames. frames, side: store each clip as so many square JPEGs
    of that side."""

    input: Literal["clips", "frames"] = "clips"
    frames: int | None = Field(None, ge=1, le=1000)
    side: int = Field(224, ge=16, le=1024)


def prepare(entry: DatasetEntry, name: str, root: Path, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Write the prepared folder `out` and give its manifest; see `prepare_captioned`."""
    options: Options = check(Options, entry.options, f"params.yaml: datasets.{name}.options")

    def convert(place: str, data: bytes | Sequence[bytes]) -> tuple[bytes | list[bytes], str]:
        if options.frames:
            pixels = decode_clip(data, options.frames, options.side, place)
            return [encode_jpeg(frame) for frame in pixels], FRAMES
        if not isinstance(data, bytes):
            for number, frame in enumerate(data):
                decode_image(frame, f"{place} frame {number}", CHECKED_SIDE)
            return list(data), FRAMES
        decode_clip(data, CHECKED_FRAMES, CHECKED_SIDE, place)
        return data, str(clip_extension(data))

    kind: Kind = "clip" if options.input == "clips" else "frames"
    return prepare_captioned(entry, name, root, out, options, kind, convert, progress)
