"""Generated tasks: what is asked for is right, and the same whoever asks and in whatever order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unroll.config import DatasetEntry, Recipe, Source
from unroll.data.algorithms import OPERATIONS, GeneratedPlan, operation_of
from unroll.data.loader import GeneratedLoader
from unroll.datasets import algorithms
from unroll.errors import UserError
from unroll.pictures import draw_all
from unroll.place import Place
from unroll.tasks.algorithms import Task, ring, tensors_of
from unroll.training.context import WorkerContext
from unroll.training.loop import Preempted
from unroll.training.runs import load_model, train_one

ROWS = 40


def draw(name: str, size: tuple[int, ...] | None = None, **options: Any) -> Any:
    operation = operation_of(name, options, "options")
    return operation.draw(np.random.default_rng(3), ROWS, size or operation.sizes()[-1]), operation


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_fits_its_form(name: str) -> None:
    drawn, operation = draw(name)
    steps, form = drawn.inputs.shape[1], operation.form
    assert drawn.inputs.shape == (ROWS, steps, form.inputs)
    assert drawn.inputs.dtype == np.float32
    assert drawn.targets.shape == (ROWS, steps, form.groups)
    assert drawn.mask.any()
    wanted = drawn.targets[:, drawn.mask]
    if form.kind == "classes":
        assert wanted.dtype == np.int64
        assert wanted.min() >= 0
        assert wanted.max() < form.classes
    if form.kind == "bits":
        assert set(np.unique(wanted)) == {0.0, 1.0}
    assert len(np.unique(drawn.inputs.reshape(ROWS, -1), axis=0)) > ROWS / 2  # rows differ


@pytest.mark.parametrize("name", ["copy", "reverse"])
def test_copy_asks_for_the_vectors_after_the_mark(name: str) -> None:
    drawn, _ = draw(name, (5,))
    shown, wanted = drawn.inputs[:, :5, :8], drawn.targets[:, 6:]
    np.testing.assert_array_equal(wanted, shown if name == "copy" else shown[:, ::-1])
    np.testing.assert_array_equal(drawn.inputs[0, :, 8], np.arange(11) == 5)
    np.testing.assert_array_equal(drawn.mask, np.arange(11) > 5)
    assert not drawn.inputs[:, 6:].any()


def test_repeat_copy_repeats_and_ends() -> None:
    drawn, _ = draw("repeat_copy", (3, 4))
    np.testing.assert_array_equal(drawn.targets[:, 4:16, :8], np.tile(drawn.inputs[:, :3, :8], (1, 4, 1)))
    np.testing.assert_array_equal(drawn.targets[0, 4:, 8], np.arange(13) == 12)
    repeats = [draw("repeat_copy", (1, n))[0].inputs[0, 1, 9] for n in range(1, 11)]
    assert np.mean(repeats) == pytest.approx(0, abs=1e-6)
    assert np.std(repeats) == pytest.approx(1, abs=1e-6)


def test_recall_asks_for_the_item_after_the_one_asked() -> None:
    drawn, _ = draw("associative_recall", (4,))
    for inputs, targets in zip(drawn.inputs, drawn.targets, strict=True):
        items = inputs[:16].reshape(4, 4, 8)
        assert (items[:, 0, 6] == 1).all()
        places = [n for n in range(3) if np.array_equal(items[n, 1:, :6], inputs[17:20, :6])]
        assert any(np.array_equal(items[n + 1, 1:, :6], targets[-3:]) for n in places)


def test_priority_sort_gives_the_highest_first() -> None:
    drawn, _ = draw("priority_sort", (20,))
    order = np.argsort(-drawn.inputs[7, :20, 8])[:16]
    np.testing.assert_array_equal(drawn.targets[7, 21:], drawn.inputs[7, order, :8])


def test_near_priorities_are_near_and_leave_other_draws_alone() -> None:
    """Ties are common with `near`; without it, lists are what they were before there was such an option."""
    gaps = {}
    for near in (0.0, 0.5):
        drawn = operation_of("priority_sort", {"near": near}, "").draw(np.random.default_rng(3), 400, (20,))
        priorities = np.sort(drawn.inputs[:, :20, 8])
        assert np.abs(priorities).max() <= 1
        gaps[near] = float((np.diff(priorities) < 0.002).mean())
        order = np.argsort(-drawn.inputs[9, :20, 8], kind="stable")[:16]
        np.testing.assert_array_equal(drawn.targets[9, 21:], drawn.inputs[9, order, :8])
    assert gaps[0.0] < 0.03
    assert gaps[0.5] > 2 * gaps[0.0]
    generator = np.random.default_rng(3)
    plain, _ = draw("priority_sort", (20,))
    generator.integers(0, 2**64, ROWS * 20 * 8 // 64, dtype=np.uint64)  # the vectors' bits
    np.testing.assert_allclose(plain.inputs[:, :20, 8], generator.uniform(-1, 1, (ROWS, 20)), rtol=1e-6)


def test_the_adding_problem_marks_one_number_in_each_half() -> None:
    drawn, _ = draw("adding_problem", length=50)
    marks = drawn.inputs[..., 1]
    np.testing.assert_array_equal(marks[:, :25].sum(1), 1)
    np.testing.assert_array_equal(marks[:, 25:].sum(1), 1)
    np.testing.assert_allclose((marks * drawn.inputs[..., 0]).sum(1), drawn.targets[:, -1, 0], rtol=1e-6)
    many = operation_of("adding_problem", {}, "").draw(np.random.default_rng(0), 20_000, (10,))
    assert ((many.targets[:, -1] - 1) ** 2).mean() == pytest.approx(1 / 6, rel=0.03)


def test_copy_memory_waits() -> None:
    drawn, _ = draw("copy_memory", blanks=30)
    given = drawn.inputs.argmax(-1)
    np.testing.assert_array_equal(drawn.targets[:, -10:, 0], given[:, :10])
    assert (drawn.targets[:, :-10] == 8).all()
    assert (given[:, 39] == 9).all()
    assert (given[:, 40:] == 8).all()


def test_parity_counts_ones() -> None:
    drawn, _ = draw("parity")
    np.testing.assert_array_equal((drawn.inputs[:, 0] == 1).sum(1) % 2, drawn.targets[:, 0, 0])
    np.testing.assert_array_equal((drawn.inputs[:, 0] != 0).sum(1), drawn.difficulty[:, 0])


FUNCTIONS = [
    lambda x, y: not (x or y), lambda x, y: x and not y, lambda x, y: y and not x, lambda x, y: x != y,
    lambda x, y: not (x and y), lambda x, y: x and y, lambda x, y: x == y, lambda x, y: x or not y,
    lambda x, y: y or not x, lambda x, y: x or y,
]  # fmt: skip


def test_logic_evaluates_its_chain() -> None:
    drawn, _ = draw("logic", (3,), gates=4)
    for inputs, targets in zip(drawn.inputs, drawn.targets, strict=True):
        value = bool(inputs[0, 0])
        for step, target in zip(inputs, targets, strict=True):
            before, last = value, bool(step[1])
            for gate in step[2:].reshape(4, 10):
                if gate.any():
                    before, last = last, bool(FUNCTIONS[gate.argmax()](last, before))
            value = last
            assert value == target[0]


def test_addition_sums_digit_by_digit() -> None:
    drawn, _ = draw("addition")
    for inputs, targets in zip(drawn.inputs, drawn.targets, strict=True):
        total = 0
        for step, target in zip(inputs, targets, strict=True):
            digits = step.reshape(5, 10)
            total += int("".join(str(d.argmax()) for d in digits if d.any()))
            said = [str(d) for d in target if d != 10]
            assert int("".join(reversed(said))) == total


def test_dynamic_ngrams_follow_a_table() -> None:
    """With a context of one bit, and a table near 0 or 1 in most rows, most bits are those that followed before."""
    drawn, _ = draw("dynamic_ngrams", order=2, length=300)
    np.testing.assert_array_equal(drawn.inputs[:, 1:], drawn.targets[:, :-1])
    before, after = drawn.inputs[..., 0], drawn.targets[..., 0]
    rates = np.stack([(after * (before == bit)).sum(1) / np.maximum(1, (before == bit).sum(1)) for bit in (0, 1)], 1)
    assert ((rates < 0.15) | (rates > 0.85)).mean() > 0.4


# --- plan and loader -----------------------------------------------------------------------------------------------------


def batches(slices: list[slice], start: int, count: int, name: str = "copy") -> list[list[Any]]:
    plan = GeneratedPlan(operation_of(name, {}, ""), 6, seed=5)
    make = lambda step: tensors_of(plan.batch(step))  # noqa: E731
    with GeneratedLoader(make, lambda tensors: float(len(tensors["inputs"])), slices, {"step": start}) as loader:
        return [next(loader) for _ in range(count)]


def test_a_position_gives_the_same_batches_and_workers_share_them() -> None:
    whole = batches([slice(0, 6)], 0, 5)
    later = batches([slice(0, 6)], 3, 2)
    parts = [batches([rows], 0, 5) for rows in (slice(0, 3), slice(3, 6))]
    for n in range(5):
        [batch] = whole[n]
        both = torch.cat([part[n][0].tensors["inputs"] for part in parts])
        assert torch.equal(batch.tensors["inputs"], both)
        assert batch.position == {"step": n + 1}
    for n in range(2):
        assert torch.equal(later[n][0].tensors["inputs"], whole[3 + n][0].tensors["inputs"])
    shapes = {tuple(step[0].tensors["inputs"].shape) for step in whole}
    assert len(shapes) > 1  # sizes vary from step to step


# --- preparing and predicting --------------------------------------------------------------------------------------------


def prepare(out: Path, sources: list[Source] | None = None, **options: Any) -> dict[str, Any]:
    splits = {
        "validation": {"samples": 20},
        "test": {"samples": 25},
        "longer": {"samples": 4, "options": {"longest": 30}},
    }
    options = {"operation": "copy", "options": {"longest": 3, "bits": 4}, "splits": splits, **options}
    entry = DatasetEntry(preparer="algorithms", licence="none", sources=sources or [], options=options)
    return algorithms.prepare(entry, "generated", out.parent, out)


def task(folder: Path, **changes: Any) -> Task:
    recipe = {
        "name": "r", "suite": "tiny", "task": "algorithms", "dataset": "generated", "model": {}, "evaluate": {},
        "train": {"batch": 4, "steps": 3, "optimizer": {"learning_rate": 0.1}}, **changes,
    }  # fmt: skip
    return Task(Recipe(**recipe), folder)


def test_fixed_sets_hold_every_size_and_do_not_change(tmp_path: Path) -> None:
    prepare(tmp_path / "one")
    found = list(task(tmp_path / "one").fixed("test"))
    assert [(size, len(tensors["inputs"])) for size, tensors in found] == [((1,), 9), ((2,), 8), ((3,), 8)]
    again = list(task(tmp_path / "one").fixed("test"))
    for (_, first), (_, second) in zip(found, again, strict=True):
        assert torch.equal(first["inputs"], second["inputs"])
    prepare(tmp_path / "two")
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


def test_other_samples_than_those_prepared_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path / "data")
    monkeypatch.setattr("unroll.data.algorithms._bits", lambda g, rows, length, bits: np.ones((rows, length, bits)))
    with pytest.raises(UserError, match=r"splits\.test: its seed now gives other samples .* prepare it again"):
        task(tmp_path / "data").predict(torch.nn.Identity(), tmp_path, 1, torch.device("cpu"))


WRONG = [
    ({"operation": "kopy"}, "no operation 'kopy', did you mean 'copy'?".replace(",", ";", 1)),
    ({"options": {"longest": 0}}, "copy.longest: Input should be greater than or equal to 1, found 0"),
    ({"options": {"shortest": 5, "longest": 3}}, "shortest is 5, above longest, 3"),
    ({"options": {"lenght": 3}}, "unknown key 'lenght'"),
    ({"operation": "copy_memory", "options": {"blanks": 5000}}, "blanks: Input should be less than or equal to 2000"),
    ({"operation": "parity", "options": {"fewest": 20}}, "fewest is 20, above width, 16"),
    ({"splits": {"test": {"samples": 3}}}, "validation is needed, train is generated on the way; found test"),
    ({"splits": {"validation": {"samples": 3, "options": {"bits": 9}}}}, "differs from the form of training"),
    ({"sources": [Source(file="a.txt")]}, "algorithmic tasks are generated, no source is allowed"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_options_that_make_no_sense_are_refused_in_one_line(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "out", **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_recipes_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    prepare(tmp_path / "data")
    train = {"batch": 4, "optimizer": {"learning_rate": 0.1}}
    with pytest.raises(UserError, match="steps: missing; what is generated has no epochs"):
        task(tmp_path / "data", train={**train, "epochs": 1}).total_steps(1)
    with pytest.raises(UserError, match="objective.per"):
        _ = task(tmp_path / "data", train={**train, "steps": 1, "objective": {"per": "week"}}).objective
    with pytest.raises(UserError, match=r"no fixed split 'exam' \(allowed: validation, test, longer\)"):
        list(task(tmp_path / "data").fixed("exam"))


def objective(**options: Any) -> dict[str, Any]:
    return {"batch": 4, "steps": 3, "optimizer": {"learning_rate": 0.1}, "objective": options}


def test_training_may_be_drawn_otherwise_and_what_is_scored_stays(tmp_path: Path) -> None:
    prepare(tmp_path / "data")
    plain, longer = (
        task(tmp_path / "data", train=objective(drawn=drawn)) for drawn in ({}, {"shortest": 7, "longest": 9})
    )
    with longer.loader(1, WorkerContext(), None) as loader:
        lengths = {next(loader)[0].tensors["inputs"].shape[1] for _ in range(12)}
    assert lengths == {15, 17, 19}  # 2 L + 1
    for part in ("validation", "test"):
        for (size, scored), (other, found) in zip(plain.fixed(part), longer.fixed(part), strict=True):
            assert size == other
            assert torch.equal(scored["inputs"], found["inputs"])


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        ({"lenght": 3}, "recipes.r.train.objective.drawn.copy.lenght: unknown key 'lenght'"),
        ({"bits": 9}, "recipes.r.train.objective.drawn: Form"),
    ],
)
def test_training_drawn_so_that_the_model_could_not_read_it_is_refused(
    tmp_path: Path, drawn: dict[str, Any], message: str
) -> None:
    prepare(tmp_path / "data")
    with pytest.raises(UserError) as error:
        task(tmp_path / "data", train=objective(drawn=drawn)).loader(1, WorkerContext(), None)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_count_predictions_or_sequences(tmp_path: Path) -> None:
    prepare(tmp_path / "data")
    tensors = tensors_of(operation_of("copy", {"bits": 4}, "").draw(np.random.default_rng(0), 5, (3,)))
    assert task(tmp_path / "data").weight(tensors) == 5 * 3 * 4
    train = {"batch": 4, "steps": 1, "optimizer": {"learning_rate": 0.1}, "objective": {"per": "sequence"}}
    assert task(tmp_path / "data", train=train).weight(tensors) == 5


def test_losses_by_hand(tmp_path: Path) -> None:
    """One bit each: p = 1/2 costs ln 2; an error of 2 squared is 4; three equal classes cost ln 3."""
    prepare(tmp_path / "bits", options={"longest": 1, "bits": 1, "shortest": 1}, splits={"validation": {"samples": 1}})
    tensors = {"mask": torch.tensor([[False, True]]), "targets": torch.tensor([[[0.0], [1.0]]])}
    assert float(task(tmp_path / "bits").losses(torch.zeros(1, 2, 1), tensors)) == pytest.approx(np.log(2))
    prepare(tmp_path / "numbers", operation="adding_problem", options={}, splits={"validation": {"samples": 1}})
    values = torch.tensor([[[9.0], [3.0]]])
    assert float(task(tmp_path / "numbers").losses(values, tensors)) == 4.0
    prepare(
        tmp_path / "classes", operation="copy_memory", options={"alphabet": 2}, splits={"validation": {"samples": 1}}
    )
    classes = {"mask": tensors["mask"], "targets": torch.tensor([[[0], [2]]])}
    assert float(task(tmp_path / "classes").losses(torch.zeros(1, 2, 3), classes)) == pytest.approx(np.log(3))


def test_validation_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    prepare(tmp_path / "data")
    part = task(tmp_path / "data")

    class Half(torch.nn.Module):
        def initial_state(self, batch: int) -> dict[str, torch.Tensor]:
            return {}

        def forward(self, inputs: torch.Tensor, state: dict[str, torch.Tensor]) -> Any:
            return type("Output", (), {"values": inputs[..., :4] * 2 - 1, "state": {}, "penalties": {}})()

    one = part.validate(Half(), WorkerContext())
    parts = task(tmp_path / "data", train={"batch": 4, "parts": 4, "steps": 1, "optimizer": {"learning_rate": 0.1}})
    assert parts.validate(Half(), WorkerContext()) == pytest.approx(one)
    assert one > 1


def test_slots_in_use_are_shown_around_the_end() -> None:
    assert ring([0, 1, 5], 6) == [5, 0, 1]
    assert ring([2, 4], 8) == [2, 3, 4]
    assert ring([3], 5) == [3]
    assert ring([], 3) == [0, 1, 2]


# --- training ------------------------------------------------------------------------------------------------------------


class StopsAt(WorkerContext):
    """Asks for a stop at one step, as SIGTERM would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.calls, self.step = 0, step

    def wants_stop(self) -> bool:
        self.calls += 1
        return self.calls == self.step


MACHINES = [
    {"cell": "ntm", "width": 8, "options": {"slots": 6, "slot_width": 4}},
    {"cell": "dnc", "width": 8, "options": {"slots": 5, "slot_width": 4}},
    {"cell": "act", "width": 8, "options": {"cell": "gru", "maximum": 4}},
    {"cell": "lru", "width": 8},
]


@pytest.mark.parametrize("model", MACHINES, ids=lambda model: model["cell"])
def test_a_run_stopped_twice_ends_with_the_same_weights_bit_for_bit(tmp_path: Path, model: dict[str, Any]) -> None:
    prepare(tmp_path / "data/prepared/generated")
    train = {"batch": 3, "steps": 12, "validate_every": 4, "checkpoint_every": 2, "optimizer": {"learning_rate": 0.01}}
    recipe = Recipe.model_validate(
        {"suite": "tiny", "task": "algorithms", "dataset": "generated", "train": {**train, "objective": {"ponder_cost": 0.1}},
         "model": {"name": "recurrent_network", **model}, "evaluate": {}, "name": "r"}
    )  # fmt: skip
    weights = []
    for name, stops in (("undisturbed", ()), ("stopped", (3, 8))):
        place = Place(tmp_path / name)
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data/prepared").symlink_to(tmp_path / "data/prepared")
        for stop in stops:
            with pytest.raises(Preempted):
                train_one(recipe, 1, place, StopsAt(stop))
        train_one(recipe, 1, place, WorkerContext())
        weights.append((place.model(recipe, 1) / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]
    description, trained = load_model(place.model(recipe, 1))
    task(tmp_path / "data/prepared/generated", predict={"longer": "longer"}).predict(
        trained, tmp_path, 1, torch.device("cpu")
    )
    assert description["operation"] == "copy"
    lines = [json.loads(text) for text in (tmp_path / "sequences.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in lines] == list(range(29))
    assert ("ponder" in lines[0]) == (model["cell"] == "act")
    kinds = [json.loads(text)["kind"] for text in (tmp_path / "pictures.jsonl").read_text().splitlines()]
    assert kinds == ["heat_maps"] * 2 * (model["cell"] in ("ntm", "dnc")) + ["curves"] * (1 + (model["cell"] == "act"))
    assert draw_all(tmp_path, tmp_path) == len(kinds)
