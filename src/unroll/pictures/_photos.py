"""What the kinds that show photographs share: reading them from the predictions, and text below them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from unroll.errors import UserError

LINE = 0.17
"""Height of a line of 9 points, in inches."""


def photo(folder: Path, name: Any) -> np.ndarray:
    """A picture that lies beside the predictions, uint8 [H,W,3].

    Raises:
        UserError: a name that leads elsewhere, no such file, or no image.
    """
    path = folder / str(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"picture {name!r}: leads out of {folder}")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"picture {name!r}: no such file") from None
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"picture {name!r}: no image: {error}") from None


def sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """A blank page in inches, from its left upper corner. An axes for each picture would take ten times what the picture
    does."""
    figure = Figure(figsize=(width, height), dpi=100)
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    page.set_axis_off()
    return figure, page


def show(page: Axes, pixels: np.ndarray, left: float, top: float, size: float) -> None:
    """A photograph, as large as a square of this size takes it, in the middle of that."""
    height, width = pixels.shape[:2]
    wide, high = size * width / max(height, width), size * height / max(height, width)
    left, top = left + (size - wide) / 2, top + (size - high) / 2
    page.imshow(pixels, aspect="auto", extent=(left, left + wide, top + high, top),
                interpolation="lanczos" if max(height, width) < 200 else "antialiased")  # fmt: skip


def wrapped(text: str, width: int, lines: int = 3) -> str:
    """Text in a few lines that matplotlib takes for no formula."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …")).replace("$", r"\$")
