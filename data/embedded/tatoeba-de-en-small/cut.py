"""Cuts `pairs.tsv` out of Tatoeba's English-German pairs: short sentences of frequent words, for minutes of training.

    python data/embedded/tatoeba-de-en-small/cut.py deu.txt.gz

Kept are pairs with 2 to 7 words on either side, all among the 800 most frequent words of their language, and of every
sentence the first pair only. Of these, the 12,000 with the smallest hash of the English side, in that order.
"""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from unroll.data.sources import RawFile

PAIRS, FREQUENT, SHORTEST, LONGEST = 12_000, 800, 2, 7
WORD = re.compile(r"\w+(?:['’]\w+)*")

Row = tuple[str, str]


def words(sentence: str) -> list[str]:
    """Its words, without case."""
    return WORD.findall(sentence.casefold())


def frequent(sentences: Iterable[str], count: int) -> set[str]:
    """The most frequent words; of equally frequent ones the first by code point."""
    counts = Counter(word for sentence in sentences for word in words(sentence))
    return set(sorted(counts, key=lambda word: (-counts[word], word))[:count])


def simple(rows: list[Row]) -> Iterator[Row]:
    """The rows of short sentences of frequent words, no sentence twice."""
    known = [frequent((row[side] for row in rows), FREQUENT) for side in (0, 1)]
    seen: tuple[set[str], set[str]] = (set(), set())
    for row in rows:
        folded = [sentence.strip().casefold() for sentence in row]
        parts = [words(sentence) for sentence in row]
        if (
            all(SHORTEST <= len(part) <= LONGEST for part in parts)
            and all(known[side].issuperset(parts[side]) for side in (0, 1))
            and not any(folded[side] in seen[side] for side in (0, 1))
        ):
            for side in (0, 1):
                seen[side].add(folded[side])
            yield row


def cut(rows: list[Row]) -> list[Row]:
    """The pairs of the extract in their order."""
    return sorted(simple(rows), key=lambda row: hashlib.sha256(row[0].encode()).digest())[:PAIRS]


def main() -> None:
    """Write `pairs.tsv` beside this file."""
    rows = []
    for line in RawFile(Path(sys.argv[1])).lines():
        english, german = line.split("\t")[:2]
        rows.append((english, german))
    text = "".join(f"{english}\t{german}\n" for english, german in cut(rows))
    Path(__file__).with_name("pairs.tsv").write_bytes(text.encode())


if __name__ == "__main__":
    main()
