"""Stage `evaluate`: metrics with intervals from the predictions; seconds, so a new metric rescores without retraining."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

from unroll.config import Recipe, load_part, load_recipe, nearest
from unroll.errors import UserError
from unroll.files import new_folder
from unroll.journal import Journal, history
from unroll.metrics import Score, ScoreOfSums, Statistics, Unavailable
from unroll.metrics._breakdown import by_length, examples
from unroll.metrics._predictions import SENTENCES, Sentence, read_sentences
from unroll.pictures import draw_all
from unroll.place import Place, read_description
from unroll.report.attention import read_attention
from unroll.report.plots import save_attention, save_losses
from unroll.revision import commit
from unroll.tracking import sent_to_tracker

CURVE_POINTS = 500
"""Points kept of each curve for the report."""


def evaluate(root: Path, name: str, tiny: bool = False, track: bool = True) -> Path:
    """Write `results/<suite>/<recipe>.json` (kept in git) and `evaluations/<suite>/<recipe>/` (for the report).

    Raises:
        UserError: nothing to compute, an unknown metric or option, predictions missing or damaged.
    """
    recipe, place = load_recipe(root, name, tiny=tiny, model=False), Place(root)
    name = recipe.name
    scores = _available(recipe, place)
    names = list(scores)
    first = recipe.seeds[0]
    result = {
        "recipe": name,
        "title": recipe.title or name,
        "task": recipe.task,
        "dataset": recipe.dataset,
        "model": recipe.model,
        "configuration": recipe.model_dump(mode="json", include={"model", "train", "predict"}, exclude_unset=True),
        "split": recipe.predict.get("split", "test"),
        "test_set": recipe.evaluate.get("test_set", ""),
        "seeds": recipe.seeds,
        "commit": commit(root),
        "data_hash": read_description(place.model(recipe, first))["data_hash"],
        "primary": names[0],
        "metrics": {metric: _summary(each) for metric, each in scores.items()},
        "reference": recipe.reference.model_dump(mode="json") if recipe.reference else None,
        "cost": _cost(recipe, place),
    }
    path = root / "results" / recipe.suite / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    _keep_details(recipe, place, names, root / "evaluations" / recipe.suite / name)
    for index, seed in enumerate(recipe.predicted_seeds):
        _journal(recipe, place, seed, {metric: each[index].value for metric, each in scores.items()}, track)
    return path


def _metrics(recipe: Recipe) -> list[str]:
    """The metrics of a recipe; what else `evaluate` says are their options, and the test set's name."""
    place, names = f"recipes.{recipe.name}.evaluate", recipe.evaluate.get("metrics")
    if not names:
        raise UserError(f"{place}.metrics: missing; name at least one file of metrics/")
    allowed = ["metrics", "test_set", *names]
    for key in recipe.evaluate:
        if key not in allowed:
            raise UserError(f"{place}: unknown key {key!r}{nearest(key, allowed)}")
    test_set = recipe.evaluate.get("test_set", "")
    if not isinstance(test_set, str):
        raise UserError(f"{place}.test_set: {test_set!r} found, a name such as multi30k-de-en/test is expected")
    return list(names)


def _available(recipe: Recipe, place: Place) -> dict[str, list[Score]]:
    """The scores of every seed by each metric; those that need what is not on this machine are named and left out.

    Raises:
        UserError: there is not one that can be computed.
    """
    scores, missing = {}, []
    for metric in _metrics(recipe):
        try:
            scores[metric] = _scores(recipe, place, metric)
        except Unavailable as error:
            missing.append(str(error))
            print(f"left out: {error}", flush=True)
    if not scores:
        raise UserError(f"recipes.{recipe.name}.evaluate.metrics: none can be computed here: {'; '.join(missing)}")
    return scores


def _scores(recipe: Recipe, place: Place, metric: str) -> list[Score]:
    """The score of every seed."""
    module = load_part("metrics", metric, f"recipes.{recipe.name}.evaluate.metrics")
    options = recipe.evaluate.get(metric, {})
    return [module.compute(place.predictions(recipe, seed), options) for seed in recipe.predicted_seeds]


def _summary(scores: list[Score]) -> dict[str, Any]:
    """The score of the first seed with its interval; with several seeds also every value, mean and deviation."""
    entry: dict[str, Any] = scores[0].to_json()
    if len(scores) > 1:
        values = [score.value for score in scores]
        entry["per_seed"] = [score.to_json()["value"] for score in scores]
        if all(map(math.isfinite, values)):
            entry |= {"mean": statistics.fmean(values), "deviation": statistics.stdev(values)}
    return entry


def _journal(recipe: Recipe, place: Place, seed: int, values: dict[str, float], track: bool) -> None:
    """Add scores and samples to the run they belong to, if it was made on this machine."""
    identity = read_description(place.model(recipe, seed)).get("identity")  # the code may have changed since it ran
    run = place.root / "runs" / f"{recipe.name}-{identity}" / f"seed-{seed}"
    predictions = place.predictions(recipe, seed)
    if not (run / "journal.jsonl").exists():
        return
    with sent_to_tracker(run, place.root, track):
        with Journal(run) as journal:
            journal.scores({f"test/{metric}": value for metric, value in values.items()})
            kept = place.root / "evaluations" / recipe.suite / recipe.name
            artifacts = {
                predictions / "samples.jsonl": "samples",
                kept / "examples.json": "samples",
                kept / "losses.png": "plots",
                kept / "attention": "attention",
                kept / "pictures": "pictures",
            }
            for path, to in artifacts.items():
                if path.exists():
                    journal.artifact(path, to)


def _keep_details(recipe: Recipe, place: Place, names: list[str], out: Path) -> None:
    """What the report needs beside the scores, of the first seed."""
    first = recipe.seeds[0]
    predictions = place.predictions(recipe, first)
    found: dict[str, tuple[Statistics, ScoreOfSums]] = {}
    for metric in names:
        module = load_part("metrics", metric, "metrics")
        added_up = module.statistics(predictions, recipe.evaluate.get(metric, {}))
        if added_up is not None:
            found[metric] = added_up, module.score
    kept = {name: {"values": s.values.tolist(), "conditions": s.conditions} for name, (s, _) in found.items()}
    with new_folder(out) as partial:
        (partial / "statistics.json").write_text(json.dumps(kept))
        curves = history(place.history(recipe, first), limit=CURVE_POINTS)
        lines = [{"step": at, "time": when, key: value} for key, points in curves.items() for at, when, value in points]
        (partial / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        save_losses(lines, partial / "losses.png")
        for name in ("samples.jsonl", "attention.jsonl"):
            if (predictions / name).exists():
                shutil.copyfile(predictions / name, partial / name)
        if (predictions / SENTENCES).exists():
            _keep_sentences(read_sentences(predictions), found, partial)
            _draw_attention(partial)
        draw_all(predictions, partial)


def _keep_sentences(
    sentences: list[Sentence], metrics: dict[str, tuple[Statistics, ScoreOfSums]], folder: Path
) -> None:
    """Scores by length of the source, of the metrics over sentences, and example sentences."""
    of_sentences = {name: metric for name, metric in metrics.items() if len(metric[0].values) == len(sentences)}
    (folder / "lengths.json").write_text(json.dumps(by_length(sentences, of_sentences)))
    (folder / "examples.json").write_text(json.dumps(examples(sentences)))


def _draw_attention(folder: Path) -> None:
    """A picture for the tracker of each sentence of `attention.jsonl`; the report draws its own."""
    kept = folder / "attention.jsonl"
    for attention in read_attention(kept) if kept.exists() else []:
        if attention.fits and attention.weights.size:
            (folder / "attention").mkdir(exist_ok=True)
            save_attention(attention, folder / "attention" / f"sentence-{attention.number}.png")
        else:
            print(f"sentence {attention.number}: its attention is empty or too large to be drawn", flush=True)


def _cost(recipe: Recipe, place: Place) -> dict[str, Any]:
    """The cost of training, averaged over seeds; an ensemble costs all of them together."""
    costs = [json.loads((place.history(recipe, seed) / "cost.json").read_text()) for seed in recipe.seeds]
    mean = dict(costs[0])
    for key in ("minutes", "tokens_per_second", "peak_memory_mb"):
        mean[key] = statistics.fmean(cost[key] for cost in costs)
    if len(recipe.predicted_seeds) < len(recipe.seeds):
        for key in ("minutes", "parameters"):
            mean[key] = sum(cost[key] for cost in costs)
    return mean
