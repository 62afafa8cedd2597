"""What beam search costs, as a multiple of greedy decoding with the same model, as a table.

    python benchmarks/beam.py               a minute
    python benchmarks/beam.py --batch 1     one sentence at a time

The model is `models/seq2seq.py` of the size at which JoeyNMT is compared, with random weights: bi-directional
LSTM-256, LSTM-256 decoder with general attention and input feeding, vocabularies of 8,000. 100 sentences of 13 tokens
are decoded to the limit of 15 tokens: a model with random weights ends none before, so both searches take as many
steps, and the beam gains nothing from sentences that are done early.

The searches take turns; "times greedy" is the median over the turns of the ratio within a turn, reading the source
included. Time is this process's own processor time on one thread, so what else the machine does counts little. "search"
is the part of it that is spent outside the model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from unroll.decoding.beam import BeamOptions, beam_search
from unroll.decoding.conditional import greedy
from unroll.memory import keep_freed_memory
from unroll.models.seq2seq import Config, Model

SENTENCES, LENGTH, LIMIT, VOCABULARY = 100, 13, 15, 8_000
WIDTHS = [0, 1, 5, 10]  # 0: greedy
GOAL = {5: 3.0}


class TimedModel:
    """The model, and the processor seconds spent inside it."""

    def __init__(self, model: Model) -> None:
        self.model, self.vocabulary, self.seconds = model, model.vocabulary, 0.0

    def timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        result = call(*arguments)
        self.seconds += time.process_time() - start
        return result

    def encode(self, inputs: Any) -> Any:
        return self.timed(self.model.encode, inputs)

    def initial_state(self, memory: Any) -> Any:
        return self.timed(self.model.initial_state, memory)

    def step(self, tokens: Any, memory: Any, state: Any) -> Any:
        return self.timed(self.model.step, tokens, memory, state)


def decode(model: Model, source: torch.Tensor, batch: int, width: int) -> tuple[float, float]:
    """Processor seconds in all, and of those the ones outside the model."""
    timed, options = TimedModel(model), BeamOptions(width=max(1, width), longest=LIMIT)
    start = time.process_time()
    for rows in source.split(batch):
        memory = timed.encode({"source": rows, "source_lengths": torch.full((len(rows),), LENGTH)})
        if width:
            beam_search(timed, memory, options)
        else:
            greedy(timed, memory, options)
    seconds = time.process_time() - start
    return seconds, seconds - timed.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=SENTENCES, help="sentences decoded at once (all)")
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    config = Config(attention="general", input_feeding=True)
    model = Model(config, {"source": VOCABULARY, "target": VOCABULARY}).eval()
    source = torch.randint(0, VOCABULARY - 2, (SENTENCES, LENGTH))
    print(f"{'precision':<10} {'width':<7} {'sentences/s':>11} {'times greedy':>13} {'search':>7}")
    for precision in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            every = [[decode(model, source, arguments.batch, width) for width in WIDTHS]
                     for _ in range(arguments.turns + 1)][1:]  # fmt: skip
        for number, width in enumerate(WIDTHS):
            seconds, outside = zip(*(turn[number] for turn in every), strict=True)
            ratio = statistics.median(turn[number][0] / turn[0][0] for turn in every)
            share = statistics.median(o / s for o, s in zip(outside, seconds, strict=True))
            name = f"beam {width}" if width else "greedy"
            goal = f"   goal <= {GOAL[width]:.0f}" if width in GOAL else ""
            print(f"{str(precision).removeprefix('torch.'):<10} {name:<7} "
                  f"{SENTENCES / statistics.median(seconds):>11.0f} {ratio:>13.2f} {share:>6.0%}{goal}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
