"""Which source files decide what a stage computes: a file and all that it imports, followed through the package.

DVC compares files, and knows nothing of imports. Stage `dependencies` therefore writes, for every model, task and
preparer, a small file with the hashes of the sources that it reads, and the other stages depend on those. So a new layer
retrains the models that use it and no other, and a run's folder is found again after a change that does not concern it.

It also writes each recipe as a file of its own, resolved, whose keys are the parameters of the other stages: DVC reads
the file again for every stage, and tens of recipes in one YAML file cost it tenths of a second each time.

A cell that a recipe names (`cell: ntm`) is a file of `layers/` that no import statement mentions: it is followed too.

Code that decides only where and how something is run, shown or checked is left out: `training/launch.py`, progress,
journal, and `config.py`, whose values are compared as parameters.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from unroll.config import Recipe, hash_json
from unroll.files import new_folder, sha256

PACKAGE = Path(__file__).parent
DECIDING = ("data", "datasets", "decoding", "layers", "losses", "metrics", "models", "tasks", "training")
LEFT_OUT = {"training/launch.py"}
LOOP = "training/runs.py"
"""What trains every model, whatever the task."""


def files_read(start: str) -> list[str]:
    """`start` and every deciding file that it imports, directly or not, at the top or inside a function; sorted."""
    found, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name in found or name in LEFT_OUT or name.split("/")[0] not in DECIDING:
            continue
        found.add(name)
        waiting += _imports(PACKAGE / name)
    return sorted(found)


@functools.cache
def _imports(path: Path) -> list[str]:
    """The files of this package that a file imports, relative to it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    stems = [module.removeprefix("unroll.").replace(".", "/") for module in modules if module.startswith("unroll.")]
    candidates = [f"{stem}.py" for stem in stems] + [f"{stem.split('/')[0]}/__init__.py" for stem in stems]
    return [name for name in candidates if (PACKAGE / name).is_file()]


def code_hash(recipe: Recipe) -> str:
    """Hash of the source files that decide what training this recipe computes."""
    starts = (f"models/{recipe.model['name']}.py", *cells_of(recipe.model), f"tasks/{recipe.task}.py", LOOP)
    files = sorted({name for start in starts for name in files_read(start)})
    return hash_json([[name, sha256(PACKAGE / name)] for name in files])


def cells_of(model: Any) -> list[str]:
    """The files of `layers/` that stand as `cell` or `decoder_cell` anywhere in what a recipe says of its model."""
    found: list[str] = []
    for key, value in model.items() if isinstance(model, Mapping) else ():
        name = f"layers/{value}.py"
        found += [name] if key in ("cell", "decoder_cell") and (PACKAGE / name).is_file() else []
        found += cells_of(value)
    return found


def write(out: Path, recipes: Collection[Recipe] = ()) -> None:
    """Write into `out`, one JSON a file: `models/` (with the cells that `recipes` give them), `tasks/` (with the loop) and
    `datasets/`, {source file: SHA-256}; and `recipes/`, what is stated of each."""
    cells: dict[str, set[str]] = {}
    for recipe in recipes:
        cells.setdefault(str(recipe.model.get("name")), set()).update(cells_of(recipe.model))
    with new_folder(out) as folder:
        (folder / "recipes").mkdir()
        for recipe in recipes:
            stated = recipe.model_dump(mode="json", exclude={"name"}, exclude_unset=True)
            (folder / "recipes" / f"{recipe.name}.json").write_text(json.dumps(stated, indent=1) + "\n")
        for package, also in (("models", None), ("tasks", LOOP), ("datasets", None)):
            (folder / package).mkdir()
            for path in sorted((PACKAGE / package).glob("[!_]*.py")):
                starts = [f"{package}/{path.name}", *([also] if also else [])]
                starts += sorted(cells.get(path.stem, ())) if package == "models" else []
                files = {name for start in starts for name in files_read(start)}
                hashes = {name: sha256(PACKAGE / name) for name in sorted(files)}
                (folder / package / f"{path.stem}.json").write_text(json.dumps(hashes, indent=1) + "\n")
