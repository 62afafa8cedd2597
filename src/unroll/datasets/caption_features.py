"""Captioned images or clips as the features that a frozen encoder has of them (sources as for image_captions and
video_captions; layouts: `data/caption_files.py`).

Where an encoder is not trained, what it says of a picture is the same in every epoch: it is computed here, once, and
stored in the place of the picture. Models read it with `encoder: {stored: CHANNELS}`. There is no augmentation: of
every picture the middle is seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from unroll.config import DatasetEntry, check
from unroll.data.caption_files import CaptionOptions, Kind, prepare_captioned
from unroll.data.features import EXTENSION, encode_features
from unroll.data.media import decode_clip, read_image
from unroll.data.sources import Progress, no_progress
from unroll.device import default_device
from unroll.layers.vision import PretrainedNetwork

KINDS: dict[str, Kind] = {"images": "image", "clips": "clip", "frames": "frames"}


class Options(CaptionOptions):
    """pretrained: name of an image model of Hugging Face `transformers`. side: of the square that it sees. input: what
    the sources hold. frames: of a clip."""

    pretrained: str
    side: int = Field(224, ge=32, le=1024)
    input: Literal["images", "clips", "frames"] = "images"
    frames: int = Field(8, ge=1, le=1000)


def prepare(entry: DatasetEntry, name: str, root: Path, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Write the prepared folder `out` and give its manifest; see `prepare_captioned`.

    Raises:
        UserError: besides, where the encoder is not on this machine.
    """
    options: Options = check(Options, entry.options, f"params.yaml: datasets.{name}.options")
    device = default_device()
    network = PretrainedNetwork(options.pretrained).eval().to(device)

    @torch.inference_mode()
    def convert(place: str, data: bytes | Sequence[bytes]) -> tuple[bytes, str]:
        if options.input == "images":
            assert isinstance(data, bytes)
            pixels = read_image(data, options.side, place)[None]  # [1,H,W,3]
        else:
            pixels = decode_clip(data, options.frames, options.side, place)  # [F,H,W,3]
        seen = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2) / 127.5 - 1  # [F,3,H,W]
        features: np.ndarray = network(seen).float().cpu().numpy()  # [F,C,h,w]
        return encode_features(features[0] if options.input == "images" else features), EXTENSION

    about = {"features": {"channels": network.outputs, "weights_sha256": _weights_hash(network)}}
    return prepare_captioned(entry, name, root, out, options, KINDS[options.input], convert, progress, about)


def _weights_hash(network: torch.nn.Module) -> str:
    """SHA-256 over the weights, so that the manifest says which encoder it was."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
