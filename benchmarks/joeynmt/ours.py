"""Our training loop, validation and beam search, driven by `serve.Pace`.

    python ours.py RECIPE.yaml THREADS PREPARED FOLDER SEED SENTENCES

FOLDER is the run's and begun anew; SENTENCES of the test split are translated.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from serve import Ended, Pace

from unroll.config import Recipe, check, load_part, model_config, read_yaml
from unroll.data.loader import Batch
from unroll.data.shards import SampleReader
from unroll.data.tokenizers import load
from unroll.decoding.beam import BeamOptions, beam_search
from unroll.memory import COMPILED_SHAPES, keep_freed_memory
from unroll.tasks.translation import source_tensors
from unroll.training import checkpoint
from unroll.training.context import WorkerContext
from unroll.training.loop import Run, StepResult, restore_best

TEST = "test_2016_flickr"
# As in `theirs.yaml`: its beam_alpha has the same formula, its limit is 1.5 times the longest source of the batch.
SEARCH: dict[str, Any] = {"length_penalty": 1.0, "longest": {"per_source": 1.5, "plus": 0}}


class Driven(Run):
    """Our loop; a turn may end before any update."""

    pace: Pace

    def step(self, batches: list[Batch]) -> StepResult:
        self.pace.before_update(round(sum(batch.weight for batch in batches)))
        return super().step(batches)


class Translator:
    """The test set, translated in batches of like length, as our stage `predict` does it: in a process of its own, with
    oneDNN's caches as they are where nothing is trained."""

    def __init__(self, recipe: Recipe, threads: int, prepared: Path, sentences: int) -> None:
        for name in COMPILED_SHAPES:
            os.environ.pop(name, None)
        torch.set_num_threads(threads)
        keep_freed_memory()
        self.model, self.vocabulary = model_of(recipe, prepared)
        reader = SampleReader(prepared, TEST)
        places = [(shard, index) for shard, count in enumerate(reader.shard_counts) for index in range(count)]
        self.sources = [reader.sample(*place)["source"] for place in places[:sentences]]
        tokenizer: Any = load(prepared / "tokenizer.json")
        self.words = sorted(tokenizer.vocabulary, key=tokenizer.vocabulary.__getitem__)

    @torch.no_grad()
    def __call__(self, weights: Path, beam: int, batch: int, length: int | None) -> dict[str, Any]:
        checkpoint.load_weights(self.model, checkpoint.load_tensors(weights), weights)
        self.model.eval()
        fixed = {"longest": length, "shortest": length} if length else {}
        options = BeamOptions.model_validate({"width": beam, **SEARCH, **fixed})
        tokens: list[list[str]] = [[] for _ in self.sources]
        start = time.perf_counter()
        order = sorted(range(len(self.sources)), key=lambda number: len(self.sources[number]))
        for first in range(0, len(order), batch):
            numbers = order[first : first + batch]
            inputs = source_tensors([self.sources[number] for number in numbers], self.vocabulary)
            with torch.autocast("cpu", torch.bfloat16):  # as it is trained, and as `predict: {precision: bf16}` decodes
                found = beam_search(self.model, self.model.encode(inputs), options)
            for number, best in zip(numbers, found, strict=True):
                tokens[number] = [self.words[token] for token in best[0].tokens]
        return {"seconds": time.perf_counter() - start, "tokens": tokens}


TRANSLATORS: list[Translator] = []
"""Of the process that translates: the only one."""


def start_translator(*arguments: Any) -> None:
    TRANSLATORS.append(Translator(*arguments))


def translate(*arguments: Any) -> dict[str, Any]:
    return TRANSLATORS[0](*arguments)


def model_of(recipe: Recipe, prepared: Path) -> tuple[Any, int]:
    """A freshly initialised model of the recipe, and the number of source words."""
    task = load_part("tasks", recipe.task, "ours.yaml").Task(recipe, prepared)
    model = load_part("models", recipe.model["name"], "ours.yaml").Model(model_config(recipe), task.vocabulary)
    return model, task.vocabulary["source"]


def our_training(
    recipe: Recipe, seed: int, prepared: Path, folder: Path, sentences: int
) -> tuple[Driven, dict[str, Any]]:
    """A run of the recipe that waits for its turns, and what it can be asked for between them."""
    task = load_part("tasks", recipe.task, "ours.yaml").Task(recipe, prepared)
    torch.manual_seed(seed)
    model, _ = model_of(recipe, prepared)
    train: Any = recipe.train
    run = Driven(task, model, train, seed, folder, WorkerContext(device=torch.device("cpu")))

    def validate() -> dict[str, Any]:
        start = time.perf_counter()
        run.validate()
        return {"seconds": time.perf_counter() - start, "best_update": run.progress.best_step}

    def use_best() -> dict[str, Any]:
        restore_best(run.model, folder)
        return {}

    translator = ProcessPoolExecutor(
        1, get_context("spawn"), start_translator, (recipe, torch.get_num_threads(), prepared, sentences)
    )

    def translated(beam: int, batch: int, length: int | None) -> dict[str, Any]:
        weights = folder / "to_translate.safetensors"
        checkpoint.save_tensors(run.model.state_dict(), weights)
        return translator.submit(translate, weights, beam, batch, length).result()

    return run, {"validate": validate, "use_best": use_best, "translate": translated}


def main() -> None:
    path, threads, prepared, folder, seed, sentences = sys.argv[1:]
    torch.set_num_threads(int(threads))
    keep_freed_memory()
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir(parents=True)
    recipe = check(Recipe, {"name": "beside_joeynmt", **read_yaml(Path(path))}, path)
    run, does = our_training(recipe, int(seed), Path(prepared), Path(folder), int(sentences))
    run.pace = Pace(does, sum(parameter.numel() for parameter in run.model.parameters()))
    try:
        run.run()
        run.journal = None  # closed; what is validated from here on is not journalled
        while True:  # the schedule has come to its end: a turn holds no update any more
            run.pace.end_turn()
            run.pace.wait()
    except Ended:
        return


if __name__ == "__main__":
    main()
