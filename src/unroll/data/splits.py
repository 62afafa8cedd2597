"""Splits of a data set: their names, fractions as they were written, and splitting by the hash of a text."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect
from collections.abc import Iterable, Mapping
from fractions import Fraction
from itertools import accumulate

from unroll.errors import UserError


def exact(fraction: float) -> Fraction:
    """The decimal number as it was written: 0.1 is one tenth."""
    return Fraction(str(fraction))


def check_fractions(split: Mapping[str, float]) -> None:
    """Raises ValueError unless the fractions are above 0 and add up to 1."""
    if min(split.values(), default=0) <= 0 or sum(map(exact, split.values())) != 1:
        raise ValueError("fractions must be above 0 and add up to 1")


def check_names(names: Iterable[str], place: str) -> None:
    """Raises UserError unless there is a split `train` and every name is plain enough for a file name."""
    names = list(names)
    if "train" not in names:
        raise UserError(f"{place}: no split is named 'train', found {', '.join(names) or 'none'}")
    for split in names:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", split):
            raise UserError(f"{place}: split {split!r}: a name of small letters, digits and _ is expected")


def folded(text: str) -> str:
    """What two texts have in common that differ in case and in blanks around them only."""
    return text.strip().casefold()


class HashSplit:
    """Gives every text to a split by its hash: the same text (see `folded`) always to the same one.

    split: {name: fraction}, in order; what the fractions before it leave is the last one's. Another `salt` splits anew.
    """

    def __init__(self, split: Mapping[str, float], salt: str = "") -> None:
        self.names, self.salt = list(split), salt
        self._ends = [int(share * 2**64) for share in accumulate(map(exact, split.values()))][:-1]

    def __call__(self, text: str) -> str:
        """Name of the split of this text."""
        digest = hashlib.blake2b((self.salt + folded(text)).encode(), digest_size=8).digest()
        return self.names[bisect(self._ends, int.from_bytes(digest, "big"))]
