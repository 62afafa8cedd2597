"""What encoded bytes are: by how they begin, never by a name."""

from __future__ import annotations


def image_extension(data: bytes) -> str | None:
    """jpg, png, webp or gif by the first bytes, none for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    return None


def clip_extension(data: bytes) -> str | None:
    """mp4, avi, webm (Matroska) or gif by the first bytes, none for anything else."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mp4"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "webm"
    return "gif" if image_extension(data) == "gif" else None
