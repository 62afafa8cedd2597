"""Checkpoints: one folder a step, written under a temporary name, flushed, renamed; the newest valid one wins.

    step-000000120/
      weights.safetensors    the model
      optimizer.safetensors  optimiser state and averaged weights
      carry.safetensors      state carried by language models, rows of the whole global batch
      state.json             step, plan position, schedule, best score, time spent
      checksums.json         SHA-256 of the others; written last

Nothing is unpickled. Random numbers need no entry: every step seeds its own from (seed, step).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unroll.errors import UserError
from unroll.files import new_folder, sha256

TENSOR_FILES = ("weights", "optimizer", "carry")


@dataclass
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    carry: dict[str, Tensor]
    state: dict[str, Any]


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors; tied ones are written once for each name."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: missing, truncated, or not safetensors at all (a pickle, say).
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: not a valid safetensors file ({reason}); weights are read from no other format"
        ) from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], place: Path) -> None:
    """Put weights into a model.

    Raises:
        UserError: a name is missing or left over, or a shape differs (another vocabulary, say).
    """
    for name, expected in model.state_dict().items():
        found = weights.get(name)
        if found is not None and found.shape != expected.shape and not hasattr(model, "fit"):
            raise UserError(f"{place}: {name} has shape {list(found.shape)}, the model expects {list(expected.shape)}")
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{place}: the weights do not fit the model: {reason}") from None


def save(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write `folder/step-<step>` and remove all but the newest `keep`.

    Raises:
        UserError: full disk or read-only folder; earlier checkpoints stay as they were.
    """
    final = folder / f"step-{checkpoint.state['step']:09d}"
    with new_folder(final) as partial:
        for name in TENSOR_FILES:
            save_tensors(getattr(checkpoint, name), partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps(checkpoint.state))
        sums = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        (partial / "checksums.json").write_text(json.dumps(sums))
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def read(folder: Path) -> Checkpoint:
    """Read one checkpoint folder.

    Raises:
        UserError: a file is missing or damaged; the line names it.
    """
    try:
        sums = json.loads((folder / "checksums.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder / 'checksums.json'}: missing or damaged") from None
    for name in [*(f"{name}.safetensors" for name in TENSOR_FILES), "state.json"]:
        path = folder / name
        if not path.is_file() or sha256(path) != sums.get(name):
            raise UserError(f"{path}: missing or damaged (its SHA-256 is not the one in checksums.json)")
    tensors = {name: load_tensors(folder / f"{name}.safetensors") for name in TENSOR_FILES}
    return Checkpoint(**tensors, state=json.loads((folder / "state.json").read_text()))


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint under `folder`, and one line for each damaged one that was passed over."""
    damaged: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return read(path), damaged
        except UserError as error:
            damaged.append(str(error))
    return None, damaged


def save_model(
    folder: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any], tokenizers: Sequence[Path] = ()
) -> None:
    """Export a model: weights, `model.json` (what built it), and its tokenizers, so that it can be used alone."""
    with new_folder(folder) as partial:
        save_tensors(weights, partial / "weights.safetensors")
        (partial / "model.json").write_text(json.dumps(description, indent=1, sort_keys=True) + "\n")
        for path in tokenizers:
            shutil.copyfile(path, partial / path.name)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimiser state as `<parameter number>.<name>` tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value) for number, entry in state.items() for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `flatten_optimizer`; learning rates are set by the schedule."""
    content = optimizer.state_dict()
    content["state"] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        content["state"].setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(content)
