"""Captioning files with an exported model alone: no data set is needed, only what training left in `models/`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unroll.data.media import clip_extension, decode_clip, image_extension, read_image
from unroll.data.tokenizers import load as load_tokenizer
from unroll.decoding.beam import BeamOptions, beam_search
from unroll.decoding.conditional import Hypothesis
from unroll.errors import UserError
from unroll.tasks.generation import attends

LARGEST_FILE = 2**28


@dataclass(frozen=True)
class Caption:
    """One hypothesis for one file: `score` as the beam ranked it; `weights` [T,P] of `words` over what `seen` [F,H,W,3]
    shows, regions of an image row by row or the frames of a clip."""

    text: str
    score: float
    words: list[str]
    weights: np.ndarray | None
    seen: np.ndarray


class Captioner:
    """Captions images and clips. A model of images sees the middle of a clip; one of clips sees an image standing still."""

    def __init__(self, model: Any, folder: Path, description: dict[str, Any], device: torch.device) -> None:
        """`folder`: an exported model's, for its tokenizer. `description`: its `model.json`.

        Raises:
            UserError: the folder holds no model that captions files.
        """
        if "caption" not in description or model.reads == "captions":
            raise UserError(f"{folder / 'model.json'}: it is no model that captions images or clips")
        self.model, self.device = model.to(device), device
        self.options: dict[str, Any] = description["caption"]
        self.tokenizer = load_tokenizer(folder / "tokenizer.json")

    def caption(self, files: Sequence[Path], beam: BeamOptions) -> Iterator[list[Caption]]:
        """The n best captions of each file, in the files' order; each file is read when its turn comes.

        Raises:
            UserError: a file that is not there, is no image or clip, or is damaged.
        """
        for path in files:
            pixels = self.pixels(path)
            inputs = {"image": torch.from_numpy(pixels[:1])}
            if self.options["media"] == "clip":
                inputs = {"frames": torch.from_numpy(pixels[None]), "frame_counts": torch.tensor([len(pixels)])}
            yield [self._caption(found, pixels) for found in self._search(inputs, beam)]

    def pixels(self, path: Path) -> np.ndarray:
        """What the model sees of a file: uint8 [F,side,side,3]."""
        data, side = read(path), self.options["side"]
        still = self.options["media"] == "image"
        if image_extension(data) is not None and (still or clip_extension(data) is None):
            image = read_image(data, side, str(path))
            return np.repeat(image[None], 1 if still else self.options["frames"], 0)
        return decode_clip(data, 1 if still else self.options["frames"], side, str(path))

    @torch.no_grad()
    def _search(self, inputs: dict[str, torch.Tensor], beam: BeamOptions) -> list[Hypothesis]:
        memory = self.model.encode({name: tensor.to(self.device) for name, tensor in inputs.items()})
        return beam_search(self.model, memory, beam, with_attention=attends(memory))[0]

    def _caption(self, found: Hypothesis, pixels: np.ndarray) -> Caption:
        words = [self.tokenizer.decode([token]).strip() for token in found.tokens]
        return Caption(self.tokenizer.decode(found.tokens).strip(), found.score, words, found.attention, pixels)


def read(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: no such file, or one that is too large to be an image or a clip.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise UserError(f"{path}: {size:,} bytes, at most {LARGEST_FILE:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
