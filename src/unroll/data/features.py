"""Features of pictures in the place of pictures: what a frozen encoder says of an image or clip, computed once.

Stored as NumPy arrays (float16, without pickle), as `webdataset` knows them: [C,H,W] of an image, [F,C,H,W] of a clip.
"""

from __future__ import annotations

import io

import numpy as np

from unroll.data.media import EMPTY, UNDECODABLE, MediaError

EXTENSION = "npy"


def encode_features(features: np.ndarray) -> bytes:
    """An array as float16; what float16 cannot hold becomes its largest number."""
    largest = float(np.finfo(np.float16).max)
    file = io.BytesIO()
    np.save(file, features.clip(-largest, largest).astype(np.float16), allow_pickle=False)
    return file.getvalue()


def decode_features(data: bytes, place: str) -> np.ndarray:
    """Features as float16 [C,H,W] or [F,C,H,W].

    Raises:
        MediaError: empty, damaged, no such array, or with numbers that are not finite.
    """
    if not data:
        raise MediaError(place, EMPTY, "0 bytes, features were expected")
    try:
        features: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # noqa: BLE001 - damaged bytes may raise anything
        raise MediaError(place, UNDECODABLE, f"no features ({' '.join(str(error).split())[:120]})") from None
    if features.dtype != np.float16 or features.ndim not in (3, 4):
        found = f"{features.dtype} {list(features.shape)}"
        raise MediaError(place, UNDECODABLE, f"found {found}, float16 of 3 or 4 dimensions is expected")
    if not np.isfinite(features).all():
        raise MediaError(place, UNDECODABLE, "numbers that are not finite in the features")
    return features


def energy(features: np.ndarray) -> np.ndarray:
    """A picture of features, where there is no other: how large they are in each region, uint8 [...,H,W,3]."""
    size = np.sqrt(np.square(features.astype(np.float32)).mean(-3))  # [...,H,W]
    low, high = size.min(), size.max()
    grey = ((size - low) / max(float(high - low), 1e-9) * 255).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1)
