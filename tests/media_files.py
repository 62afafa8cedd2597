"""Images and clips made by the tests: every kind that can be decoded, and ways to break them."""

import io
import struct
import zlib
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image


def picture(width: int = 48, height: int = 32) -> np.ndarray:
    """A smooth picture whose corners differ: red rises to the right, green to the bottom. uint8 [H,W,3]."""
    across = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return np.stack([across, down, np.full_like(across, 60)], -1).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says to be of this size, with a few bytes of content."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def clip(
    frames: np.ndarray,
    times: list[int] | None = None,
    codec: str = "libx264",
    container: str = "mp4",
    pixels: str = "yuv420p",
    rate: int = 10,
) -> bytes:
    """uint8 [F,H,W,3] as a video; `times`: when each frame is shown, in tenths of a second."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, rate)
        for number, frame in enumerate(frames):
            made = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)
            made.pts = times[number] if times else number
            made.time_base = Fraction(1, rate)
            out.mux(stream.encode(made))
        out.mux(stream.encode())
    return file.getvalue()


def sound() -> bytes:
    """An MP4 with sound alone."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def grey_steps(levels: list[int], width: int = 32, height: int = 32) -> np.ndarray:
    """Frames of one grey each: uint8 [F,H,W,3]."""
    return np.stack([np.full((height, width, 3), level, np.uint8) for level in levels])
