"""What the kinds that show photographs share: reading them from the predictions, and text below them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image, UnidentifiedImageError

from unroll.errors import UserError


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


def show(ax: Axes, pixels: np.ndarray) -> None:
    """A photograph without a frame; its axes still have room for text above and below."""
    ax.imshow(pixels, interpolation="lanczos" if max(pixels.shape[:2]) < 200 else "antialiased")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def wrapped(text: str, width: int, lines: int = 3) -> str:
    """Text in a few lines that matplotlib takes for no formula."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …")).replace("$", r"\$")
