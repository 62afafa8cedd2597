"""The training loop: an interruption, accumulation or another checkpoint rhythm changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from project import ADAM, project

from unroll.config import Training
from unroll.journal import history
from unroll.training import checkpoint
from unroll.training.context import WorkerContext, row_slices
from unroll.training.loop import NonFiniteError, Preempted, Run, seed_generators, step_seed
from unroll.training.runs import build, train_one

DROPOUT = {"name": "recurrent_lm", "width": 12, "embedding": 8, "layers": 2, "dropout": {"between": 0.3, "weight": 0.2}}


def trained_weights(root: Path, **options: Any) -> dict[str, torch.Tensor]:
    recipe, place = project(root, **options)
    train_one(recipe, 1, place, WorkerContext())
    return checkpoint.load_tensors(place.model(recipe, 1) / "weights.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class StopsAt(WorkerContext):
    """Asks for a stop at one step, as SIGTERM would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.calls, self.step = 0, step

    def wants_stop(self) -> bool:
        self.calls += 1
        return self.calls == self.step


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"random_windows": True, "window": 20},
        {"optimizer": {**ADAM, "averaging": "ema"}, "select": "last"},
        {"optimizer": {**ADAM, "name": "sgd", "averaging": "nt_asgd", "trigger": 1}, "precision": "bf16"},
    ],
)
def test_a_run_stopped_twice_ends_with_the_same_weights_bit_for_bit(tmp_path: Path, train: dict[str, Any]) -> None:
    model = {**DROPOUT}
    undisturbed = trained_weights(tmp_path / "a", model=model, train=train)
    recipe, place = project(tmp_path / "b", model=model, train=train)
    for stop in (7, 16):
        with pytest.raises(Preempted):
            train_one(recipe, 1, place, StopsAt(stop))
    train_one(recipe, 1, place, WorkerContext())
    assert same(undisturbed, checkpoint.load_tensors(place.model(recipe, 1) / "weights.safetensors"))


def test_a_resumed_run_journals_every_step_once(tmp_path: Path) -> None:
    recipe, place = project(tmp_path)
    with pytest.raises(Preempted):
        train_one(recipe, 1, place, StopsAt(17))
    train_one(recipe, 1, place, WorkerContext())
    steps = [point.step for point in history(place.history(recipe, 1))["train/loss"]]
    assert steps == list(range(1, 41))


def test_accumulation_changes_the_losses_by_rounding_alone(tmp_path: Path) -> None:
    losses = []
    for name, train in (("a", {}), ("b", {"rows_per_pass": 2}), ("c", {"rows_per_pass": 3})):
        recipe, place = project(tmp_path / name, model=DROPOUT, train=train)
        train_one(recipe, 1, place, WorkerContext())
        losses.append([point.value for point in history(place.history(recipe, 1))["train/loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_the_best_weights_are_exported_not_the_last(tmp_path: Path) -> None:
    recipe, place = project(tmp_path, train={"optimizer": {**ADAM, "learning_rate": 0.5}, "select": "best"})
    cost = train_one(recipe, 1, place, WorkerContext())
    validation = history(place.history(recipe, 1))["validation/loss"]
    assert cost["best_step"] == min(validation, key=lambda point: point.value).step


def test_patience_ends_a_run_that_no_longer_improves(tmp_path: Path) -> None:
    recipe, place = project(
        tmp_path, train={"optimizer": {**ADAM, "learning_rate": 5.0}, "patience": 1, "validate_every": 2}
    )
    assert train_one(recipe, 1, place, WorkerContext())["steps"] < 40


def test_a_non_finite_loss_stops_before_the_update_and_names_step_and_rows(tmp_path: Path) -> None:
    recipe, place = project(tmp_path)
    task, model = build(recipe, place)
    assert isinstance(recipe.train, Training)
    run = Run(task, model, recipe.train, 1, tmp_path / "run", WorkerContext())
    batches = next(iter(task.loader(1, run.context, None)))
    run.step(batches)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    healthy = task.loss

    def poisoned(*arguments: Any) -> Any:
        loss = healthy(*arguments)
        loss.total.fill_(float("nan"))
        return loss

    task.loss = poisoned
    with pytest.raises(NonFiniteError, match=r"^step 1: the loss is not finite .*rows 0 to 3"):
        run.step(batches)
    assert same(before, model.state_dict())


def test_clipping_rescues_a_run_that_diverges_without_it(tmp_path: Path) -> None:
    """Pascanu et al. 2013: exploding gradients throw a recurrent network out of the region where it learns."""
    model = {"name": "recurrent_lm", "cell": "rnn", "width": 12, "embedding": 8, "layers": 1}
    last = {}
    for clip in (None, 0.1):
        optimizer = {"name": "sgd", "learning_rate": 20.0, "clip": clip}
        recipe, place = project(tmp_path / str(clip), model=model, train={"optimizer": optimizer, "steps": 100})
        train_one(recipe, 1, place, WorkerContext())
        points = [point.value for point in history(place.history(recipe, 1))["train/loss"]]
        first, last[clip] = points[0], sum(points[-10:]) / 10
    assert last[None] > first
    assert last[0.1] < 0.8 * first


def test_rows_are_shared_without_gap_or_overlap() -> None:
    for rows, workers, rows_per_pass in [(8, 2, 2), (7, 3, 1), (20, 8, None), (5, 5, 3)]:
        train = Training.model_validate({"batch": rows, "steps": 1, "rows_per_pass": rows_per_pass, "optimizer": ADAM})
        slices = [part for rank in range(workers) for part in row_slices(train, WorkerContext(rank, workers))]
        assert [row for part in slices for row in range(part.start, part.stop)] == list(range(rows))


def test_a_finished_run_starts_anew_when_asked_again(tmp_path: Path) -> None:
    recipe, place = project(tmp_path)
    first = train_one(recipe, 1, place, WorkerContext())
    assert not (place.run(recipe, 1) / "checkpoints").exists()
    assert train_one(recipe, 1, place, WorkerContext())["steps"] == first["steps"] == 40


def test_seeding_is_that_of_torch() -> None:
    for seed in (0, step_seed(7, 123_456, 3), step_seed(10**6, 10**6, 5), 2**64 - 1):
        torch.manual_seed(seed)
        expected = torch.rand(5)
        seed_generators(seed)
        assert torch.equal(torch.rand(5), expected)
