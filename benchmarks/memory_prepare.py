"""Does the memory of `prepare` grow with the text? Peak memory for a 10 MB and a 1 GB text, and their ratio.

The texts are drawn from 50,000 words with Zipf frequencies, so that both hold the same words: what is measured is
the streaming, not the growth of the vocabulary (which `COUNTED_WORDS` bounds).

Run: python benchmarks/memory_prepare.py [--megabytes 10 1000] [--tokenizers characters words]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from unroll.config import DatasetEntry
from unroll.datasets import text

MEGABYTE = 10**6
WORDS = 50_000


def write_text(path: Path, size: int) -> None:
    """About `size` bytes of words in lines of ten."""
    generator = np.random.default_rng(0)
    letters = generator.integers(ord("a"), ord("z") + 1, (WORDS, 12)).astype(np.uint8)
    lengths = generator.integers(2, 12, WORDS)
    words = np.array([row[:length].tobytes().decode() for row, length in zip(letters, lengths, strict=True)])
    frequencies = 1 / np.arange(1, WORDS + 1)
    cumulative = np.cumsum(frequencies / frequencies.sum())
    lines = "\n".join(" ".join(words[i : i + 10]) for i in range(0, WORDS, 10)) + "\n"
    with path.open("w") as file:
        written = file.write(lines)
        while written < size:
            drawn = words[np.searchsorted(cumulative, generator.random((10_000, 10)))]
            written += file.write("\n".join(map(" ".join, drawn)) + "\n")


def prepare_here(path: Path, kind: str) -> None:
    """What the child process does: prepare, then print seconds and peak resident memory."""
    entry = DatasetEntry.model_validate(
        {
            "preparer": "text",
            "licence": "none",
            "sources": [{"file": str(path)}],
            "options": {"tokenizer": {"kind": kind}, "split": {"train": 0.9, "validation": 0.1}},
        }
    )
    began = time.perf_counter()
    text.prepare(entry, "benchmark", path.parent, path.parent / f"prepared-{kind}")
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE
    print(json.dumps({"seconds": seconds, "megabytes": peak}))


def main() -> None:
    """Print one line for each tokenizer and size, and the ratio of the memories."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs=2, default=[10, 1000])
    parser.add_argument("--tokenizers", nargs="+", default=["characters", "words"])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        prepare_here(Path(arguments.child[0]), arguments.child[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{size}.txt" for size in arguments.megabytes]
        for path, size in zip(paths, arguments.megabytes, strict=True):
            write_text(path, size * MEGABYTE)
        for kind in arguments.tokenizers:
            peaks = []
            for path in paths:
                command = [sys.executable, __file__, "--child", str(path), kind]
                measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                peaks.append(measured["megabytes"])
                print(f"{kind:12} {path.stem:>6} MB text: {measured['seconds']:7.1f} s, {peaks[-1]:7.1f} MB peak")
            print(f"{kind:12} ratio of the peaks: {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
