"""n-gram models: perplexity on held-out text, time to count and to score, and peak memory, as a table.

    python benchmarks/ngram.py data/prepared/wikitext-2
    python benchmarks/ngram.py --unit words wiki/train.txt.gz wiki/test.txt.gz
    python benchmarks/ngram.py --unit characters --orders 1 2 3 4 5 6 7 8 data/embedded/tiny-shakespeare/input.txt

One argument that is a folder is prepared data (splits `train` and `--split`). Otherwise the arguments are the text to
count and the text to score, plain or `.gz`; with one text its last tenth is scored. The scored text is read as the
continuation of the counted one, so every token of it is predicted. Words are split on whitespace, with one `<eos>` a
line; the vocabulary is that of both texts. Each row is measured in a process of its own: its peak memory is that of the
whole process, Python and PyTorch included; reading the tokens is not part of the times.
"""

from __future__ import annotations

import argparse
import gzip
import math
import multiprocessing
import resource
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unroll.errors import UserError
from unroll.models.ngram import Config, Model

CHUNK = 1 << 18  # tokens read at once
SMOOTHINGS: dict[str, dict[str, Any]] = {
    "Kneser-Ney": {"smoothing": "kneser_ney"},
    "Kneser-Ney, estimated": {"smoothing": "kneser_ney", "discount": None},
    "modified Kneser-Ney": {"smoothing": "modified_kneser_ney"},
}


@dataclass(frozen=True)
class Text:
    """What is counted and what is scored: token ids on disk, or a folder of prepared data."""

    vocabulary: int
    train: Path | np.ndarray
    test: Path | np.ndarray
    split: str

    def chunks(self, part: str) -> Iterator[np.ndarray]:
        tokens = self.train if part == "train" else self.test
        if isinstance(tokens, Path):
            from unroll.data.shards import TokenStream

            yield from TokenStream(tokens, part).chunks(CHUNK)
        else:
            for start in range(0, len(tokens), CHUNK):
                yield tokens[start : start + CHUNK]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="a folder of prepared data, or one or two texts")
    parser.add_argument("--split", default="test", help="split of the prepared data to score (test)")
    parser.add_argument("--unit", choices=["words", "characters"], default="words")
    parser.add_argument("--orders", nargs="+", type=int, choices=range(1, 9), default=[5])
    arguments = parser.parse_args()
    if len(arguments.paths) > 2:
        parser.error(f"{len(arguments.paths)} paths found; one folder, or one or two texts are allowed")
    try:
        table(read(arguments.paths, arguments.split, arguments.unit), arguments.orders)
    except UserError as error:
        sys.exit(str(error))


def table(text: Text, orders: list[int]) -> None:
    """One printed row for each smoothing and order."""
    print(
        f"{'model':<24} {'n':>2} {'nats':>8} {'perplexity':>10} {'n-grams':>11} {'count s':>8} {'score s':>8} {'MB':>6}"
    )
    for name, options in SMOOTHINGS.items():
        for order in orders:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                nats, grams, counting, scoring, peak = pool.apply(measure, (text, {"order": order, **options}))
            print(
                f"{name:<24} {order:>2} {nats:>8.4f} {math.exp(nats):>10.2f} {grams:>11,} "
                f"{counting:>8.2f} {scoring:>8.2f} {peak:>6.0f}",
                flush=True,
            )


def measure(text: Text, options: dict[str, Any]) -> tuple[float, int, float, float, float]:
    """Nats per token, n-grams counted, seconds to count, seconds to score, peak MB of this process."""
    start = time.perf_counter()
    model = Model(Config.model_validate(options), text.vocabulary)
    model.fit(text.chunks("train"))
    counted = time.perf_counter()
    loss, tokens = 0.0, 0
    last, state = continuation(model, text)
    for chunk in text.chunks(text.split):
        targets = torch.from_numpy(chunk)[None]  # [1,T]
        inputs = torch.cat([last, targets[:, :-1]], 1)
        nats, state = model.log_loss(inputs, targets, state)
        loss, tokens, last = loss + nats.sum().item(), tokens + targets.numel(), targets[:, -1:]
    scored = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return loss / tokens, model.parameter_count, counted - start, scored - counted, peak


def continuation(model: Model, text: Text) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The last token [1,1] of the text counted, and the state before it is read."""
    tail = np.empty(0, np.int64)
    for chunk in text.chunks("train"):
        tail = np.concatenate([tail, chunk])[-model.config.order :]
    tokens = torch.from_numpy(tail)[None]
    _, state = model.log_loss(tokens[:, :-1], tokens[:, 1:], model.initial_state(1))
    return tokens[:, -1:], state


def read(paths: list[Path], split: str, unit: str) -> Text:
    """The texts as token ids, numbered in the order of first sight; prepared data stays where it is."""
    if paths[0].is_dir():
        from unroll.data.shards import load_manifest

        return Text(load_manifest(paths[0])["vocabulary"], paths[0], paths[0], split)
    ids: dict[str, int] = {}
    streams = [np.frombuffer(tokens(path, unit, ids), np.int64) for path in paths]
    if len(streams) == 1:
        cut = int(0.9 * len(streams[0]))
        streams = [streams[0][:cut], streams[0][cut:]]
    return Text(len(ids), streams[0], streams[1], split)


def tokens(path: Path, unit: str, ids: dict[str, int]) -> array[int]:
    """The ids of a text, line by line; new symbols are added to `ids`."""
    stream = array("q")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                symbols = [*line.split(), "<eos>"] if unit == "words" else line
                stream.extend(ids.setdefault(symbol, len(ids)) for symbol in symbols)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder") from None
    return stream


if __name__ == "__main__":
    main()
