"""The evaluate stage: what it keeps of translations for the report and the tracker, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from project import project
from report_suite import attention, cost, translations

from unroll import journal
from unroll.config import Recipe
from unroll.errors import UserError
from unroll.journal import Journal
from unroll.place import Place
from unroll.report.build import build
from unroll.stages.evaluate import evaluate

SCORING = {"metrics": ["bleu", "chrf", "ter"], "bleu": {"lowercase": True}, "test_set": "multi30k/test"}
Changed = Callable[[list[dict[str, Any]]], object]


def translated(root: Path, evaluate: dict[str, Any] | None = None) -> tuple[Recipe, Place]:
    """A project whose recipe has predictions of two seeds, as if it had been trained on this machine."""
    recipe, place = project(root, evaluate=evaluate or SCORING, seeds=[1, 2])
    for number, seed in enumerate(recipe.seeds):
        write_predictions(recipe, place, seed, number)
        place.model(recipe, seed).mkdir(parents=True)
        described = {"data_hash": "9f" * 32, "identity": place.identity(recipe)}
        (place.model(recipe, seed) / "model.json").write_text(json.dumps(described))
        place.history(recipe, seed).mkdir(parents=True)
        (place.history(recipe, seed) / "cost.json").write_text(json.dumps(cost(counting=False)))
        for folder in (place.run(recipe, seed), place.history(recipe, seed)):
            with Journal(folder) as written:
                written.metrics(40, {"train/loss": 2.0, "validation/loss": 2.1})
    return recipe, place


def write_predictions(recipe: Recipe, place: Place, seed: int, noise: int) -> None:
    sentences = translations("attention", noise)[:40]
    lines = [{"id": i, **vars(sentence)} for i, sentence in enumerate(sentences)]
    folder = place.predictions(recipe, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "translations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    maps = [attention(sentences[i], i, "first") for i in (0, 5)]
    (folder / "attention.jsonl").write_text("".join(json.dumps(line) + "\n" for line in maps))


def test_translations_become_scores_details_and_artifacts(tmp_path: Path) -> None:
    recipe, place = translated(tmp_path)
    result = json.loads(evaluate(tmp_path, "small", track=False).read_text())
    bleu = result["metrics"]["bleu"]
    assert result["test_set"] == "multi30k/test"
    assert result["primary"] == "bleu"
    assert "case:lc" in bleu["signature"]
    assert bleu["low"] < bleu["value"] < bleu["high"]
    assert bleu["per_seed"][0] == bleu["value"]
    assert bleu["mean"] == pytest.approx(sum(bleu["per_seed"]) / 2)
    kept = tmp_path / "evaluations" / "tiny" / "small"
    found = sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file())
    assert found == [
        "attention.jsonl",
        "attention/sentence-0.png",
        "attention/sentence-5.png",
        "examples.json",
        "history.jsonl",
        "lengths.json",
        "losses.png",
        "statistics.json",
    ]
    assert list(json.loads((kept / "statistics.json").read_text())) == ["bleu", "chrf", "ter"]
    lines = list(journal.read(place.run(recipe, 1)))
    assert lines[1]["values"] == {f"test/{name}": entry["value"] for name, entry in result["metrics"].items()}
    assert {line["to"] for line in lines if line["kind"] == "artifact"} == {"samples", "plots", "attention"}
    page = build("tiny", tmp_path / "results/tiny", tmp_path / "evaluations/tiny", tmp_path / "reports/tiny")
    assert "multi30k" in page.read_text()


def test_a_score_that_changed_reaches_the_journal_and_an_unchanged_one_is_not_repeated(tmp_path: Path) -> None:
    recipe, place = translated(tmp_path)
    evaluate(tmp_path, "small", track=False)
    evaluate(tmp_path, "small", track=False)
    write_predictions(recipe, place, 1, 7)
    evaluate(tmp_path, "small", track=False)
    scored = {seed: journal.history(place.run(recipe, seed), ["test/bleu"])["test/bleu"] for seed in (1, 2)}
    assert [point.step for point in scored[1]] == [0, 0]
    assert scored[1][0].value != scored[1][1].value
    assert len(scored[2]) == 1


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        ({"metrics": ["blue"]}, r"recipes\.small\.evaluate\.metrics: no metrics/blue\.py; did you mean 'bleu'\?"),
        ({"metrics": []}, r"recipes\.small\.evaluate\.metrics: missing"),
        ({"metric": ["bleu"], "metrics": ["bleu"]}, r"small\.evaluate: unknown key 'metric'; did you mean 'metrics'\?"),
        ({"metrics": ["bleu"], "chrf": {}}, r"small\.evaluate: unknown key 'chrf'"),
        ({"metrics": ["bleu"], "test_set": 3}, r"small\.evaluate\.test_set: 3 found, a name such as"),
    ],
)
def test_mistakes_in_the_recipe_are_one_line(tmp_path: Path, scoring: dict[str, Any], message: str) -> None:
    project(tmp_path, evaluate=scoring)
    with pytest.raises(UserError, match=message) as raised:
        evaluate(tmp_path, "small", track=False)
    assert "\n" not in str(raised.value)
