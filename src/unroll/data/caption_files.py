"""Data sets of captioned media as their authors hand them out: which captions belong to which image or clip.

What a source is, its name says: an archive or a media file holds media (`archives.py`), a text source with a `split`
lists the names of that split, any other text holds captions in one of these layouts:

    jsonl      a JSON object a line: image, clip or video (a name), captions (a list), split or official_split
    karpathy   one JSON: images [{filename, split, sentences [{raw}]}] (dataset_coco.json, dataset_flickr8k.json, ...)
    coco       one JSON a split: images [{id, file_name}], annotations [{image_id, caption}]
    flickr     name#number<TAB>caption a line (Flickr8k.token.txt, results_20130124.token)
    msvd       name caption a line (AllVideoDescriptions.txt)
    msrvtt     one JSON: videos [{video_id, split}], sentences [{video_id, caption}]

Media are known by the last part of their name: images by file name, clips by it without the extension, sequences of
frames by their folder, whose files they are in the order of their numbers.

What cannot be used is skipped and counted by reason; past the share `skip_limit` the data set is refused. Memory: all
captions, and one image or clip.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from unroll.config import DatasetEntry, Source, Strict
from unroll.data.archives import Read, is_archive, members
from unroll.data.captions import (
    Captioned,
    CaptionWriter,
    caption_words,
    clean_caption,
    learn_tokenizer,
    save_tokenizer,
)
from unroll.data.media import MEDIA_REASONS, TOO_LARGE, MediaError
from unroll.data.sources import Progress, RawFile, locate
from unroll.data.splits import HashSplit, check_fractions, check_names
from unroll.data.tokenizers import TokenizerOptions
from unroll.data.writers import MOST_FRAMES, write_manifest
from unroll.errors import UserError
from unroll.files import new_folder

TRAIN = "train"
MEDIA_FILES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".mp4", ".avi", ".webm", ".mkv", ".mov")
SPLIT_NAMES = {"val": "validation", "validate": "validation", "dev": "validation", "restval": TRAIN}
MOST_BYTES = {"image": 64 * 2**20, "clip": 2**28, "frames": 64 * 2**20}
MOST_JSON_BYTES = 2**29
MISSING, NO_CAPTIONS = "missing_file", "no_captions"
EMPTY_CAPTION, LONG_CAPTION = "empty_caption", "long_caption"
REASONS = (MISSING, NO_CAPTIONS, *MEDIA_REASONS)

Kind = Literal["image", "clip", "frames"]
Convert = Callable[[str, Any], tuple[bytes | list[bytes], str]]
"""(place in errors, encoded media) -> what is stored and its extension; raises MediaError for what cannot be used."""


class CaptionOptions(Strict):
    """layout: of the caption files. split_names {as the files say: as it is called here}, beside the usual ones
    (val, dev, restval). split {name: fraction}: by a hash of the names, where the files have no splits. skip_limit: the
    share of images or clips that may be missing or damaged. longest: training captions with more words are left out.
    limit: only that many of each split."""

    layout: Literal["jsonl", "karpathy", "coco", "flickr", "msvd", "msrvtt"]
    tokenizer: TokenizerOptions = TokenizerOptions(kind="words")
    split_names: dict[str, str] = Field(default_factory=dict)
    split: dict[str, float] | None = None
    skip_limit: float = Field(0.01, ge=0, le=1)
    longest: int = Field(60, ge=1)
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def fractions_add_up(self) -> Self:
        if self.split:
            check_fractions(self.split)
        return self


@dataclass
class _Item:
    """What the caption files say about one image or clip."""

    split: str
    captions: list[str] = field(default_factory=list)
    place: str = ""


def prepare_captioned(
    entry: DatasetEntry,
    name: str,
    root: Path,
    out: Path,
    options: CaptionOptions,
    kind: Kind,
    convert: Convert,
    progress: Progress,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the prepared folder `out` and give its manifest. `progress` counts images or clips. `about`: what else the
    manifest says.

    Raises:
        UserError: a source that is missing or wrong, captions that are not in the layout, a damaged or hostile archive,
            too much skipped, an empty split.
    """
    place = f"params.yaml: datasets.{name}"
    media, texts = _sorted_sources(entry.sources, place)
    files = {source.file: locate(source, root, progress) for source in entry.sources}
    hashes: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    items = _read_items(texts, files, options, kind, hashes, skipped, place)
    training = ((i.place, text) for i in items.values() if i.split == TRAIN for text in i.captions)
    tokenizer = learn_tokenizer(training, options.tokenizer)
    splits = list(dict.fromkeys([TRAIN, *(item.split for item in items.values())]))
    with new_folder(out) as folder, ExitStack() as stack:
        writers = {s: stack.enter_context(CaptionWriter(folder, s, tokenizer)) for s in splits}
        waiting, unused = dict(items), 0
        for source in media:
            for key, path, found in _media(files[source.file], kind):
                item = waiting.pop(key, None)
                unused += item is None and key not in items
                if item is None:
                    continue
                try:
                    stored, extension = convert(path, found())
                    writers[item.split].write(Captioned(key, stored, extension, item.captions, None, item.place))
                except MediaError as error:
                    skipped[error.reason] += 1
                progress(len(items) - len(waiting), len(items))
        skipped[MISSING] += len(waiting)
        stack.close()
        _check_result(skipped, items, {s: w.summary for s, w in writers.items()}, waiting, options, place)
        manifest = {
            "dataset": name,
            "preparer": entry.preparer,
            "kind": "samples",
            "media": kind if kind == "image" else "clip",
            "options": options.model_dump(mode="json"),
            "licence": entry.licence,
            "sources": [{"file": s.file, "sha256": s.sha256 or hashes.get(s.file)} for s in entry.sources],
            **save_tokenizer(tokenizer, folder),
            **(about or {}),
            "splits": {split: writer.summary for split, writer in writers.items()},
            "skipped": {reason: skipped[reason] for reason in (*REASONS, EMPTY_CAPTION, LONG_CAPTION)},
            "unused_media": unused,
        }
        return write_manifest(folder, manifest)


def _sorted_sources(sources: list[Source], place: str) -> tuple[list[Source], list[Source]]:
    media = [s for s in sources if is_archive(s.file) or s.file.lower().endswith(MEDIA_FILES)]
    texts = [s for s in sources if s not in media]
    if not media or not texts:
        lacking = "an archive of media (.tar, .zip, ...)" if texts else "a file of captions"
        raise UserError(f"{place}.sources: {lacking} is missing")
    return media, texts


def _check_result(
    skipped: Counter[str],
    items: dict[str, _Item],
    splits: dict[str, dict[str, Any]],
    missing: dict[str, _Item],
    options: CaptionOptions,
    place: str,
) -> None:
    bad = sum(skipped[reason] for reason in REASONS)
    counts = ", ".join(f"{reason} {skipped[reason]}" for reason in REASONS if skipped[reason])
    if bad > options.skip_limit * (len(items) + skipped[NO_CAPTIONS]):
        first = f"; the first one missing is {next(iter(missing))}" if missing else ""
        raise UserError(
            f"{place}: {bad} of {len(items) + skipped[NO_CAPTIONS]} images or clips cannot be used ({counts}{first}); "
            f"options.skip_limit allows a share of {options.skip_limit}"
        )
    for split, summary in splits.items():
        if not summary["samples"]:
            raise UserError(f"{place}: split {split!r} is empty{f' (skipped: {counts})' if counts else ''}")


# ---------------------------------------------------------------- media


def _media(path: Path, kind: Kind) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(name as the captions know it, place, how to read it) of each image, clip or sequence of frames of a source."""
    if kind == "frames":
        yield from _frame_sequences(path)
        return
    for name, read in members(path):
        place = f"{path} {name}" if is_archive(path.name) else str(path)
        yield _key(name, kind), place, lambda read=read, place=place: _within(read, kind, place)  # type: ignore[misc]


def _frame_sequences(path: Path) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """The frames of a clip lie next to each other in the archive."""
    folder, frames = "", dict[str, bytes]()
    for name, read in members(path):
        if not name.lower().endswith(MEDIA_FILES):
            continue
        if _folder(name) != folder:
            if frames:
                yield _in_order(path, folder, frames)
            folder, frames = _folder(name), {}
        if len(frames) < MOST_FRAMES:
            frames[name] = read(MOST_BYTES["frames"] // 16) or b""
    if frames:
        yield _in_order(path, folder, frames)


def _in_order(path: Path, folder: str, frames: dict[str, bytes]) -> tuple[str, str, Callable[[], list[bytes]]]:
    def number(name: str) -> tuple[int, str]:
        digits = re.findall(r"\d+", PurePosixPath(name).stem)
        return int(digits[-1]) if digits else 0, name

    ordered = [frames[name] for name in sorted(frames, key=number)]
    return PurePosixPath(folder).name, f"{path} {folder}", lambda: ordered


def _folder(name: str) -> str:
    return str(PurePosixPath(name.replace("\\", "/")).parent)


def _within(read: Read, kind: Kind, place: str) -> bytes:
    data = read(MOST_BYTES[kind])
    if data is None:
        raise MediaError(place, TOO_LARGE, f"more than {MOST_BYTES[kind]} bytes")
    return data


def _key(name: str, kind: Kind) -> str:
    last = PurePosixPath(name.replace("\\", "/")).name
    if kind == "image":
        return last
    stem, dot, extension = last.rpartition(".")
    return stem if dot and f".{extension.lower()}" in MEDIA_FILES else last


# ---------------------------------------------------------------- captions


def _read_items(
    texts: list[Source],
    files: dict[str, Path],
    options: CaptionOptions,
    kind: Kind,
    hashes: dict[str, str],
    skipped: Counter[str],
    place: str,
) -> dict[str, _Item]:
    """What the caption files say, with clean captions: {name: item}, those of unknown split left out."""
    listed: dict[str, str] = {}
    items: dict[str, _Item] = {}
    hashed = HashSplit(options.split) if options.split else None
    lists = [s for s in texts if s.split is not None] if options.layout in ("flickr", "msvd") else []
    for source in lists:
        file = RawFile(files[source.file])
        listed |= {_key(line.strip(), kind): str(source.split) for line in file.lines() if line.strip()}
        hashes[source.file] = file.sha256
    for source in (s for s in texts if s not in lists):
        file = RawFile(files[source.file])
        for name, said, captions, line in LAYOUTS[options.layout](file):
            key = _key(name, kind)
            split = listed.get(key) or source.split or said
            split = hashed(key) if split is None and hashed else split
            if split is None:
                if lists:
                    continue  # in no list: not part of the data set
                raise UserError(f"{line}: {name} is in no split; give options.split or a source with its names")
            split = {**SPLIT_NAMES, **options.split_names}.get(split, split)
            items.setdefault(key, _Item(split, [], line)).captions.extend(captions)
        hashes[source.file] = file.sha256
    check_names(dict.fromkeys(item.split for item in items.values()), place)
    return _cleaned(items, options, skipped)


def _cleaned(items: dict[str, _Item], options: CaptionOptions, skipped: Counter[str]) -> dict[str, _Item]:
    kept: dict[str, _Item] = {}
    seen: Counter[str] = Counter()
    for key, item in items.items():
        seen[item.split] += 1
        if options.limit is not None and seen[item.split] > options.limit:
            continue
        clean = [clean_caption(text) for text in item.captions]
        words = [len(caption_words(text).split()) for text in clean]
        long = [item.split == TRAIN and count > options.longest for count in words]
        skipped[EMPTY_CAPTION] += words.count(0)
        skipped[LONG_CAPTION] += sum(long)
        item.captions = [t for t, count, over in zip(clean, words, long, strict=True) if count and not over]
        if item.captions:
            kept[key] = item
        else:
            skipped[NO_CAPTIONS] += 1
    return kept


Said = Iterator[tuple[str, str | None, list[str], str]]
"""(name, split if it is told, captions, place for errors)"""


def _jsonl(file: RawFile) -> Said:
    for number, line in enumerate(file.lines(), 1):
        place = f"{file.path}: line {number}"
        if not line.strip():
            continue
        row = _parsed(line, place)
        name = _first(row, ("image", "clip", "video"), place)
        captions = row.get("captions")
        if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
            raise UserError(f"{place}: captions: a list of texts is expected")
        split = row.get("split", row.get("official_split"))
        yield name, None if split is None else str(split), captions, place


def _karpathy(file: RawFile) -> Said:
    for number, image in enumerate(_list(_whole_json(file), "images", file)):
        place = f"{file.path}: images[{number}]"
        try:
            captions = [str(sentence["raw"]) for sentence in image["sentences"]]
            yield str(image["filename"]), str(image["split"]), captions, place
        except (KeyError, TypeError):
            raise UserError(f"{place}: filename, split and sentences [{{raw}}] are expected") from None


def _coco(file: RawFile) -> Said:
    whole = _whole_json(file)
    try:
        names = {image["id"]: str(image["file_name"]) for image in _list(whole, "images", file)}
        for number, said in enumerate(_list(whole, "annotations", file)):
            yield names[said["image_id"]], None, [str(said["caption"])], f"{file.path}: annotations[{number}]"
    except (KeyError, TypeError):
        expected = "images [{id, file_name}] and annotations [{image_id, caption}]"
        raise UserError(f"{file.path}: {expected} are expected") from None


def _msrvtt(file: RawFile) -> Said:
    whole = _whole_json(file)
    try:
        splits = {video["video_id"]: str(video["split"]) for video in _list(whole, "videos", file)}
        for number, said in enumerate(_list(whole, "sentences", file)):
            video = said["video_id"]
            yield str(video), splits[video], [str(said["caption"])], f"{file.path}: sentences[{number}]"
    except (KeyError, TypeError):
        expected = "videos [{video_id, split}] and sentences [{video_id, caption}]"
        raise UserError(f"{file.path}: {expected} are expected") from None


def _flickr(file: RawFile) -> Said:
    for number, line in enumerate(file.lines(), 1):
        place = f"{file.path}: line {number}"
        if not line.strip():
            continue
        head, tab, caption = line.partition("\t")
        name, mark, _ = head.rpartition("#")
        if not tab or not mark:
            raise UserError(f"{place}: name#number, a tab and a caption are expected, found {line[:60]!r}")
        yield name, None, [caption], place


def _msvd(file: RawFile) -> Said:
    for number, line in enumerate(file.lines(), 1):
        if line.strip() and not line.startswith("#"):
            name, _, caption = line.partition(" ")
            yield name, None, [caption], f"{file.path}: line {number}"


LAYOUTS: dict[str, Callable[[RawFile], Said]] = {
    "jsonl": _jsonl,
    "karpathy": _karpathy,
    "coco": _coco,
    "flickr": _flickr,
    "msvd": _msvd,
    "msrvtt": _msrvtt,
}


def _parsed(text: str | bytes, place: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{place}: a JSON object is expected")
    return found


def _whole_json(file: RawFile) -> dict[str, Any]:
    pieces, size = [], 0
    for piece in file.pieces():
        size += len(piece)
        if size > MOST_JSON_BYTES:
            raise UserError(f"{file.path}: more than {MOST_JSON_BYTES} bytes of JSON")
        pieces.append(piece)
    return _parsed(b"".join(pieces), str(file.path))


def _list(whole: dict[str, Any], key: str, file: RawFile) -> list[Any]:
    found = whole.get(key)
    if not isinstance(found, list):
        raise UserError(f"{file.path}: a list {key!r} is expected")
    return found


def _first(row: dict[str, Any], keys: tuple[str, ...], place: str) -> str:
    for key in keys:
        if isinstance(row.get(key), str) and row[key]:
            return str(row[key])
    raise UserError(f"{place}: one of {', '.join(keys)} is expected, a name")
