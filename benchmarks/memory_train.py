"""Does the memory of training grow with the text? Peak memory of a run on 10 MB and on 1 GB, and their ratio.

    python benchmarks/memory_train.py            writes benchmarks/results/memory_train.json

Both runs take the same few steps of the same model in a process of their own; goal: within 10 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

RESULT = Path(__file__).parent / "results" / "memory_train.json"
TEXT = Path(__file__).parents[1] / "data" / "embedded" / "tiny-shakespeare" / "input.txt"
MEGABYTE = 10**6


def write_project(root: Path, megabytes: int) -> None:
    """One recipe on the embedded text, repeated up to the size asked for."""
    text = TEXT.read_bytes()
    with (root / "text.txt").open("wb") as file:
        for _ in range(-(-megabytes * MEGABYTE // len(text))):
            file.write(text)
    options = {"tokenizer": {"kind": "bytes"}, "split": {"train": 0.99, "validation": 0.01}}
    dataset = {"preparer": "text", "licence": "public domain", "sources": [{"file": "text.txt"}], "options": options}
    optimizer = {"name": "adamw", "learning_rate": 0.001, "clip": 1.0}
    train = {"batch": 32, "window": 64, "steps": 60, "optimizer": optimizer, "validate_every": 10**6, "select": "last"}
    recipe = {
        "suite": "bench",
        "task": "language_modeling",
        "dataset": "text",
        "model": {"name": "recurrent_lm", "layers": 1, "width": 128},
        "train": train,
        "evaluate": {"metrics": ["perplexity"]},
    }
    (root / "params.yaml").write_text(yaml.safe_dump({"datasets": {"text": dataset}}))
    (root / "recipes").mkdir()
    (root / "recipes" / "language_modeling.yaml").write_text(yaml.safe_dump({"recipes": {"bench": recipe}}))


def peak(megabytes: int) -> float:
    """Peak memory in MB of training on a text of this size."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_project(root, megabytes)
        for command in (["prepare", "text"], ["train", "bench", "--plain"]):
            subprocess.run([sys.executable, "-m", "unroll", *command], cwd=root, check=True)
        return float(json.loads(next(root.glob("histories/bench/*/cost.json")).read_text())["peak_memory_mb"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs=2, default=[10, 1000])
    small, large = parser.parse_args().megabytes
    result = {"small_mb": small, "large_mb": large, "peak_small_mb": peak(small), "peak_large_mb": peak(large)}
    result["ratio"] = result["peak_large_mb"] / result["peak_small_mb"]
    for name, value in result.items():
        print(f"{name:<14} {value:10.3f}")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
