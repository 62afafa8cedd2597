"""CIDEr as a reward: ours against pycocoevalcap's on the same captions.

A call is what self-critical training makes at each step: 32 images with 5 references each, 6 captions an image (5 drawn
and the greedy one). Ours reads token ids, pycocoevalcap words. Times are those of the processor, so that other work on
the machine counts little. `python benchmarks/cider.py`
"""

from __future__ import annotations

import random
import time

import numpy as np
from pycocoevalcap.cider.cider import Cider as Reference

from unroll.losses.cider import Cider

IMAGES, REFERENCES, CAPTIONS, CALLS, VOCABULARY = 32, 5, 6, 20, 2000


def caption(generator: random.Random) -> list[int]:
    return [min(int(generator.paretovariate(0.6)), VOCABULARY - 1) for _ in range(generator.randint(7, 14))]


def padded(rows: list[list[int]]) -> np.ndarray:
    full = np.full((len(rows), max(map(len, rows))), -1)
    for place, row in enumerate(rows):
        full[place, : len(row)] = row
    return full


def words(row: list[int]) -> str:
    return " ".join(map(str, row))


def main() -> None:
    generator = random.Random(1)
    training = [[caption(generator) for _ in range(REFERENCES)] for _ in range(800)]
    scorer = Cider([padded(rows) for rows in training], VOCABULARY)
    times: dict[str, list[float]] = {"unroll": [], "pycocoevalcap": []}
    for _ in range(CALLS):
        batch = generator.sample(training, IMAGES)
        found = [[caption(generator) for _ in range(CAPTIONS)] for _ in range(IMAGES)]
        captions, references = (padded([row for rows in many for row in rows]) for many in (found, batch))
        start = time.process_time()
        scorer.scores(captions, references, IMAGES)
        times["unroll"].append(time.process_time() - start)
        pairs = [(i, j) for i in range(IMAGES) for j in range(CAPTIONS)]
        given = {(i, j): [words(row) for row in batch[i]] for i, j in pairs}
        said = {(i, j): [words(found[i][j])] for i, j in pairs}
        start = time.process_time()
        Reference().compute_score(given, said)
        times["pycocoevalcap"].append(time.process_time() - start)
    best = {name: min(values) for name, values in times.items()}
    for name, seconds in best.items():
        each, ratio = 1e6 * seconds / IMAGES / CAPTIONS, best["pycocoevalcap"] / seconds
        print(f"{name:14} {1000 * seconds:8.2f} ms a call {each:8.1f} us a caption {ratio:6.1f} x")


if __name__ == "__main__":
    main()
