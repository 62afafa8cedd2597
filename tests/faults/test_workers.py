"""Two workers compute what one computes: the same losses to rounding, dropout included."""

import json
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from project import project

from unroll.config import load_recipe
from unroll.errors import UserError
from unroll.journal import history
from unroll.place import Place
from unroll.training import checkpoint, launch
from unroll.training.context import WorkerContext
from unroll.training.loop import Preempted, Run
from unroll.training.runs import build, train_one

MODEL = {
    "name": "recurrent_lm", "layers": 2, "width": 24, "embedding": 16, "tied": True,
    "dropout": {"embedding": 0.1, "input": 0.1, "between": 0.3, "output": 0.3, "weight": 0.3},
    "activation_penalty": 1.0, "temporal_penalty": 0.5,
}  # fmt: skip
SGD = {"name": "sgd", "learning_rate": 0.3, "clip": 1.0}
ADAM = {"name": "adamw", "learning_rate": 0.001, "clip": 1.0}
TRAIN: dict[str, Any] = {
    "batch": 7,
    "steps": 200,
    "validate_every": 100,
    "checkpoint_every": 50,
    "window": 11,
    "optimizer": SGD,
}
pytestmark = pytest.mark.fault


def worker(rank: int, size: int, port: int, root: str, stop_at: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    place = Place(Path(root))
    context = StopAt(rank, size, stop_at)
    try:
        train_one(load_recipe(place.root, "small"), 1, place, context)
    except Preempted:
        (place.root / f"preempted-{rank}").touch()
    dist.destroy_process_group()


class StopAt(WorkerContext):
    """One of the workers is asked to stop; all must."""

    def __init__(self, rank: int, size: int, step: int) -> None:
        super().__init__(rank, size)
        self.calls, self.step = 0, step

    def wants_stop(self) -> bool:
        self.calls += 1
        return self.rank == 1 and self.calls == self.step


def train_with(workers: int, root: Path, stop_at: int = 0) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, args=(workers, port, str(root), stop_at), nprocs=workers)


def losses(root: Path, curve: str = "train/loss") -> list[float]:
    return [point.value for point in history(next(root.glob("histories/small/seed-1")))[curve]]


def validations(root: Path) -> list[float]:
    return losses(root, "validation/loss")


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-5),
        ({"rows_per_pass": 2, "random_windows": True, "window": 20}, 1e-5),
        # Adam divides by the root of squared gradients, and so lifts rounding errors of tiny ones to the size of a step.
        pytest.param({"optimizer": ADAM}, 1e-4, marks=pytest.mark.slow),
    ],
)
def test_two_workers_give_the_losses_of_one(tmp_path: Path, options: dict[str, Any], tolerance: float) -> None:
    one = project(tmp_path / "one", model=MODEL, train={**TRAIN, **options})
    train_one(one[0], 1, one[1], WorkerContext())
    project(tmp_path / "two", model=MODEL, train={**TRAIN, **options})
    train_with(2, tmp_path / "two")
    assert len(losses(tmp_path / "one")) == 200
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=tolerance)
    assert losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": {**ADAM, "learning_rate": 0.01}},
        pytest.param(
            {
                "optimizer": {**SGD, "averaging": "nt_asgd", "trigger": 1},
                "precision": "bf16",
                "dropout_by_place": False,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_any_number_of_workers_gives_the_same_bits_when_the_batch_is_cut_into_parts(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Dropout, both penalties, the choice of the best weights by validation, and a change of workers on the way."""
    train = {**TRAIN, "parts": 4, "validate_every": 20, "random_windows": True, "window": 20, **options}
    recipe, place = project(tmp_path / "1", model=MODEL, train=train)
    train_one(recipe, 1, place, WorkerContext())
    assert losses(tmp_path / "1")[-1] < losses(tmp_path / "1")[0]
    for workers, stop_at in [(2, 0), (4, 117)]:
        recipe, other = project(tmp_path / str(workers), model=MODEL, train=train)
        train_with(workers, tmp_path / str(workers), stop_at)
        if stop_at:
            train_one(recipe, 1, other, WorkerContext())
        assert losses(tmp_path / str(workers)) == losses(tmp_path / "1")
        assert validations(tmp_path / str(workers)) == validations(tmp_path / "1")
        for name in ("weights.safetensors", "model.json"):
            assert (other.model(recipe, 1) / name).read_bytes() == (place.model(recipe, 1) / name).read_bytes()


def test_workers_that_cannot_share_the_parts_are_refused(tmp_path: Path) -> None:
    recipe, place = project(tmp_path, train={**TRAIN, "parts": 4})
    task, model = build(recipe, place)
    run = Run(task, model, recipe.train, 1, tmp_path, WorkerContext(rank=0, size=3))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"4 parts cannot be shared evenly by 3 workers \(allowed workers: 1, 2, 4\)"):
        run.run()


def test_workers_stop_together_and_another_number_of_them_goes_on(tmp_path: Path) -> None:
    train = {**TRAIN, "steps": 60, "checkpoint_every": 20}
    one = project(tmp_path / "one", model=MODEL, train=train)
    train_one(one[0], 1, one[1], WorkerContext())
    root = tmp_path / "changing"
    recipe, place = project(root, model=MODEL, train=train)
    train_with(2, root, stop_at=27)
    assert sorted(path.name for path in root.glob("preempted-*")) == ["preempted-0", "preempted-1"]
    found, _ = checkpoint.newest(place.run(recipe, 1) / "checkpoints")
    assert found is not None
    assert found.state["step"] == 27
    assert all(len(rows) == 7 for rows in found.carry.values())
    train_one(recipe, 1, place, WorkerContext())
    assert losses(root) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_two_workers_resume_bit_for_bit(tmp_path: Path) -> None:
    weights = []
    train = {**TRAIN, "steps": 50, "checkpoint_every": 20}
    for name, stop in (("straight", 0), ("stopped", 33)):
        recipe, place = project(tmp_path / name, model=MODEL, train=train)
        if stop:
            train_with(2, tmp_path / name, stop_at=stop)
        train_with(2, tmp_path / name)
        weights.append((place.model(recipe, 1) / "weights.safetensors").read_bytes())
        assert json.loads((place.history(recipe, 1) / "cost.json").read_text())["workers"] == 2
    assert weights[0] == weights[1]


def test_workers_that_ray_replaces_after_the_end_train_nothing_again(tmp_path: Path) -> None:
    """A node may die after the last step and before the command has ended."""
    recipe, place = project(tmp_path, model=MODEL, train={**TRAIN, "steps": 3})
    cost = train_one(recipe, 1, place, WorkerContext())
    before = (place.run(recipe, 1) / "journal.jsonl").read_bytes()
    again = launch._run({"root": str(tmp_path), "recipe": "small", "seed": 1}, WorkerContext())
    assert again == {"cost": cost}
    assert (place.run(recipe, 1) / "journal.jsonl").read_bytes() == before
