"""What beam search costs, as a multiple of greedy decoding with the same model, as a table.

    python benchmarks/beam.py               a minute
    python benchmarks/beam.py --batch 1     one sentence at a time
    python benchmarks/beam.py --recipe demo_translator      a translator that is trained too (`make demo`), on its test split

The first model is `models/seq2seq.py` of the size at which JoeyNMT is compared, with random weights: bi-directional
LSTM-256, LSTM-256 decoder with general attention and input feeding, vocabularies of 8,000. 100 sentences of 13 tokens
are decoded to the limit of 15 tokens: a model with random weights ends none before, so both searches take as many
steps, and the beam gains nothing from sentences that are done early. A trained model ends them, and both searches put
them away; its split, batch and beam are those of the recipe, with other widths. "exact" goes on until nothing can be
better (`exact: true`), which is the same where no sentence ends.

The searches take turns; "times greedy" is the median over the turns of the ratio within a turn, reading the source
included. Time is this process's own processor time on one thread, so what else the machine does counts little.
"outside" is the part of it that is spent outside the model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unroll.config import check, load_part, load_recipe
from unroll.decoding.beam import BeamOptions, beam_search
from unroll.decoding.conditional import greedy
from unroll.memory import keep_freed_memory
from unroll.models.seq2seq import Config, Model
from unroll.place import Place
from unroll.training.runs import load_model

SENTENCES, LENGTH, LIMIT, VOCABULARY = 100, 13, 15, 8_000
SEARCHES = {
    "greedy": {"width": 0},
    "beam 1": {"width": 1},
    "beam 5": {"width": 5},
    "beam 5, exact": {"width": 5, "exact": True},
    "beam 10": {"width": 10},
}
GOAL = 3.0  # of width 5


class TimedModel:
    """The model, and the processor seconds spent inside it."""

    def __init__(self, model: Any) -> None:
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


class Inputs:
    """In place of a model: what a task gives it to read is kept as it is."""

    reads = "text"

    def encode(self, inputs: Any) -> Any:
        return inputs


@dataclass
class Work:
    """A model, what it reads batch by batch, and how it is decoded."""

    model: Any
    batches: list[Any]
    options: BeamOptions
    sentences: int

    def decode(self, search: dict[str, int]) -> tuple[float, float]:
        """Processor seconds in all, and of those the ones outside the model. Width 0 is greedy decoding."""
        width, timed = search["width"], TimedModel(self.model)
        options = self.options.model_copy(update={"exact": False, **search, "width": max(1, width)})
        start = time.process_time()
        for inputs in self.batches:
            memory = timed.encode(inputs)
            if width:
                beam_search(timed, memory, options)
            else:
                greedy(timed, memory, options)
        seconds = time.process_time() - start
        return seconds, seconds - timed.seconds


def untrained(batch: int) -> Work:
    """Random sentences for a model with random weights."""
    torch.manual_seed(0)
    config = Config(attention="general", input_feeding=True)
    model = Model(config, {"source": VOCABULARY, "target": VOCABULARY})
    source = torch.randint(0, VOCABULARY - 2, (SENTENCES, LENGTH))
    batches = [{"source": rows, "source_lengths": torch.full((len(rows),), LENGTH)} for rows in source.split(batch)]
    return Work(model.eval(), batches, BeamOptions(longest=LIMIT), SENTENCES)


def trained(name: str) -> Work:
    """The split that a recipe predicts, for the model of its first seed."""
    recipe, place = load_recipe(Path(), name), Place(Path())
    part = load_part("tasks", recipe.task, f"recipes.{name}.task")
    task = part.Task(recipe, place.data(recipe.dataset))
    _, model = load_model(place.model(recipe, recipe.seeds[0]))
    options = check(part.Prediction, recipe.predict, f"recipes.{name}.predict")
    found = list(task.memories(Inputs(), options.split, options.batch, torch.device("cpu")))
    return Work(model.eval(), [inputs for _, inputs in found], options.beam, sum(len(samples) for samples, _ in found))


def compare(work: Work, searches: dict[str, dict[str, int]], turns: int) -> None:
    """Print the table of one model."""
    print(f"{'precision':<10} {'search':<13} {'sentences/s':>11} {'times greedy':>13} {'outside':>8}")
    for precision in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            every = [[work.decode(search) for search in searches.values()] for _ in range(turns + 1)][1:]
        for number, (name, search) in enumerate(searches.items()):
            seconds, outside = zip(*(turn[number] for turn in every), strict=True)
            ratio = statistics.median(turn[number][0] / turn[0][0] for turn in every)
            share = statistics.median(o / s for o, s in zip(outside, seconds, strict=True))
            goal = f"   goal <= {GOAL:.0f}" if search["width"] == 5 else ""
            print(f"{str(precision).removeprefix('torch.'):<10} {name:<13} "
                  f"{work.sentences / statistics.median(seconds):>11.0f} {ratio:>13.2f} {share:>8.0%}{goal}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=SENTENCES, help="sentences decoded at once (all)")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--recipe", help="a trained recipe too, with its split, batch and beam")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print("random weights")
    different = {name: search for name, search in SEARCHES.items() if "exact" not in search}
    compare(untrained(arguments.batch), different, arguments.turns)
    if arguments.recipe:
        print(f"\n{arguments.recipe}")
        compare(trained(arguments.recipe), SEARCHES, arguments.turns)


if __name__ == "__main__":
    main()
