"""What DVC compares must name no file that a training does not read; that it names every one, test_imports.py checks."""

import importlib
import json
from pathlib import Path

import pytest

from unroll.config import Recipe
from unroll.dependencies import PACKAGE, code_hash, files_read, write


def test_a_layer_concerns_the_models_that_import_it_alone() -> None:
    assert "layers/convolution.py" in files_read("models/bytenet.py")
    assert "layers/convolution.py" not in files_read("models/recurrent_lm.py")
    assert "layers/attention.py" in files_read("models/seq2seq.py")


def test_a_cell_named_in_a_recipe_concerns_the_models_that_it_is_named_for(tmp_path: Path) -> None:
    """`cell: ntm` is no import, yet whoever changes the machine has to train that model again; and act wraps a cell."""
    inner = {"name": "recurrent_network", "cell": "act", "options": {"cell": "ntm"}}
    train = {"steps": 1, "batch": 1, "optimizer": {"learning_rate": 0.1}}
    recipe = Recipe(name="r", suite="s", task="algorithms", dataset="d", train=train, evaluate={}, model=inner)
    write(tmp_path / "out", [recipe])
    written = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out/models").glob("*.json")}
    assert {"layers/ntm.py", "layers/ntm_kernels.py"} <= written["recurrent_network"].keys()
    assert "layers/ntm.py" not in written["recurrent_lm"]
    plain = recipe.model_copy(update={"model": {"name": "recurrent_network", "cell": "lstm"}})
    assert code_hash(plain) != code_hash(recipe)
    decoder = recipe.model_copy(update={"model": {"name": "seq2seq", "decoder_cell": "dnc"}})
    write(tmp_path / "decoder", [decoder])
    assert "layers/dnc.py" in json.loads((tmp_path / "decoder/models/seq2seq.json").read_text())


def test_imports_are_followed_through_functions_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("unroll.dependencies")
    sources = {
        "models/own.py": "def late():\n    from unroll.layers import first\n",
        "layers/__init__.py": "",
        "layers/first.py": "import unroll.layers.second\nfrom unroll.progress import progress\n",
        "layers/second.py": "import unroll.layers.first\n",
        "layers/third.py": "",
        "progress.py": "",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    assert files_read("models/own.py") == ["layers/__init__.py", "layers/first.py", "layers/second.py", "models/own.py"]


def test_every_model_task_and_preparer_has_its_file(tmp_path: Path) -> None:
    write(tmp_path / "out")
    for package in ("models", "tasks", "datasets"):
        written = {path.stem for path in (tmp_path / "out" / package).glob("*.json")}
        assert written == {path.stem for path in (PACKAGE / package).glob("[!_]*.py")}
    hashes = json.loads((tmp_path / "out" / "tasks" / "translation.json").read_text())
    assert {"training/loop.py", "tasks/translation.py", "decoding/beam.py"} <= hashes.keys()


def test_a_recipe_is_written_as_it_is_stated(tmp_path: Path) -> None:
    """DVC compares these files: a value that a default supplies must not look like a change of the recipe."""
    train = {"steps": 1, "batch": 1, "optimizer": {"learning_rate": 0.1}}
    stated = {
        "suite": "s",
        "task": "algorithms",
        "dataset": "d",
        "train": train,
        "evaluate": {},
        "model": {"name": "ngram"},
    }
    write(tmp_path / "out", [Recipe(name="r", **stated)])
    assert json.loads((tmp_path / "out/recipes/r.json").read_text()) == stated
