"""Stage `predict`: what each trained seed says of the test split, written to files that metrics read."""

from __future__ import annotations

from pathlib import Path

from unroll.config import load_part, load_recipe
from unroll.errors import UserError
from unroll.files import new_folder
from unroll.training.runs import Place, check_stream, default_device, load_model


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
    for seed in recipe.seeds:
        folder = place.model(recipe, seed)
        description, model = load_model(folder)
        if description["data_hash"] != task.manifest["hash"]:
            raise UserError(
                f"{folder / 'model.json'}: trained on data {description['data_hash'][:12]}, {data} now holds "
                f"{task.manifest['hash'][:12]} ({task.vocabulary} symbols); train again"
            )
        with new_folder(place.predictions(recipe, seed)) as partial:
            task.predict(model.to(device), partial, seed, device)
