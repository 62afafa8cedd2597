"""Images and clips: from encoded bytes of anybody's making to uint8 arrays of a known size.

What is decoded is decided by the first bytes, never by a name. The header is read first, and nothing is decoded that is
larger than the limits below, so memory stays within 200 MB of what it was before. Alpha is laid over white, EXIF
rotation is applied, 16-bit grey is scaled to 8 bits, of an animated image the first frame counts.

A clip is sampled by time: of F frames, frame i is what is shown at (i + 1/2)/F of the duration, whatever the frame rate
does; a clip of fewer frames shows some of them twice. A sequence of frames has no times, its places stand for them.
Frames that are not asked for are decoded (others lean on them) and dropped at once.
"""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from unroll.config import Strict
from unroll.data.signatures import clip_extension, image_extension
from unroll.errors import UserError

LONGEST_SIDE = 16_384
MOST_PIXELS = 12 * 2**20
"""Enough for 4032 x 3024; a progressive CMYK image of this size takes about 180 MB while it is decoded."""
MOST_CLIP_PIXELS = 1920 * 1088
MOST_CLIP_BYTES = 2**28
MOST_CLIP_SECONDS = 3600
MOST_CLIP_WORK = 2**33
"""Pixels of all frames of a clip together: some 20 seconds of decoding."""
MOST_STREAMS = 16
MOST_PACKETS = 200_000

TOO_LARGE, UNDECODABLE, UNKNOWN_FORMAT, EMPTY, NO_VIDEO, TOO_LONG, TRUNCATED = MEDIA_REASONS = (
    "too_large",
    "undecodable",
    "unknown_format",
    "empty_file",
    "no_video_stream",
    "too_long",
    "truncated",
)

IMAGE_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}
CLIP_FORMATS = {"mp4": "mov", "avi": "avi", "webm": "matroska", "gif": "gif"}
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes an EXIF orientation."""
LUMINANCE = np.array([0.299, 0.587, 0.114])
"""Of red, green and blue (ITU-R BT.601)."""

# The limits here are lower than Pillow's own and checked before it decodes.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)


class MediaError(UserError):
    """An image or a clip that cannot be used; `reason` is one of `MEDIA_REASONS`, for counting."""

    def __init__(self, place: str, reason: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}")
        self.reason = reason


class Augmentation(Strict):
    """What is drawn anew for each sample and epoch. `smallest`: a random crop has this share of the area at least;
    `stretch`: its sides may be so much longer or shorter; `flip`: half of the images are mirrored (not for data that
    speaks of left and right); `brightness`: factor between 1 - b and 1 + b; `grey`: this share of the images has no
    colours, so that a shape is learnt whatever its colour (as in Chen et al. 2020, arXiv:2002.05709); `grey_contrast`:
    their differences from their mean by a factor between 1 - c and 1 + c, so that it is learnt however bright it is;
    `saturation`: the colours of the others, as differences from grey, by a factor between 1 - s and 1 + s."""

    smallest: float = Field(1.0, gt=0.0, le=1.0)
    stretch: float = Field(1.0, ge=1.0, le=4.0)
    flip: bool = False
    brightness: float = Field(0.0, ge=0.0, lt=1.0)
    grey: float = Field(0.0, ge=0.0, le=1.0)
    grey_contrast: float = Field(0.0, ge=0.0, le=1.0)
    saturation: float = Field(0.0, ge=0.0, le=1.0)


# ---------------------------------------------------------------- images


def decode_image(data: bytes, place: str, at_least: int | None = None) -> np.ndarray:
    """An image as uint8 [H,W,3], upright. `place` names it in errors.

    at_least: the shorter side is not needed larger than this; a JPEG is then decoded at a half, a quarter or an eighth
    of its size, which saves most of the work.

    Raises:
        MediaError: empty, no known format, larger than the limits, or damaged.
    """
    image, turn = _open_image(data, place, at_least)
    return np.array(image if turn == 1 else image.transpose(UPRIGHT[turn]))


def read_image(
    data: bytes, side: int, place: str, augmentation: Augmentation | None = None, key: int = 0
) -> np.ndarray:
    """A square part of an image as uint8 [side,side,3]: the middle, or what `augmentation` draws from `key`."""
    image, turn = _open_image(data, place, side)
    view = _View(*image.size, augmentation, key)
    image = image.resize((side, side), Image.Resampling.BILINEAR, view.box, reducing_gap=2.0)
    if turn != 1:
        image = image.transpose(UPRIGHT[turn])
    if view.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return view.recoloured(np.array(image))


def _open_image(data: bytes, place: str, at_least: int | None) -> tuple[Image.Image, int]:
    """The decoded image in mode RGB, and its EXIF orientation."""
    if not data:
        raise MediaError(place, EMPTY, "0 bytes, an image was expected")
    extension = image_extension(data)
    if extension is None:
        found = data[:8].hex(" ")
        raise MediaError(place, UNKNOWN_FORMAT, f"begins with {found}, a JPEG, PNG, WebP or GIF was expected")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=[IMAGE_FORMATS[extension]])
        _check_size(image.size, place)
        if at_least is not None:
            image.draft("RGB" if image.mode in ("RGB", "YCbCr") else None, (at_least, at_least))
        image.load()
        turn = _orientation(image)
        return _as_rgb(image), turn
    except MediaError:
        raise
    except Image.DecompressionBombError:
        raise MediaError(place, TOO_LARGE, f"{MOST_PIXELS} pixels are allowed, the header says many more") from None
    except Exception as error:  # noqa: BLE001 - a decoder may raise anything for damaged bytes
        reason = TRUNCATED if "truncated" in str(error).lower() else UNDECODABLE
        raise MediaError(place, reason, f"a damaged {IMAGE_FORMATS[extension]} ({_words(error)})") from None


def _words(error: BaseException) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(said.split())[:120]


def _check_size(size: tuple[int, int], place: str) -> None:
    width, height = size
    if max(size) > LONGEST_SIDE or width * height > MOST_PIXELS:
        allowed = f"{LONGEST_SIDE} on a side and {MOST_PIXELS} in all are allowed"
        raise MediaError(place, TOO_LARGE, f"{width} x {height} pixels, {allowed}")


def _orientation(image: Image.Image) -> int:
    """1 to 8 as in EXIF; a damaged EXIF block says nothing."""
    try:
        turn = image.getexif().get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - metadata of anybody's making
        return 1
    return turn if turn in range(1, 9) else 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):  # 16 bits a pixel: Pillow's own conversion would cut, not scale
        wide = np.asarray(image).astype(np.float32)
        return Image.fromarray((wide * (255 / 65535)).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGB", layer.size, "white")
        ground.paste(layer, mask=layer.getchannel("A"))
        return ground
    return image.convert("RGB")


# ---------------------------------------------------------------- cutting


class _View:
    """What is drawn for one image or clip: the part that is used (left, top, right, bottom), whether it is mirrored, how
    bright it is, and whether it is grey. The part is the largest square in the middle unless `augmentation` says otherwise."""

    def __init__(self, width: int, height: int, augmentation: Augmentation | None, key: int) -> None:
        generator = random.Random(key)
        self.box = _box(width, height, augmentation, generator)
        self.mirrored = augmentation is not None and augmentation.flip and generator.random() < 0.5
        self._brightness = augmentation.brightness if augmentation is not None else 0.0
        self._factor = 1 + self._brightness * (2 * generator.random() - 1) if self._brightness else 1.0
        self._grey = augmentation is not None and augmentation.grey > 0 and generator.random() < augmentation.grey
        spread = 0.0 if augmentation is None else augmentation.grey_contrast if self._grey else augmentation.saturation
        self._contrast = 1 + spread * (2 * generator.random() - 1) if spread else 1.0

    def recoloured(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels [...,3], grey or not, of more or less contrast, and all brighter or darker by the same factor."""
        if self._grey or self._contrast != 1.0:
            luminance = pixels @ LUMINANCE  # [...]
            if self._grey:
                grey = luminance if self._contrast == 1.0 else _apart(luminance, luminance.mean(), self._contrast)
                pixels = np.repeat(grey.round().astype(np.uint8)[..., None], 3, -1)
            else:
                pixels = _apart(pixels, luminance[..., None], self._contrast).round().astype(np.uint8)
        if not self._brightness:
            return pixels
        levels: np.ndarray = (np.arange(256) * self._factor).round().clip(0, 255).astype(np.uint8)
        return levels[pixels]


def _apart(values: np.ndarray, middle: Any, factor: float) -> np.ndarray:
    """`values` whose differences from `middle` are multiplied by a factor, within [0, 255]."""
    moved: np.ndarray = (middle + factor * (values - middle)).clip(0, 255)
    return moved


def _box(
    width: int, height: int, augmentation: Augmentation | None, generator: random.Random
) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the part that is used: the largest square in the middle, or a random part."""
    side = float(min(width, height))
    if augmentation is None or (augmentation.smallest == 1.0 and augmentation.stretch == 1.0):
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side
    area = augmentation.smallest + (1 - augmentation.smallest) * generator.random()
    stretch = augmentation.stretch ** (2 * generator.random() - 1)
    across = min(float(width), side * (area * stretch) ** 0.5)
    down = min(float(height), side * (area / stretch) ** 0.5)
    left, top = generator.random() * (width - across), generator.random() * (height - down)
    return left, top, left + across, top + down


# ---------------------------------------------------------------- clips


def decode_clip(
    data: bytes | Sequence[bytes],
    frames: int,
    side: int,
    place: str,
    augmentation: Augmentation | None = None,
    key: int = 0,
) -> np.ndarray:
    """Frames of a clip as uint8 [frames,side,side,3], evenly spread over its time; all are cut alike.

    data: an encoded clip, or the encoded images of a frame sequence in order.

    Raises:
        MediaError: empty, no known format, no video in it, larger or longer than the limits, or damaged.
    """
    if isinstance(data, bytes):
        return _decode_video(data, frames, side, place, augmentation, key)
    if not data:
        raise MediaError(place, EMPTY, "no frames")
    chosen = [(2 * i + 1) * len(data) // (2 * frames) for i in range(frames)]
    cut: dict[int, np.ndarray] = {}
    for number in chosen:
        if number not in cut:
            cut[number] = read_image(data[number], side, f"{place} frame {number}", augmentation, key)
    return np.stack([cut[number] for number in chosen])


def _decode_video(
    data: bytes, frames: int, side: int, place: str, augmentation: Augmentation | None, key: int
) -> np.ndarray:
    from av.video.reformatter import VideoReformatter

    out = np.empty((frames, side, side, 3), np.uint8)
    reformatter, view, turn = VideoReformatter(), None, 0
    for slots, frame in _frames_in_time(data, frames, place):
        if view is None:
            view, turn = _View(frame.width, frame.height, augmentation, key), _turns(frame)
        image = _cut_frame(frame, side, view.box, reformatter)
        if turn:
            image = image.rotate(90 * turn)
        if view.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out[slots] = np.asarray(image)
    return out if view is None else view.recoloured(out)


def _turns(frame: Any) -> int:
    """Quarter turns against the clock that put a frame upright."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def _cut_frame(frame: Any, side: int, box: tuple[float, float, float, float], reformatter: Any) -> Image.Image:
    """Part of a frame, `side` x `side`. It is shrunk while its colours are converted, and cut afterwards.

    One `reformatter` for all frames of a clip: setting it up takes three times as long as decoding a small frame.
    """
    scale = max(side / (box[2] - box[0]), side / (box[3] - box[1]))
    width, height = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
    if width * height > frame.width * frame.height:
        width, height = frame.width, frame.height
    across, down = width / frame.width, height / frame.height
    pixels = reformatter.reformat(frame, width, height, "rgb24", interpolation="AREA", threads=1).to_ndarray()
    part = (box[0] * across, box[1] * down, min(box[2] * across, width), min(box[3] * down, height))
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR, part)


def _frames_in_time(data: bytes, frames: int, place: str) -> Iterator[tuple[list[int], Any]]:
    """(which of the frames asked for it is, decoded frame) in order of time; every number 0 .. frames - 1 once."""
    times, end = _frame_times(data, place)
    wanted: dict[int, list[int]] = {}
    for slot in range(frames):
        moment = times[0] + (2 * slot + 1) * (end - times[0]) / (2 * frames)
        shown = max(0, int(np.searchsorted(times, moment, side="right")) - 1)
        wanted.setdefault(shown, []).append(slot)
    left, last = set(wanted), None
    for number, frame in enumerate(_decoded(data, place)):
        _check_frame(frame.width, frame.height, place)
        last = frame
        if number in wanted:
            left.discard(number)
            yield wanted[number], frame
        if not left:
            return
    if last is None:
        raise MediaError(place, UNDECODABLE, "no frame of the clip can be decoded")
    if len(left) == len(wanted) or max(times.size - 1 - n for n in left) > 2 + times.size // 20:
        raise MediaError(place, TRUNCATED, f"the clip ends before frame {min(left)} of {times.size}")
    for number in sorted(left):  # a decoder may drop a frame or two at the end
        yield wanted[number], last


def _check_frame(width: int, height: int, place: str) -> None:
    if not 0 < width * height <= MOST_CLIP_PIXELS:
        raise MediaError(place, TOO_LARGE, f"frames of {width} x {height}, {MOST_CLIP_PIXELS} pixels are allowed")


class _OpenClip:
    """A clip opened with its format given, so that no playlist can make the library open other files or addresses."""

    def __init__(self, data: bytes, place: str) -> None:
        import av  # here, because it takes a fifth of a second and text needs none

        self.place = place
        if not data:
            raise MediaError(place, EMPTY, "0 bytes, a clip was expected")
        extension = clip_extension(data)
        if extension is None:
            raise MediaError(place, UNKNOWN_FORMAT, f"begins with {data[:8].hex(' ')}, MP4, AVI, WebM or GIF expected")
        if len(data) > MOST_CLIP_BYTES:
            raise MediaError(place, TOO_LARGE, f"{len(data)} bytes, {MOST_CLIP_BYTES} are allowed")
        with _decoder_errors(place):
            self.container = av.open(io.BytesIO(data), format=CLIP_FORMATS[extension])

    def __enter__(self) -> Any:
        with _decoder_errors(self.place):
            streams = self.container.streams
            if len(streams) > MOST_STREAMS:
                raise MediaError(self.place, TOO_LARGE, f"{len(streams)} streams, {MOST_STREAMS} are allowed")
            if not streams.video:
                raise MediaError(self.place, NO_VIDEO, "no video stream in it")
            stream = streams.video[0]
            _check_frame(stream.width or 0, stream.height or 0, self.place)
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(MOST_CLIP_PIXELS)}
        return self.container, stream

    def __exit__(self, *_: object) -> None:
        self.container.close()


class _decoder_errors:
    """Turns whatever a decoder raises into a `MediaError`."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, MediaError):
            raise MediaError(self.place, UNDECODABLE, f"a damaged clip ({_words(error)})") from None


def _frame_times(data: bytes, place: str) -> tuple[np.ndarray, float]:
    """Seconds at which each frame is shown, in that order, and the end of the last one; nothing is decoded."""
    stamps: list[int | None] = []
    ends = 0
    with _OpenClip(data, place) as (container, stream):
        with _decoder_errors(place):
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                stamps.append(packet.pts)
                if packet.pts is not None:
                    ends = max(ends, packet.pts + (packet.duration or 0))
                if len(stamps) > MOST_PACKETS or len(stamps) * stream.width * stream.height > MOST_CLIP_WORK:
                    problem = (
                        f"{len(stamps)} frames of {stream.width} x {stream.height} and more, {MOST_CLIP_WORK} pixels"
                    )
                    raise MediaError(place, TOO_LONG, f"{problem} are allowed")
            if not stamps:
                raise MediaError(place, UNDECODABLE, "the video stream is empty")
            if _whole(container) and len(stamps) < 0.9 * stream.frames:
                raise MediaError(place, TRUNCATED, f"{len(stamps)} of {stream.frames} frames are there")
            seconds = float(stream.time_base or 1)
            rate = float(stream.average_rate or stream.guessed_rate or 25)
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) < len(stamps) or len(set(known)) < len(known):  # AVI may have no times: the frame rate says them
        times = np.arange(len(stamps)) / rate
        end = len(stamps) / rate
    else:
        times = np.sort(np.array(known, np.float64)) * seconds
        end = max(ends * seconds, float(times[-1]))
    if end - times[0] > MOST_CLIP_SECONDS:
        raise MediaError(place, TOO_LONG, f"{end - times[0]:.0f} seconds, {MOST_CLIP_SECONDS} are allowed")
    return times, end


def _whole(container: Any) -> bool:
    """Whether the container counts its frames itself, so that missing ones show."""
    return "mp4" in container.format.name or container.format.name == "avi"


def _decoded(data: bytes, place: str) -> Iterator[Any]:
    with _OpenClip(data, place) as (container, stream):
        frames = container.decode(stream)
        while True:
            with _decoder_errors(place):
                frame = next(frames, None)
            if frame is None:
                return
            yield frame


# ---------------------------------------------------------------- encoding


def encode_jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    """uint8 [H,W,3] as a JPEG with full colour resolution."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


# Of the encoder's ways to save bits, those that look ahead or weigh frames read memory that nobody set: the bytes of
# the same clip differed now and then (x264 of PyAV 18.1).
REPEATABLE = "bframes=0:weightp=0:mbtree=0:rc-lookahead=0:sync-lookahead=0"


def encode_clip(frames: np.ndarray, rate: int) -> bytes:
    """uint8 [F,H,W,3], H and W even, as an MP4 (H.264) of `rate` frames a second; the same frames give the same bytes."""
    import av
    from av.video.reformatter import VideoReformatter

    file, reformatter = io.BytesIO(), VideoReformatter()  # one for all frames: see `_cut_frame`
    options = {"crf": "20", "preset": "veryfast", "x264-params": REPEATABLE}
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(reformatter.reformat(frame, format="yuv420p", threads=1)))
        container.mux(stream.encode())
    return file.getvalue()
