"""Order and resume of 1e9 samples on 1,024 ranks, simulated: what one rank computes and holds to know its next rows.

    python benchmarks/plan_scale.py             prints a table, writes benchmarks/results/plan_scale.json
    python benchmarks/plan_scale.py --steps 20  fewer steps

Nothing is read or trained: lengths are drawn from the shard's number, as quickly as a file of them would be read. For
each kind of data the rank walks through steps until several windows are planned. Measured on one thread:

    ms a step   mean and longest; the longest holds the planning of a whole window       goal: at most 100
    MB          most that the plan held at any time (tracemalloc, numpy included)        goal: at most 50
    resume      ms from nothing to the first rows, at three places of an epoch           goal: does not grow with the place

and checked: the ranks' rows of a step are the step's rows, each once; a resumed plan goes on as one that walked there;
the samples of a window are each planned once. Reading the manifest is timed beside it, as every rank does that once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unroll.config import hash_json
from unroll.data.plan import SamplePlan, StreamPlan, rank_rows
from unroll.data.shards import SampleReader, load_manifest
from unroll.data.writers import SampleWriter, write_manifest

RESULT = Path(__file__).parent / "results" / "plan_scale.json"
RANKS = 1024
SAMPLES = 1_000_000_000
GOAL_MS, GOAL_MB = 100.0, 50.0


@dataclass(frozen=True)
class Kind:
    """Data of one kind: samples a shard, shards a window, mean length, tokens of a global batch."""

    name: str
    shard_samples: int
    window_shards: int
    mean_length: int
    batch_tokens: int

    def lengths(self, shard: int, epoch: int) -> np.ndarray:
        """int64 [samples, 2], the same whenever it is asked."""
        generator = np.random.default_rng([7, shard])
        return generator.integers(1, 2 * self.mean_length, (self.shard_samples, 2), dtype=np.int64)

    def plan(self) -> SamplePlan:
        counts = [self.shard_samples] * (SAMPLES // self.shard_samples)
        return SamplePlan(counts, self.lengths, self.batch_tokens, self.window_shards, seed=1)


KINDS = [
    Kind("sentence pairs", 50_000, 4, 30, RANKS * 4096),
    Kind("captioned images", 25_000, 6, 15, RANKS * 1024),
    Kind("long texts", 20_000, 8, 1000, RANKS * 16384),
]


def steps(plan: SamplePlan, window: int, batch: int = 0) -> Iterator[tuple[int, int, np.ndarray]]:
    """(window, batch, rows) as the loader goes through them."""
    while True:
        batches = plan.batches(window)
        for number in range(batch, len(batches)):
            yield window, number, batches[number]
        window, batch = window + 1, 0


def walk(kind: Kind, number: int) -> list[float]:
    """Milliseconds of each step of one rank."""
    times, order = [], steps(kind.plan(), 0)
    for _ in range(number):
        began = time.thread_time()
        _, _, rows = next(order)
        rows[rank_rows(len(rows), RANKS // 2, RANKS)].tolist()
        times.append(1000 * (time.thread_time() - began))
    return times


def megabytes(kind: Kind) -> float:
    """The most that a plan holds while it goes over two windows; apart from the times, which tracing lengthens."""
    tracemalloc.start()
    for window, _, _ in steps(kind.plan(), 0):
        if window == 2:
            break
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return peak


def resume(kind: Kind) -> list[float]:
    """Milliseconds from nothing to the first rows at the beginning, in the middle and near the end of the third epoch."""
    windows = kind.plan().windows_per_epoch
    found = []
    for share in (0.0, 0.5, 0.999):
        window = 2 * windows + int(share * windows)
        began = time.thread_time()
        next(steps(kind.plan(), window, 1))
        found.append(1000 * (time.thread_time() - began))
    return found


def check(kind: Kind) -> None:
    """The promises that the figures rest on."""
    plan, middle = kind.plan(), kind.plan().windows_per_epoch // 2
    batches = plan.batches(middle)
    seen = np.concatenate(batches)
    assert len(np.unique(seen, axis=0)) == len(seen) == sum(plan.shard_counts[shard] for shard in plan.shards(middle))
    rows = batches[-1]
    shared = [rows[rank_rows(len(rows), rank, RANKS)] for rank in range(RANKS)]
    assert np.array_equal(np.concatenate(shared), rows)
    walked = steps(plan, middle)
    for _ in range(len(batches)):
        next(walked)
    (window, batch, expected), (_, _, resumed) = next(walked), next(steps(kind.plan(), middle + 1))
    assert (window, batch) == (middle + 1, 0)
    assert np.array_equal(expected, resumed)
    epoch = (
        [shard for window in range(plan.windows_per_epoch) for shard in plan.shards(window)]
        if kind.window_shards > 8
        else []
    )
    assert not epoch or sorted(epoch) == list(range(len(plan.shard_counts)))


def stream(number: int) -> dict[str, Any]:
    """A stream of 1e12 tokens in 64 lanes a rank, windows drawn as AWD-LSTM does."""

    def make() -> StreamPlan:
        return StreamPlan(10**12, 64 * RANKS, 70, seed=1, random_windows=True)

    tracemalloc.start()
    make().window(0, 0)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    times, places = [], []
    for place in (0.0, 0.5, 0.999):
        began = time.thread_time()
        plan = make()
        plan.window(0, int(place * 10**12 / (64 * RANKS * 70)))
        places.append(1000 * (time.thread_time() - began))
    for step in range(number):
        began = time.thread_time()
        plan.window(0, step)
        times.append(1000 * (time.thread_time() - began))
    return {"name": "stream of 1e12 tokens", "mean_ms": statistics.mean(times), "longest_ms": max(*places, *times),
            "megabytes": peak, "resume_ms": places}  # fmt: skip


def manifest(shards: int, folder: Path) -> tuple[float, float]:
    """(milliseconds, MB) of a manifest of so many shards: to read it, and to keep its shards."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        {"file": f"train-{n:06d}.tar", "bytes": 10**8, "sha256": f"{n:064x}", "records": 100, "samples": 10**4,
         "lengths_sha256": f"{n:064x}"}
        for n in range(shards)
    ]  # fmt: skip
    content: dict[str, Any] = {"kind": "samples", "splits": {"train": {"samples": SAMPLES, "shards": entries}}}
    (folder / "manifest.json").write_text(json.dumps({**content, "hash": hash_json(content)}))
    del entries, content
    began = time.thread_time()
    load_manifest(folder)
    seconds = time.thread_time() - began
    tracemalloc.start()
    kept = load_manifest(folder)["splits"]["train"]["shards"]
    held = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()
    assert len(kept) == shards
    return 1000 * seconds, held


def reading(folder: Path, pairs: int = 20_000) -> tuple[float, float]:
    """(samples a second, MB a second) at which a rank reads, hashes and unpacks a shard of sentence pairs."""
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, 60, (pairs, 2))
    with SampleWriter(folder, "train", 30_000, shard_bytes=2**30) as writer:
        for source, target in lengths.tolist():
            sample = {"source": np.arange(source), "target": np.arange(target), "text": "x" * 4 * target}
            writer.write(sample, target, source)
    write_manifest(folder, {"kind": "samples", "token_bytes": 2, "splits": {"train": writer.summary}})
    reader = SampleReader(folder, "train")
    began = time.thread_time()
    for shard in range(len(reader.shards)):
        reader.lengths(shard)
        reader.sample(shard, 0)
    seconds = time.thread_time() - began
    return pairs / seconds, sum(shard["bytes"] for shard in reader.shards) / 1e6 / seconds


def main() -> None:

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        check(kind)
        times, peak = walk(kind, options.steps), megabytes(kind)
        rows.append({"name": kind.name, "shards": SAMPLES // kind.shard_samples, "mean_ms": statistics.mean(times),
                     "longest_ms": max(times), "megabytes": peak, "resume_ms": resume(kind)})  # fmt: skip
    rows.append(stream(options.steps))
    print(f"{SAMPLES:,} samples, {RANKS:,} ranks, one thread; goals: {GOAL_MS:.0f} ms a step, {GOAL_MB:.0f} MB\n")
    print("| data | shards | ms a step | longest | MB | resume at 0, 50, 99.9 % of an epoch, ms |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        places = ", ".join(f"{value:.0f}" for value in row["resume_ms"])
        shards = f"{row['shards']:,}" if "shards" in row else "-"
        print(
            f"| {row['name']} | {shards} | {row['mean_ms']:.1f} | {row['longest_ms']:.0f} | {row['megabytes']:.1f} | {places} |"
        )
    with tempfile.TemporaryDirectory() as folder:
        manifests = [(shards, *manifest(shards, Path(folder))) for shards in (10_000, 40_000, 100_000)]
    for shards, milliseconds, held in manifests:
        print(f"\nmanifest of {shards:,} shards: {milliseconds:,.0f} ms once a run, {held:.0f} MB kept")
    with tempfile.TemporaryDirectory() as folder:
        samples, megabytes_read = reading(Path(folder))
    print(
        f"\nreading sentence pairs: {samples:,.0f} a second, {megabytes_read:,.0f} MB/s on one core, every rank all of them"
    )
    missed = [row["name"] for row in rows if row["longest_ms"] > GOAL_MS or row["megabytes"] > GOAL_MB]
    print(f"\nmissed: {', '.join(missed) or 'nothing'}")
    RESULT.write_text(
        json.dumps({"rows": rows, "manifests": manifests, "reading": [samples, megabytes_read]}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
