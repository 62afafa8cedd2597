"""The translation task on a small prepared set: batches, loss, validation, predictions."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_pairs import lines, prepare_pairs, recipe

from unroll.data.loader import MASKED
from unroll.errors import UserError
from unroll.place import Place
from unroll.tasks.translation import Task, chosen, gleu
from unroll.training.context import WorkerContext
from unroll.training.runs import build


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return prepare_pairs(tmp_path_factory.mktemp("project"))


def first_batches(task: Task, count: int, context: WorkerContext | None = None, **start: Any) -> list[Any]:
    with task.loader(1, context or WorkerContext(), start.get("position")) as loader:
        return [batches for _, batches in zip(range(count), loader, strict=False)]


def test_pairs_are_framed_by_their_symbols(place: Place) -> None:
    task, _ = build(recipe(), place)
    size = task.vocabulary["target"]
    [[batch]] = first_batches(task, 1)
    tokens, targets = batch.tensors["tokens"], batch.tensors["targets"]
    assert (tokens[:, 0] == size - 2).all()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        length = wanted.index(size - 1)
        assert row[1 : length + 1] == wanted[:length]
        assert set(wanted[length + 1 :]) <= {MASKED}
    source, lengths = batch.tensors["source"], batch.tensors["source_lengths"]
    assert all(row[length - 1] == task.vocabulary["source"] - 1 for row, length in zip(source, lengths, strict=True))
    assert batch.weight == int((targets != MASKED).sum())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_batches_keep_to_their_size_and_are_padded_little(place: Place, dropout: float) -> None:
    task, _ = build(recipe({"subword_dropout": dropout}), place)
    real = padded = 0
    for [batch] in first_batches(task, 40):
        source, targets = batch.tensors["source"], batch.tensors["targets"]
        assert max(source.numel(), targets.numel()) <= 100
        real += int(batch.weight) + int(batch.tensors["source_lengths"].sum())
        padded += source.numel() + targets.numel()
    assert padded <= 1.25 * real


def test_subwords_are_drawn_anew_each_epoch_and_the_same_for_any_start(place: Place) -> None:
    task, _ = build(recipe({"subword_dropout": 0.3}), place)
    straight = first_batches(task, 60)
    again = first_batches(task, 3, position=straight[20][0].position)
    for [ours], [theirs] in zip(again, straight[21:24], strict=True):
        assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)
    texts: dict[str, set[tuple[int, ...]]] = {}
    for [batch] in straight:
        for row in batch.tensors["targets"].tolist():
            ids = [token for token in row if token not in (MASKED, task.vocabulary["target"] - 1)]
            texts.setdefault(task.text(ids), set()).add(tuple(ids))
    assert sum(len(cuts) > 1 for cuts in texts.values()) > len(texts) / 2


def test_two_workers_have_the_loss_of_one(place: Place) -> None:
    task, model = build(recipe(), place)
    model = model.double().eval()
    for step, [whole] in enumerate(first_batches(task, 3)):
        parts = [first_batches(task, 3, WorkerContext(rank, 2))[step] for rank in range(2)]
        loss = float(task.loss(model, whole, None).total)
        halves = [float(task.loss(model, batch, None).total) for batches in parts for batch in batches if batch.weight]
        assert sum(halves) == pytest.approx(loss, rel=1e-9)
        assert sum(batch.weight for batches in parts for batch in batches) == whole.weight


def test_validation_is_the_mean_loss_of_a_token_whatever_the_batches(place: Place) -> None:
    scores = []
    for size in (60, 400):
        torch.manual_seed(1)
        task, model = build(recipe(batch_tokens=size), place)
        scores.append(task.validate(model.double().eval(), WorkerContext()))
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)


@pytest.mark.parametrize("objective", [{"scheduled_sampling": 0.5}, {"sequence": {"loss": "risk", "candidates": 3}}])
def test_other_objectives_give_gradients(place: Place, objective: dict[str, Any]) -> None:
    torch.manual_seed(1)
    task, model = build(recipe(objective), place)
    [[batch]] = first_batches(task, 1)
    loss = task.loss(model.train(), batch, None)
    loss.objective.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.training
    assert float(loss.total) != pytest.approx(float(task.loss(model.eval(), batch, None).total))


def test_predictions_stand_in_the_order_of_the_split(place: Place, tmp_path: Path) -> None:
    torch.manual_seed(1)
    task, model = build(recipe(), place)
    task.predict(model, tmp_path, 1, torch.device("cpu"))
    found = [json.loads(line) for line in (tmp_path / "translations.jsonl").read_text().splitlines()]
    source, target = lines(15, 3)
    assert [line["id"] for line in found] == list(range(15))
    assert [line["source"] for line in found] == source
    assert [line["references"] for line in found] == [[text] for text in target]
    for line in map(json.loads, (tmp_path / "attention.jsonl").read_text().splitlines()):
        assert np.array(line["weights"]).shape == (len(line["target"]), len(line["source"]))
        assert np.allclose(np.sum(line["weights"], axis=1), 1, atol=1e-2)


def test_pictures_are_of_the_first_the_worst_and_the_longest() -> None:
    scores = [(-1.0, 5), (-9.0, 4), (-2.0, 30), (-3.0, 2)]
    found = chosen([{"id": i, "score": s, "source_tokens": n} for i, (s, n) in enumerate(scores)], 1)
    assert found == {0: "first", 1: "worst", 2: "longest"}


def test_what_does_not_fit_is_one_line(place: Place) -> None:
    task, _ = build(recipe({"subword_dropout": 0.1}, steps=None, epochs=2), place)
    with pytest.raises(UserError, match=r"recipes\.pairs\.train\.epochs: with subword_dropout .* state steps instead"):
        task.total_steps(1)
    task, _ = build(recipe(batch_tokens=None, batch=4), place)
    with pytest.raises(UserError, match=r"recipes\.pairs\.train\.batch_tokens: missing"):
        task.plan("train", 1)
    task, _ = build(recipe({"sequence": {"reward": "cider"}}), place)
    with pytest.raises(UserError, match=r"sequence: .*'cider', translation knows bleu|reward"):
        task.objective  # noqa: B018


def test_a_reference_counts_as_a_word_longer_in_the_reward(place: Place) -> None:
    """A candidate that is its reference of n words has BLEU exp(-1/n), and one that leaves its end out much less."""
    from sacrebleu import BLEU

    task, _ = build(recipe({"sequence": {"reward": "bleu"}}), place)
    [[batch]] = first_batches(task, 1)
    targets = batch.tensors["targets"]
    words = [BLEU().sentence_score(text, [text]).ref_len for text in map(task.text, targets.tolist())]
    costs = task.costs(targets, targets, len(targets))[:, 0]
    assert costs.tolist() == pytest.approx([1 - np.exp(-1 / count) for count in words], abs=1e-5)
    cut = torch.where(torch.arange(targets.shape[1]) < 2, targets, MASKED)
    assert (task.costs(cut, targets, len(targets))[:, 0] >= costs - 1e-6).all()


def test_gleu_is_the_smaller_of_precision_and_recall_of_all_n_grams() -> None:
    """Written out as in Wu et al. 2016, section 5.2."""
    from sacrebleu import BLEU

    def n_grams(text: str) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))

    draw = random.Random(5)
    metric = BLEU(effective_order=True)
    for _ in range(50):
        text, reference = (" ".join(draw.choices("abc", k=draw.randint(1, 9))) for _ in range(2))
        ours, theirs = n_grams(text), n_grams(reference)
        common = (ours & theirs).total()
        expected = min(common / ours.total(), common / theirs.total())
        assert gleu(metric.sentence_score(text, [reference])) == pytest.approx(expected)
    assert gleu(metric.sentence_score("", ["a b"])) == 0.0
