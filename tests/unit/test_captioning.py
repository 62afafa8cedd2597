"""The captioning task on a few generated scenes: batches, losses, validation, predictions, baselines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unroll.config import DatasetEntry, Recipe
from unroll.data.loader import Batch
from unroll.data.media import encode_clip, encode_jpeg
from unroll.datasets import drawn_scenes
from unroll.decoding.conditional import LengthOptions, greedy
from unroll.errors import UserError
from unroll.layers.generator import eos
from unroll.losses.cider import Cider
from unroll.pictures import draw_all
from unroll.place import Place
from unroll.stages import caption as caption_stage
from unroll.tasks.captioning import HardAttention, Task, doubly_stochastic, reinforce, token_cider
from unroll.tasks.generation import with_any_words
from unroll.training.context import WorkerContext
from unroll.training.runs import build, train_one

MODELS: dict[str, dict[str, Any]] = {
    "show_tell": {"encoder": {"widths": [8], "stem": 8}, "embedding": 8, "width": 8},
    "show_attend_tell": {"encoder": {"widths": [8], "stem": 8}, "region": 8, "embedding": 8, "width": 8},
    "s2vt": {"encoder": {"widths": [8], "stem": 8}, "frame": 8, "embedding": 8, "width": 8, "attention": "general"},
    "nearest_image": {},
    "one_reference": {},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("project")
    for media in ("image", "clip"):
        options = {"media": media, "side": 32, "frames": 4, "samples": {"train": 20, "validation": 6, "test": 9}}
        entry = DatasetEntry(preparer="drawn_scenes", licence="none", options=options)
        drawn_scenes.prepare(entry, media, root, root / "data" / "prepared" / media)
    return Place(root)


def recipe(name: str, data: str = "image", objective: dict[str, Any] | None = None, **train: Any) -> Recipe:
    training: dict[str, Any] = {"batch": 5, "steps": 3, "optimizer": {"learning_rate": 0.01}, **train}
    training["objective"] = {"side": 32, "frames": 3, **(objective or {})}
    fitted = name in ("nearest_image", "one_reference")
    return Recipe(name="caption", suite="demo", task="captioning", dataset=data, model={"name": name, **MODELS[name]},
                  train={"counting": True} if fitted else training, evaluate={},
                  predict={"beam": {"width": 2, "longest": 30 if fitted else 6}})  # fmt: skip


def first_batch(task: Task, seed: int = 1) -> Batch:
    with task.loader(seed, WorkerContext(), None) as loader:
        return next(iter(loader))[0]


def test_a_batch_has_every_picture_once_and_all_its_captions(place: Place) -> None:
    task = Task(recipe("show_tell"), place.data("image"))
    batch = first_batch(task)
    assert batch.tensors["image"].shape == (5, 32, 32, 3)
    assert batch.tensors["image"].dtype == torch.uint8
    assert len(batch.tensors["tokens"]) == len(batch.tensors["targets"]) == 25
    assert batch.total_rows == 5
    assert batch.weight == int((batch.tensors["targets"] >= 0).sum())
    clips = first_batch(Task(recipe("s2vt", "clip"), place.data("clip")))
    assert clips.tensors["frames"].shape == (5, 3, 32, 32, 3)
    assert clips.tensors["frame_counts"].tolist() == [3] * 5


def test_some_captions_are_drawn_for_each_epoch_and_all_count_in_validation(place: Place) -> None:
    task = Task(recipe("show_tell", objective={"captions": 2}), place.data("image"))
    batch = first_batch(task)
    assert len(batch.tensors["tokens"]) == 10
    assert torch.equal(first_batch(task).tensors["tokens"], batch.tensors["tokens"])
    sample = {"caption_ids": [np.array([number]) for number in range(5)]}
    drawn = {
        tuple(int(ids[0]) for ids in task.collate(1).captions(sample, key) if ids is not None) for key in range(40)
    }
    assert len(drawn) > 10
    assert all(len(set(each)) == 2 for each in drawn)
    assert len(task.collate().captions(sample, 7)) == 5


def test_the_loss_is_that_of_each_caption_with_its_picture(place: Place) -> None:
    task, model = build(recipe("show_attend_tell"), place)
    batch = first_batch(task)
    together = float(task.loss(model.eval(), batch, None).total)
    alone = 0.0
    for row in range(25):
        tensors = {"image": batch.tensors["image"][row // 5 : row // 5 + 1]}
        tensors |= {name: batch.tensors[name][row : row + 1] for name in ("tokens", "targets")}
        alone += float(task.loss(model, Batch(tensors, 1, 0, 1, {}, ""), None).total)
    assert together == pytest.approx(alone, rel=1e-5)


def test_a_picture_with_fewer_captions_is_filled_up_with_rows_that_count_nothing(place: Place) -> None:
    task = Task(recipe("show_tell"), place.data("image"))
    samples = [task_sample(task, number) for number in range(2)]
    samples[1]["caption_ids"] = samples[1]["caption_ids"][:2]
    tensors = task.collate()(samples, [0, 1])
    assert len(tensors["tokens"]) == 10
    assert (tensors["targets"][7:] == -1).all()
    assert tensors["image"].shape[0] == 2
    assert task.collate()([], [])["image"].shape == (0, 32, 32, 3)


def task_sample(task: Task, number: int) -> dict[str, Any]:
    from unroll.data.shards import SampleReader

    return SampleReader(task.folder, "train").sample(0, number)


def test_doubly_stochastic_by_hand() -> None:
    attention = torch.tensor([[[0.5, 0.5], [1.0, 0.0], [0.3, 0.7]]])
    found = doubly_stochastic(attention, torch.tensor([[4, 5, -1]]))  # the last step is padding
    assert float(found) == pytest.approx(2 * ((1 - 1.5) ** 2 + (1 - 0.5) ** 2))


def test_reinforce_favours_choices_that_did_better_than_the_baseline() -> None:
    chosen = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]], requires_grad=True)
    baseline = torch.full((2, 2), -1.0, requires_grad=True)
    extras = {"log_choice": chosen, "entropy": torch.zeros(2, 2), "baseline": baseline}
    rewards, targets = torch.tensor([[-0.5, -0.5], [-3.0, -9.0]]), torch.tensor([[1, 2], [1, -1]])
    reinforce(extras, rewards, targets, HardAttention()).backward()
    assert chosen.grad is not None
    assert baseline.grad is not None
    assert chosen.grad.tolist() == [
        [-0.5, -0.5],
        [2.0, 0.0],
    ]  # less loss = more likely for the first, less for the other
    assert baseline.grad.tolist() == [[-0.5, -0.5], [2.0, 0.0]]


def test_token_cider_is_of_the_best_where_it_repeats_a_person(place: Place) -> None:
    captions = [[np.array([1, 2, 3, 4, 5]), np.array([1, 2, 3, 4, 6])], [np.array([7, 8, 9, 3, 5])]]
    scores = token_cider([[1, 2, 3, 4, 5], [7, 8, 9, 3, 5]], captions, 20)
    assert scores[1] == pytest.approx(10)
    assert 4 < scores[0] < 10


def test_the_reward_counts_the_end_of_a_caption(place: Place) -> None:
    task = Task(recipe("show_tell"), place.data("image"))
    targets = first_batch(task).tensors["targets"][:5]
    whole = targets[:1]
    cut = torch.where(whole == eos(task.vocabulary["target"]), -1, whole)
    costs = task.costs(torch.cat([whole, cut]), targets, 1)
    assert costs.shape == (1, 2)
    assert costs[0, 0] < costs[0, 1]
    assert isinstance(task.cider, Cider)


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("show_tell", {"captions": 2, "scheduled_sampling": 0.3, "augmentation": {"smallest": 0.7, "flip": True}}),
        ("show_attend_tell", {"word_replacement": 0.3, "spare_missing": "both", "captions": 2}),
        ("show_attend_tell", {"doubly_stochastic": 0.1, "validation": "cider"}),
        ("show_attend_tell", {"hard": {"reward": 0.5}}),
        ("show_tell", {"sequence": {"loss": "self_critical", "reward": "cider", "search": "sample", "candidates": 2, "longest": 9}}),
        ("show_tell", {"sequence": {"loss": "risk", "reward": "cider", "candidates": 2, "longest": 9}, "captions": 1}),
    ],
)  # fmt: skip
def test_every_objective_trains(name: str, objective: dict[str, Any], place: Place) -> None:
    made = recipe(name, objective=objective)
    if "hard" in objective:
        made = made.model_copy(update={"model": {**made.model, "hard": True}})
    cost = train_one(made, 1, place, WorkerContext())
    assert cost["steps"] == 3
    assert cost["parameters"] > 0


def test_a_loss_over_captions_can_leave_the_encoder_alone(place: Place) -> None:
    sequence = {"loss": "self_critical", "reward": "cider", "search": "sample", "candidates": 2, "longest": 9}
    for reached in (True, False):
        told = {"sequence": {**sequence, "token_weight": 0.0, "encoder": reached}}
        task, model = build(recipe("show_attend_tell", objective=told), place)
        task.loss(model.train(), first_batch(task), None).objective.backward()
        moved = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
        assert "cell.weight_hidden" in moved
        assert any(name.startswith("vision.") for name in moved) == reached


def test_replaced_words_are_read_and_not_asked_for() -> None:
    tokens = torch.tensor([[9, 1, 2, 3, 4, 5]]).repeat(200, 1)  # BOS is 9
    read = with_any_words(tokens, 0.25, 9)
    assert torch.equal(read[:, 0], tokens[:, 0])
    assert int(read[:, 1:].max()) <= 8
    changed = (read != tokens)[:, 1:].float().mean()
    assert float(changed) == pytest.approx(0.25 * 8 / 9, abs=0.04)


def test_parts_give_the_sums_of_one_pass(place: Place) -> None:
    losses = []
    for rows in (None, 2):
        task, _ = build(recipe("show_attend_tell", rows_per_pass=rows), place)
        torch.manual_seed(1)
        _, model = build(recipe("show_attend_tell"), place)
        with task.loader(1, WorkerContext(), None) as loader:
            batches = next(iter(loader))
        assert len(batches) == (1 if rows is None else 3)
        losses.append(sum(float(task.loss(model.eval(), batch, None).total) for batch in batches))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "data"),
    [("show_attend_tell", "image"), ("s2vt", "clip"), ("nearest_image", "image"), ("nearest_image", "clip"),
     ("one_reference", "image")],
)  # fmt: skip
def test_predictions_are_complete_and_drawn(name: str, data: str, place: Place, tmp_path: Path) -> None:
    made = recipe(name, data)
    train_one(made, 1, place, WorkerContext())
    task, model = build(made, place)
    if name in ("nearest_image", "one_reference"):
        task.fit(model)
    task.predict(model.eval(), tmp_path, 1, torch.device("cpu"))
    lines = [json.loads(line) for line in (tmp_path / "translations.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(9))
    assert all(line["source"] == f"test-{line['id']:06d}" and line["truth"]["objects"] for line in lines)
    assert all(len(line["references"]) == (4 if name == "one_reference" else 5) for line in lines)
    assert ("looked" in lines[0]) == (name == "show_attend_tell")
    assert json.loads((tmp_path / "lexicon.json").read_text())["disc"] == ["shape", "circle"]
    drawn = draw_all(tmp_path, tmp_path)
    assert drawn == (9 if name == "show_attend_tell" or data == "clip" else 3)
    if name == "nearest_image":
        said = {line["hypothesis"] for line in lines}
        assert said <= {first for number in range(20) for first in task_sample(task, number)["captions"]}


def test_what_predicts_sees_as_the_last_phase_of_training_did(place: Place) -> None:
    """A first phase with one frame of each clip would otherwise make a model that learnt from three predict from one."""
    two = recipe("s2vt", "clip", {"frames": 1}, then={"steps": 2, "objective": {"frames": 3}})
    task, model = build(two, place)
    [(_, memory)] = list(task.memories(model, "test", 100, torch.device("cpu")))
    assert memory["mask"].shape == (9, 3)
    assert task.description["caption"]["frames"] == 3
    first = two.model_copy(update={"train": two.train.first_phase()})
    assert first_batch(build(first, place)[0]).tensors["frames"].shape[1] == 1


def test_the_nearest_picture_of_a_training_picture_is_itself(place: Place) -> None:
    task, model = build(recipe("nearest_image"), place)
    with pytest.raises(UserError, match="nothing was remembered"):
        model.encode(task.collate().pictures([task_sample(task, 0)], [0]))
    task.fit(model)
    for number in (0, 7):
        sample = task_sample(task, number)
        [found] = greedy(model, model.encode(task.collate().pictures([sample], [0])), LengthOptions(longest=50))
        assert found.tokens == sample["caption_ids"][0].tolist()
        assert found.log_probability == 0


def test_mistakes_are_named(place: Place) -> None:
    task, model = build(recipe("s2vt"), place)
    batch = first_batch(task)
    with pytest.raises(UserError, match="reads frames, the data set gives image"):
        task.loss(model, batch, None)
    by_tokens = Task(recipe("show_tell", batch=None, batch_tokens=100), place.data("image"))
    with pytest.raises(UserError, match=r"train.batch: missing; this task batches by it"):
        by_tokens.plan("train", 1)
    with pytest.raises(UserError, match="captioning knows cider"):
        Task(recipe("show_tell", objective={"sequence": {"reward": "bleu"}}), place.data("image")).options  # noqa: B018


@pytest.mark.parametrize(("name", "data"), [("show_attend_tell", "image"), ("s2vt", "clip")])
def test_files_are_captioned_and_the_attention_drawn(
    name: str, data: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    made = recipe(name, data)
    train_one(made, 1, place, WorkerContext())
    monkeypatch.setattr(caption_stage, "load_recipe", lambda root, name: made)
    files = [tmp_path / "photo.jpg", tmp_path / "clip.mp4"]
    pixels = np.random.default_rng(1).integers(0, 256, (6, 40, 60, 3), dtype=np.uint8)
    files[0].write_bytes(encode_jpeg(pixels[0]))
    files[1].write_bytes(encode_clip(pixels, 8))
    picture = tmp_path / "attention.png"
    capsys.readouterr()
    caption_stage.caption(place.root, "caption", files, 2, 1, picture)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(path) for path in files]
    assert picture.read_bytes().startswith(b"\x89PNG")
    caption_stage.caption(place.root, "caption", files[:1], 2, 2, None)
    scores = [float(line.split("\t")[0]) for line in capsys.readouterr().out.splitlines()]
    assert scores == sorted(scores, reverse=True)
    files[0].write_bytes(b"\xff\xd8\xff but no more")
    for wrong, message in ((files[0], "photo.jpg"), (tmp_path / "none.png", "No such file")):
        with pytest.raises(UserError, match=message):
            caption_stage.caption(place.root, "caption", [wrong], 2, 1, None)
