"""Decoding images and clips: what a model sees is upright, in RGB, of the moment asked for, and the same every time."""

import numpy as np
import pytest
from media_files import clip, encoded, grey_steps, picture
from PIL import Image

from unroll.data.media import (
    LUMINANCE,
    Augmentation,
    MediaError,
    decode_clip,
    decode_image,
    encode_clip,
    encode_jpeg,
    read_image,
)
from unroll.data.signatures import clip_extension, image_extension

PIXELS = picture()


def near(found: np.ndarray, expected: np.ndarray, most: int) -> bool:
    return found.shape == expected.shape and bool(np.abs(found.astype(int) - expected.astype(int)).max() <= most)


def rgb(mode: str) -> Image.Image:
    return Image.fromarray(PIXELS).convert(mode)


@pytest.mark.parametrize(
    ("data", "expected", "most"),
    [
        (encoded(PIXELS), PIXELS, 0),
        (encoded(PIXELS, "JPEG", quality=95, subsampling=0), PIXELS, 8),
        (encoded(PIXELS, "JPEG", quality=95, subsampling=0, progressive=True), PIXELS, 8),
        (encoded(PIXELS, "WEBP", lossless=True), PIXELS, 0),
        (encoded(rgb("P"), "GIF"), np.asarray(rgb("P").convert("RGB")), 0),
        (encoded(rgb("L")), np.asarray(rgb("L").convert("RGB")), 0),
        (encoded(rgb("CMYK"), "JPEG", quality=95, subsampling=0), PIXELS, 12),
        (encoded(rgb("1")), np.asarray(rgb("1").convert("RGB")), 0),
    ],
    ids=["png", "jpeg", "progressive", "webp", "palette", "grey", "cmyk", "two tones"],
)
def test_every_kind_of_image_becomes_rgb(data: bytes, expected: np.ndarray, most: int) -> None:
    found = decode_image(data, "image")
    assert found.dtype == np.uint8
    assert near(found, expected, most)


def test_sixteen_bit_grey_is_scaled_not_cut() -> None:
    wide = np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)
    found = decode_image(encoded(Image.fromarray(wide)), "image")
    assert near(found, np.repeat((wide / 257).round().astype(np.uint8)[:, :, None], 3, 2), 1)


def test_what_is_transparent_is_white() -> None:
    alpha = np.zeros((32, 48, 4), np.uint8)
    alpha[:16] = (200, 0, 0, 255)
    half = np.full((32, 48, 2), 128, np.uint8)
    palette = Image.fromarray(alpha).convert("P")
    for data in (encoded(alpha), encoded(palette, "GIF", transparency=palette.getpixel((0, 31)))):
        found = decode_image(data, "image")
        assert near(found[0, 0], np.array([200, 0, 0]), 6)
        assert found[31, 0].tolist() == [255, 255, 255]
    assert near(decode_image(encoded(half), "image")[0, 0], np.array([191] * 3), 2)


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation_is_applied(turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(PIXELS, "JPEG", quality=95, subsampling=0, exif=exif)
    undo = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: PIXELS.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(PIXELS, 1),
    }
    assert near(decode_image(data, "image"), undo[turn], 8)
    assert near(read_image(data, 16, "image"), read_image(encoded(np.ascontiguousarray(undo[turn])), 16, "image"), 8)


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert decode_image(data, "image")[0, 0].tolist() == [255, 0, 0]


def test_a_large_jpeg_is_decoded_smaller_but_never_below_what_is_needed() -> None:
    data = encoded(picture(400, 320), "JPEG")
    found = decode_image(data, "image", at_least=70)
    assert found.shape[:2] == (80, 100)
    assert decode_image(data, "image").shape == (320, 400, 3)


def test_names_do_not_matter() -> None:
    for kind, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif")):
        assert image_extension(encoded(PIXELS, kind)) == extension
    for container, extension in (("mp4", "mp4"), ("avi", "avi"), ("matroska", "webm")):
        assert clip_extension(clip(grey_steps([0, 9]), container=container)) == extension
    assert image_extension(b"<html>") is None
    assert clip_extension(b"#EXTM3U\nhttp://example.com/a.ts") is None


# ---------------------------------------------------------------- cutting and augmentation

DRAWN = Augmentation(smallest=0.4, stretch=1.3, flip=True, brightness=0.2)


def test_without_augmentation_the_middle_is_cut() -> None:
    expected = np.asarray(Image.fromarray(PIXELS[:, 8:40]).resize((16, 16), Image.Resampling.BILINEAR))
    assert near(read_image(encoded(PIXELS), 16, "image"), expected, 3)


def test_augmentation_is_drawn_from_the_key_alone() -> None:
    data = encoded(PIXELS)
    views = [read_image(data, 24, "image", DRAWN, key) for key in range(20)]
    assert all(view.shape == (24, 24, 3) for view in views)
    assert all(np.array_equal(view, read_image(data, 24, "image", DRAWN, key)) for key, view in enumerate(views))
    assert len({view.tobytes() for view in views}) == 20
    mirrored = sum(int(view[:, 0, 0].mean() > view[:, -1, 0].mean()) for view in views)
    assert 4 <= mirrored <= 16


def test_without_flip_left_stays_left() -> None:
    drawn = Augmentation(smallest=0.3, brightness=0.3)
    for key in range(30):
        view = read_image(encoded(PIXELS), 24, "image", drawn, key)
        assert view[:, 0, 0].mean() < view[:, -1, 0].mean()


def test_grey_images_differ_in_contrast_and_the_others_in_colour() -> None:
    halves = np.concatenate([np.full((16, 8, 3), 60, np.uint8), np.full((16, 8, 3), 180, np.uint8)], 1)
    halves[:, :8, 0] = 200
    data = encoded(halves)
    grey = [read_image(data, 16, "image", Augmentation(grey=1.0, grey_contrast=0.8), key) for key in range(40)]
    steps = [float(view[..., 0].astype(int).max() - view[..., 0].min()) for view in grey]
    assert all((view == view[..., :1]).all() for view in grey)
    assert min(steps) < 30
    assert max(steps) > 100
    assert all(abs(float(view.mean()) - 141) < 1.5 for view in grey)  # of the luminances 102 and 180
    coloured = [read_image(data, 16, "image", Augmentation(saturation=0.5), key) for key in range(40)]
    spread = [int(view[8, 2].max()) - int(view[8, 2].min()) for view in coloured]
    assert min(spread) < 90
    assert max(spread) > 190
    assert all(abs(float(view[8, 2] @ LUMINANCE) - 102) < 1.5 for view in coloured if view[8, 2].max() < 255)
    assert read_image(data, 16, "image", Augmentation(grey=1.0), 3).max() == 180


def test_a_share_of_the_images_and_clips_is_grey() -> None:
    colours = np.zeros((32, 32, 3), np.uint8)
    colours[:, :16, 0], colours[:, 16:, 1] = 200, 150
    drawn = Augmentation(grey=0.5)
    views = [read_image(encoded(colours), 16, "image", drawn, key) for key in range(40)]
    grey = [view for view in views if (view == view[..., :1]).all()]
    assert 10 <= len(grey) <= 30
    assert near(grey[0][:, 2], np.full((16, 3), 60), 4)
    assert near(grey[0][:, -2], np.full((16, 3), 88), 4)
    assert all(
        near(view, read_image(encoded(colours), 16, "image"), 0) for view in views if (view != view[..., :1]).any()
    )
    frames = decode_clip([encode_jpeg(colours)] * 4, 4, 16, "clip", Augmentation(grey=1.0))
    assert (frames == frames[..., :1]).all()


def test_all_frames_of_a_clip_are_cut_alike() -> None:
    frames = np.stack([picture(48, 48)] * 6)
    for data in (encode_clip(frames, 10), [encode_jpeg(frame) for frame in frames]):
        views = decode_clip(data, 3, 24, "clip", DRAWN, key=4)
        assert near(views[0], views[2], 8)
        assert not near(views[0], decode_clip(data, 3, 24, "clip")[0], 20)


# ---------------------------------------------------------------- clips


def levels(clip_: np.ndarray) -> list[int]:
    """The grey of each frame."""
    return [round(float(frame.mean())) for frame in clip_]


def test_frames_are_spread_over_the_time_of_the_clip() -> None:
    data = clip(grey_steps([20 * n for n in range(12)]))
    found = decode_clip(data, 4, 32, "clip")
    assert found.shape == (4, 32, 32, 3)
    assert np.allclose(levels(found), [20, 80, 140, 200], atol=4)  # at 0.15, 0.45, 0.75, 1.05 seconds
    assert np.allclose(levels(decode_clip(data, 12, 32, "clip")), [20 * n for n in range(12)], atol=4)


def test_a_variable_frame_rate_is_sampled_by_time() -> None:
    """Ten frames in the first second, one that stays for nine, one at the end: nearly all of the clip is that one."""
    data = clip(grey_steps([*range(0, 100, 10), 200, 250]), times=[*range(10), 10, 100])
    assert np.allclose(levels(decode_clip(data, 5, 32, "clip")), [200] * 5, atol=4)
    assert np.allclose(levels(decode_clip(data, 100, 32, "clip"))[:10], range(0, 100, 10), atol=6)


def test_a_clip_shorter_than_asked_for_repeats_frames() -> None:
    found = levels(decode_clip(clip(grey_steps([0, 100, 200])), 6, 32, "clip"))
    assert np.allclose(found, [0, 0, 100, 100, 200, 200], atol=4)
    frames = [encode_jpeg(frame) for frame in grey_steps([0, 100, 200])]
    assert np.allclose(levels(decode_clip(frames, 6, 32, "clip")), [0, 0, 100, 100, 200, 200], atol=2)


def test_a_sequence_of_frames_is_spread_by_places() -> None:
    frames = [encode_jpeg(frame) for frame in grey_steps([20 * n for n in range(12)])]
    assert np.allclose(levels(decode_clip(frames, 4, 32, "clip")), [20, 80, 140, 200], atol=2)


def test_a_gif_is_a_clip_too() -> None:
    frames = [Image.fromarray(frame) for frame in grey_steps([0, 80, 160, 240])]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    assert np.allclose(levels(decode_clip(data, 4, 32, "clip")), [0, 80, 160, 240], atol=4)


@pytest.mark.parametrize(
    ("codec", "container", "pixels"),
    [
        ("libx264", "mp4", "yuv444p"),
        ("libx264", "mp4", "gray"),
        ("libx264", "matroska", "yuv422p10le"),
        ("mjpeg", "avi", "yuvj422p"),
        ("ffv1", "avi", "bgr0"),
        ("mpeg4", "avi", "yuv420p"),
        ("libvpx-vp9", "webm", "yuv420p"),
        ("rawvideo", "avi", "bgr24"),
    ],
)
def test_codecs_containers_and_pixel_formats(codec: str, container: str, pixels: str) -> None:
    data = clip(grey_steps([40, 90, 140, 190], 46, 34), codec=codec, container=container, pixels=pixels)
    found = decode_clip(data, 4, 32, "clip")
    assert found.shape == (4, 32, 32, 3)
    most = 16 if pixels == "gray" else 8  # the encoder does not say that its grey has the full range
    assert np.allclose(levels(found), [40, 90, 140, 190], atol=most)


def test_clips_are_cut_in_the_middle() -> None:
    frames = np.stack([picture(96, 64)] * 3)
    found = decode_clip(encode_clip(frames, 5), 2, 32, "clip")
    assert near(found[0], read_image(encoded(picture(96, 64)), 32, "image"), 16)


def test_encoding_a_clip_twice_gives_the_same_bytes() -> None:
    frames = np.stack([picture(64, 64)[:, ::step] for step in (1, -1, 1, -1)])
    assert len({encode_clip(frames, 8) for _ in range(5)}) == 1


def test_no_frames_is_an_error() -> None:
    with pytest.raises(MediaError, match="clip 7: no frames"):
        decode_clip([], 4, 32, "clip 7")
