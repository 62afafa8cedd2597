"""A checkpoint is complete or absent, never half; a damaged one is passed over by name."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from unroll import files
from unroll.errors import UserError
from unroll.training import checkpoint
from unroll.training.checkpoint import Checkpoint


def example(step: int) -> Checkpoint:
    value = torch.full((3, 2), float(step))
    return Checkpoint({"w": value}, {"state.0.exp_avg": value}, {"hidden": value}, {"step": step, "best": float("inf")})


def test_round_trip_keeps_every_tensor_and_value(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, example(7))
    found, damaged = checkpoint.newest(tmp_path)
    assert damaged == []
    assert found is not None
    assert found.state == {"step": 7, "best": float("inf")}
    for name in checkpoint.TENSOR_FILES:
        for key, value in getattr(example(7), name).items():
            assert torch.equal(getattr(found, name)[key], value)


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 30):
        checkpoint.save(tmp_path, example(step))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000010", "step-000000030"]


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "carry.safetensors", "state.json"])
def test_a_flipped_byte_is_found_named_and_the_earlier_checkpoint_wins(tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path, example(1))
    path = checkpoint.save(tmp_path, example(2)) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    found, damaged = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.state["step"] == 1
    assert len(damaged) == 1
    assert str(path) in damaged[0]


@pytest.mark.parametrize("cut", [0, 10, 50])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = checkpoint.save(tmp_path, example(1)) / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="weights.safetensors: missing or damaged"):
        checkpoint.read(path.parent)


def interrupt_at(number: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Callable[[], int]:
    """Raise `error` at the number-th write, flush or rename; returns how many there were."""
    calls = 0

    def wrap(function: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number:
                raise error
            return function(*args, **kwargs)

        return counted

    for owner, name in [
        (checkpoint, "save_file"),
        (Path, "write_text"),
        (Path, "mkdir"),
        (os, "fsync"),
        (os, "rename"),
    ]:
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))
    return lambda: calls


def count_operations(tmp_path: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        count = interrupt_at(0, patch, KeyboardInterrupt())
        checkpoint.save(tmp_path / "counting", example(2))
        return count()


def test_an_interruption_at_any_write_flush_or_rename_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    operations = count_operations(tmp_path)
    assert operations > 10
    for number in range(1, operations + 1):
        folder = tmp_path / str(number)
        checkpoint.save(folder, example(1))
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(number, patch, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(folder, example(2))
        found, damaged = checkpoint.newest(folder)
        assert found is not None, f"operation {number}"
        assert found.state["step"] in (1, 2)
        assert damaged == []
        checkpoint.save(folder, example(3))
        assert checkpoint.newest(folder)[0].state["step"] == 3  # type: ignore[union-attr]


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, example(1))
    interrupt_at(3, monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(UserError, match="the disk is full"):
        checkpoint.save(tmp_path, example(2))
    monkeypatch.undo()
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.state["step"] == 1


def test_a_pickle_in_place_of_weights_is_refused_and_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = tmp_path / "weights.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="not a valid safetensors file"):
        checkpoint.load_tensors(path)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_vocabulary_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weight has shape \[5, 2\], the model expects \[7, 2\]"):
        checkpoint.load_weights(nn.Embedding(7, 2), nn.Embedding(5, 2).state_dict(), tmp_path)


def test_an_exported_model_says_what_built_it(tmp_path: Path) -> None:
    tied = nn.Embedding(3, 2)
    checkpoint.save_model(tmp_path / "m", {"a": tied.weight, "b": tied.weight}, {"model": {"name": "x"}})
    assert json.loads((tmp_path / "m" / "model.json").read_text()) == {"model": {"name": "x"}}
    assert torch.equal(checkpoint.load_tensors(tmp_path / "m" / "weights.safetensors")["b"], tied.weight)


def test_a_folder_that_is_replaced_is_never_seen_half_written(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with files.new_folder(final) as partial:
        (partial / "a").write_text("old")

    def fail() -> None:
        with files.new_folder(final) as partial:
            (partial / "a").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (final / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with files.new_folder(final) as partial:
        assert list(partial.iterdir()) == []
        (partial / "a").write_text("new")
    assert (final / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_two_renames_of_a_folder_loses_nothing(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with files.new_folder(final) as partial:
        (partial / "a").write_text("old")
    final.rename(tmp_path / ".old-out")
    with pytest.raises(RuntimeError), files.new_folder(final):
        raise RuntimeError
    assert (final / "a").read_text() == "old"
