"""Damaged, hostile or odd images, clips, captions and archives: skipped and counted by reason, or refused with one line
that names the file; memory stays bounded, and nothing crashes or hangs."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_files import clip, encoded, grey_steps, picture, png_of_size, sound
from PIL import Image

from unroll.config import DatasetEntry, Source
from unroll.data import media
from unroll.data.media import MediaError, decode_clip, decode_image, encode_clip, read_image
from unroll.data.shards import SampleReader
from unroll.datasets import image_captions, video_captions
from unroll.errors import UserError

TESTS = Path(__file__).parents[1]
PHOTO = encoded(picture(200, 150), "JPEG")
VIDEO = encode_clip(np.stack([picture(64, 48)] * 20), 10)


def refused(action: Callable[[], Any], reason: str, *words: str) -> None:
    """The action ends in a MediaError of one line with this reason that holds all these words."""
    with pytest.raises(MediaError) as error:
        action()
    message = str(error.value)
    assert error.value.reason == reason, message
    assert "\n" not in message
    assert len(message) < 300
    for word in words:
        assert word in message, message


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_truncated_image_is_named(kind: str, share: float) -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 200, 3), np.uint8)), kind)
    with pytest.raises(MediaError) as error:
        decode_image(whole[: int(len(whole) * share)], "photo 7")
    assert error.value.reason in ("truncated", "undecodable")
    assert str(error.value).startswith("photo 7: ")


SIZES = {
    "zero bytes": (b"", "empty_file", ["0 bytes"]),
    "a page": (b"<html>404</html>", "unknown_format", ["3c 68 74 6d 6c"]),
    "a BMP": (encoded(picture(), "BMP"), "unknown_format", ["JPEG, PNG, WebP or GIF"]),
    "1 x 65,000": (encoded(np.zeros((65000, 1, 3), np.uint8), "JPEG"), "too_large", ["1 x 65000", "16384"]),
    "65,000 x 1": (encoded(np.zeros((1, 65000, 3), np.uint8), "JPEG"), "too_large", ["65000 x 1"]),
    "30,000 x 30,000": (png_of_size(30_000, 30_000), "too_large", ["pixels"]),
    "13,000 x 13,000": (png_of_size(13_000, 13_000), "too_large", ["13000 x 13000"]),
    "2^31 wide": (png_of_size(2**31 - 1, 1), "too_large", []),
}


@pytest.mark.parametrize("name", SIZES)
def test_what_is_no_image_or_too_large_is_refused_before_it_is_decoded(name: str) -> None:
    data, reason, words = SIZES[name]
    refused(lambda: decode_image(data, "photo"), reason, "photo: ", *words)
    refused(lambda: read_image(data, 32, "photo"), reason, *words)


def test_a_damaged_exif_block_does_not_matter() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0" + b"MM\0*\xff\xff\xff\xff" + bytes(range(200)))
    assert decode_image(data, "photo").shape == (32, 48, 3)


def test_a_png_whose_text_swells_is_refused() -> None:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("comment", "x" * 100_000_000, zip=True)
    data = encoded(picture(), "PNG", pnginfo=text)
    assert len(data) < 200_000
    refused(lambda: decode_image(data, "photo"), "undecodable", "photo: ")


# ---------------------------------------------------------------- clips


def test_what_is_no_clip_is_refused() -> None:
    refused(lambda: decode_clip(b"", 4, 32, "clip"), "empty_file", "clip: 0 bytes")
    refused(lambda: decode_clip(sound(), 4, 32, "clip"), "no_video_stream", "clip: ")
    refused(lambda: decode_clip(b"RIFF\0\0\0\0AVI ", 4, 32, "clip"), "undecodable", "clip: ")
    refused(lambda: decode_clip([PHOTO, PHOTO[:500]], 2, 32, "clip"), "truncated", "clip frame 1: ")


@pytest.mark.parametrize("text", ["#EXTM3U\n/etc/passwd\n", "ffconcat version 1.0\nfile /etc/passwd\n", "<SMIL/>"])
def test_a_playlist_cannot_make_the_reader_open_other_files(text: str) -> None:
    refused(lambda: decode_clip(text.encode() * 3, 4, 32, "clip"), "unknown_format", "clip: ")


def test_a_clip_that_is_cut_off_is_named() -> None:
    index_last = clip(grey_steps([9 * n for n in range(20)]))
    refused(lambda: decode_clip(index_last[: len(index_last) // 2], 4, 32, "clip"), "undecodable", "clip: ")
    avi = clip(grey_steps([9 * n for n in range(20)]), codec="mjpeg", container="avi", pixels="yuvj420p")
    refused(lambda: decode_clip(avi[: len(avi) // 2], 4, 32, "clip"), "truncated", "clip: ")


def test_an_avi_without_its_index_is_still_read() -> None:
    avi = clip(grey_steps([9 * n for n in range(20)]), codec="mjpeg", container="avi", pixels="yuvj420p")
    broken = avi[: avi.rindex(b"idx1") + 4] + b"\xff" * (len(avi) - avi.rindex(b"idx1") - 4)
    for data in (avi[: avi.rindex(b"idx1")], broken):
        found = decode_clip(data, 4, 32, "clip").mean((1, 2, 3))
        assert np.allclose(found, [18, 63, 108, 153], atol=12)


def test_limits_of_clips_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MOST_CLIP_PIXELS", 64 * 47)
    refused(lambda: decode_clip(VIDEO, 4, 32, "clip"), "too_large", "64 x 48")
    monkeypatch.setattr(media, "MOST_CLIP_PIXELS", 64 * 48)
    monkeypatch.setattr(media, "MOST_CLIP_WORK", 64 * 48 * 19)
    refused(lambda: decode_clip(VIDEO, 4, 32, "clip"), "too_long", "64 x 48")
    monkeypatch.setattr(media, "MOST_CLIP_WORK", 64 * 48 * 20)
    monkeypatch.setattr(media, "MOST_CLIP_SECONDS", 1.9)
    refused(lambda: decode_clip(VIDEO, 4, 32, "clip"), "too_long", "2 seconds")
    monkeypatch.setattr(media, "MOST_CLIP_SECONDS", 2.1)
    monkeypatch.setattr(media, "MOST_CLIP_BYTES", len(VIDEO) - 1)
    refused(lambda: decode_clip(VIDEO, 4, 32, "clip"), "too_large", "bytes")
    monkeypatch.setattr(media, "MOST_CLIP_BYTES", len(VIDEO))
    assert decode_clip(VIDEO, 4, 32, "clip").shape == (4, 32, 32, 3)


# ---------------------------------------------------------------- never a crash, a hang or much memory

FUZZ = """
import sys, numpy as np
sys.path.insert(0, {tests!r})
from media_files import clip, encoded, grey_steps, picture
from unroll.data.media import MediaError, decode_clip, decode_image
generator = np.random.default_rng(int(sys.argv[1]))
frames = np.stack([np.roll(picture(32, 32), n, 1) for n in range(6)])
images = [encoded(picture(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF")]
images.append(encoded(picture(), "JPEG", progressive=True))
clips = [clip(frames), clip(frames, codec="mpeg4", container="avi"), clip(frames, container="matroska"), encoded(picture(), "GIF")]
good = bad = 0
for data, decode in [(d, decode_image) for d in images] + [(d, lambda b, p: decode_clip(b, 3, 16, p)) for d in clips]:
    for trial in range({trials}):
        broken = bytearray(data)
        for place in generator.integers(4, len(data), 1 + trial % 8):
            broken[place] = generator.integers(256)
        if trial % 5 == 0:
            broken = broken[: generator.integers(len(data))]
        try:
            decode(bytes(broken), "x")
            good += 1
        except MediaError:
            bad += 1
print(good, bad)
"""


def python(code: str, *arguments: str, timeout: int = 120) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_random_damage_never_crashes_or_hangs() -> None:
    good, bad = map(int, python(FUZZ.format(tests=str(TESTS), trials=60), "1").split())
    assert good > 50
    assert bad > 50


MEMORY = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
from PIL import Image
from media_files import encoded, png_of_size, clip, picture
from unroll.data.media import MediaError, decode_clip, decode_image
from pathlib import Path
folder = Path(sys.argv[1])
decode_image(encoded(picture()), "x"); decode_clip(clip(np.stack([picture(32, 32)] * 4)), 2, 16, "x")
def peak():
    # of this process; what getrusage says is handed on from the one that started it
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
start = peak()
for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    try:
        (decode_clip(data, 8, 64, path.name) if path.suffix == ".mp4" else decode_image(data, path.name))
        said = "decoded"
    except MediaError as error:
        said = error.reason
    print(path.name, said, (peak() - start) // 1024)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """The largest images that are accepted, and larger ones, within 200 MB above the start; the same for a clip."""
    side = np.linspace(0, 255, 4096).astype(np.uint8)
    large = Image.fromarray(np.stack([side[None, :].repeat(3072, 0)] * 3, -1))
    bad = {
        "a.jpg": encoded(large.convert("CMYK"), "JPEG", progressive=True),
        "b.png": encoded(large.convert("RGBA"), compress_level=1),
        "c.gif": encoded(large.convert("P"), "GIF"),
        "d.png": png_of_size(30_000, 30_000),
        "e.png": png_of_size(16_000, 16_000),
        "f.mp4": clip(np.zeros((12, 1080, 1920, 3), np.uint8), rate=20),
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    rows = [line.split() for line in python(MEMORY.format(tests=str(TESTS)), str(tmp_path)).splitlines()]
    assert {name: said for name, said, _ in rows} == {
        "a.jpg": "decoded",
        "b.png": "decoded",
        "c.gif": "decoded",
        "d.png": "too_large",
        "e.png": "too_large",
        "f.mp4": "decoded",
    }
    assert max(int(megabytes) for _, _, megabytes in rows) <= 200, rows


# ---------------------------------------------------------------- whole data sets


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def prepare(root: Path, rows: list[dict[str, Any]] | str, *media_: Path, clips: bool = False, **options: Any) -> Any:
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (root / "captions.jsonl").write_text(text)
    entry = DatasetEntry(
        preparer="video_captions" if clips else "image_captions",
        licence="own",
        sources=[Source(file="captions.jsonl"), *(Source(file=path.name) for path in media_)],
        options={"layout": "jsonl", **options},
    )
    return (video_captions if clips else image_captions).prepare(entry, "set", root, root / "out")


def row(name: str, *captions: str, split: str = "train") -> dict[str, Any]:
    return {"image": name, "split": split, "captions": list(captions or ("a photo",))}


def keys(root: Path, split: str = "train") -> list[str]:
    reader = SampleReader(root / "out", split)
    return [reader.sample(0, i)["key"] for i in range(reader.samples)]


def test_bad_images_are_skipped_and_counted_by_reason(tmp_path: Path) -> None:
    files = {f"good{n}.jpg": PHOTO for n in range(20)}
    files |= {
        "cut.jpg": PHOTO[:2000],
        "empty.jpg": b"",
        "huge.jpg": png_of_size(30_000, 30_000),
        "page.jpg": b"<html>",
        "named_wrongly.jpg": encoded(picture()),
        "._good0.jpg": b"resource fork",
    }
    rows = [row(name) for name in files if name != "._good0.jpg"] + [row("lost.jpg"), row("silent.jpg", " ", "...")]
    prepared = prepare(tmp_path, rows, tar(tmp_path / "a.tar", files), skip_limit=0.3)
    assert {reason: count for reason, count in prepared["skipped"].items() if count} == {
        "truncated": 1,
        "empty_file": 1,
        "too_large": 1,
        "unknown_format": 1,
        "missing_file": 1,
        "no_captions": 1,
        "empty_caption": 2,
    }
    assert prepared["splits"]["train"]["extensions"] == {"jpg": 20, "png": 1}
    assert keys(tmp_path) == [*(f"good{n}.jpg" for n in range(20)), "named_wrongly.jpg"]


def test_too_many_bad_images_are_refused_and_the_old_data_stay(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar", {"0.jpg": PHOTO, "1.jpg": PHOTO[:999]})
    prepare(tmp_path, [row("0.jpg")], archive)
    with pytest.raises(UserError) as error:
        prepare(tmp_path, [row("0.jpg"), row("1.jpg"), row("2.jpg")], archive, skip_limit=0.5)
    message = str(error.value)
    assert (
        "2 of 3 images or clips cannot be used (missing_file 1, truncated 1; the first one missing is 2.jpg)" in message
    )
    assert "skip_limit allows a share of 0.5" in message
    assert keys(tmp_path) == ["0.jpg"]


def test_a_split_that_loses_everything_is_refused(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar", {"0.jpg": PHOTO, "1.jpg": b""})
    with pytest.raises(UserError, match=r"split 'test' is empty \(skipped: empty_file 1\)"):
        prepare(tmp_path, [row("0.jpg"), row("1.jpg", split="test")], archive, skip_limit=1)


def test_bad_clips_are_skipped_and_counted_by_reason(tmp_path: Path) -> None:
    files = {"a.mp4": VIDEO, "sound.mp4": sound(), "cut.mp4": VIDEO[:900], "list.mp4": b"#EXTM3U\n", "none.mp4": b""}
    rows = [row(name.removesuffix(".mp4")) for name in files]
    prepared = prepare(tmp_path, rows, tar(tmp_path / "a.tar", files), clips=True, skip_limit=0.8)
    assert {reason: count for reason, count in prepared["skipped"].items() if count} == {
        "undecodable": 1,
        "unknown_format": 1,
        "empty_file": 1,
        "no_video_stream": 1,
    }
    assert keys(tmp_path) == ["a"]


def test_captions_cannot_break_the_protocols_of_scorers(tmp_path: Path) -> None:
    said = ["two\nlines", "a ||| b", "tab\there\r\n", "", "\u2028", "|||"]
    prepared = prepare(tmp_path, [row("0.jpg", *said)], tar(tmp_path / "a.tar", {"0.jpg": PHOTO}))
    assert prepared["skipped"]["empty_caption"] == 3
    assert SampleReader(tmp_path / "out", "train").sample(0, 0)["captions"] == ["two lines", "a b", "tab here"]


def test_long_captions_are_left_out_of_training_alone(tmp_path: Path) -> None:
    rows = [row("0.jpg", "one two", "w " * 99), row("1.jpg", "w " * 99, split="test")]
    prepared = prepare(tmp_path, rows, tar(tmp_path / "a.tar", {"0.jpg": PHOTO, "1.jpg": PHOTO}))
    assert prepared["skipped"]["long_caption"] == 1
    assert prepared["splits"]["train"]["longest_caption"] == 2
    assert prepared["splits"]["test"]["longest_caption"] == 99


WRONG_CAPTIONS = [
    ("not json\n", "captions.jsonl: line 1: not JSON"),
    ("[1]\n", "captions.jsonl: line 1: a JSON object is expected"),
    ('{"image": "0.jpg", "split": "train", "captions": "one"}\n', "line 1: captions: a list of texts is expected"),
    ('{"image": "", "split": "train", "captions": []}\n', "line 1: one of image, clip, video is expected, a name"),
    ('{"image": "0.jpg", "captions": ["a"]}\n', "0.jpg is in no split; give options.split"),
    ('{"image": "0.jpg", "split": "test", "captions": ["a"]}\n', "no split is named 'train', found test"),
    ('{"image": "0.jpg", "split": "../x", "captions": ["a"]}\n', "no split is named 'train', found ../x"),
    ("[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_CAPTIONS)
def test_captions_that_are_not_in_the_layout_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        prepare(tmp_path, text, tar(tmp_path / "a.tar", {"0.jpg": PHOTO}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- archives


def hostile_tar(path: Path, **attributes: Any) -> Path:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("0.jpg")
        for name, value in attributes.items():
            setattr(member, name, value)
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    return path


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"name": "/etc/0.jpg"}, "has an absolute path: refused"),
        ({"name": "a/../../0.jpg"}, "leads out of its folder: refused"),
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a link or a device, not a file: refused"),
        ({"type": tarfile.LNKTYPE, "linkname": "x"}, "is a link or a device, not a file: refused"),
        ({"type": tarfile.CHRTYPE}, "is a link or a device, not a file: refused"),
    ],
)
def test_a_hostile_tar_is_refused(tmp_path: Path, attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        prepare(tmp_path, [row("0.jpg")], hostile_tar(tmp_path / "a.tar", **attributes))


def test_a_hostile_zip_is_refused(tmp_path: Path) -> None:
    for name, mode, words in (
        ("../0.jpg", 0o100644, "leads out"),
        ("/0.jpg", 0o100644, "absolute"),
        ("0.jpg", 0o120777, "is a link"),
    ):
        member = zipfile.ZipInfo(name)
        member.external_attr = mode << 16
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr(member, PHOTO)
        with pytest.raises(UserError, match=words):
            prepare(tmp_path, [row("0.jpg")], tmp_path / "a.zip")


def test_a_member_that_swells_is_skipped(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.jpg", PHOTO)
        with archive.open("1.jpg", "w") as file:
            for _ in range(80):
                file.write(bytes(2**20))
    assert (tmp_path / "a.zip").stat().st_size < 2**18
    prepared = prepare(tmp_path, [row("0.jpg"), row("1.jpg")], tmp_path / "a.zip", skip_limit=0.5)
    assert prepared["skipped"]["too_large"] == 1


@pytest.mark.parametrize("name", ["a.tar", "a.zip", "a.tgz"])
def test_a_truncated_archive_is_named(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).bytes(5000)
    whole = tar(tmp_path / "whole", {"0.jpg": noise, "1.jpg": noise})
    if name == "a.zip":
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("0.jpg", noise)
        data = (tmp_path / name).read_bytes()
    else:
        data = whole.read_bytes() if name == "a.tar" else gzip.compress(whole.read_bytes())
    (tmp_path / name).write_bytes(data[:3000])
    with pytest.raises(UserError, match=rf"{name}: damaged archive"):
        prepare(tmp_path, [row("0.jpg"), row("1.jpg")], tmp_path / name)


def test_sources_that_lack_media_or_captions_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"an archive of media \(.tar, .zip, ...\) is missing"):
        prepare(tmp_path, [row("0.jpg")])
    entry = DatasetEntry(
        preparer="image_captions", licence="own", sources=[Source(file="a.tar")], options={"layout": "jsonl"}
    )
    with pytest.raises(UserError, match="a file of captions is missing"):
        image_captions.prepare(entry, "set", tmp_path, tmp_path / "out")
