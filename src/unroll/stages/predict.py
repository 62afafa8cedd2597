"""Stage `predict`: what each trained seed says of the test split, written to files that metrics read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unroll.config import load_part, load_recipe
from unroll.decoding.ensemble import Ensemble
from unroll.device import default_device
from unroll.errors import UserError
from unroll.files import new_folder
from unroll.memory import keep_freed_memory
from unroll.place import Place
from unroll.training.runs import check_stream, load_model


def predict(root: Path, name: str, tiny: bool = False) -> None:
    """Write the predictions of every seed of `name`.

    Raises:
        UserError: not trained, or trained on other data than what is prepared now.
    """
    recipe, place = load_recipe(root, name, tiny=tiny), Place(root)
    data = place.data(recipe.dataset)
    check_stream(data)
    task = load_part("tasks", recipe.task, f"recipes.{name}.task").Task(recipe, data)
    device = default_device()
    keep_freed_memory()
    for seed in recipe.predicted_seeds:
        members = recipe.seeds if recipe.predict.get("ensemble") else [seed]
        models = [_model(place.model(recipe, member), task, data).to(device) for member in members]
        with new_folder(place.predictions(recipe, seed)) as partial:
            task.predict(models[0] if len(models) == 1 else Ensemble(models), partial, seed, device)


def _model(folder: Path, task: Any, data: Path) -> Any:
    """The exported model of one seed, if it belongs to the data as they are prepared now."""
    description, model = load_model(folder)
    if description["data_hash"] != task.manifest["hash"]:
        raise UserError(
            f"{folder / 'model.json'}: trained on data {description['data_hash'][:12]}, {data} now holds "
            f"{task.manifest['hash'][:12]} ({task.vocabulary} symbols); train again"
        )
    return model
