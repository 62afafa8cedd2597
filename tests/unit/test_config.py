"""What a user may write in a recipe, and the one line that answers what may not."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from project import ADAM, write_project

from unroll.config import (
    PARTS,
    load_datasets,
    load_part,
    load_recipe,
    load_recipes,
    merge,
    model_config,
    read_yaml,
    tiny_twin,
)
from unroll.errors import UserError

ROOT = Path(__file__).parents[2]


def change(root: Path, file: str, **entry: Any) -> None:
    path = root / file
    content = yaml.safe_load(path.read_text())
    section = content["recipes"]["small"] if "recipes" in content else content["datasets"]["own"]
    section.update(entry)
    path.write_text(yaml.safe_dump(content))


def refused(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(root, "small")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"evalute": {}}, r"unknown key 'evalute'; did you mean 'evaluate'?"),
        ({"train": {"batch": 4, "step": 3, "optimizer": ADAM}}, "unknown key 'step'; did you mean 'steps'?"),
        ({"train": {"batch": 4, "steps": 3, "optimizer": {**ADAM, "lr": 1}}}, "unknown key 'lr'"),
        ({"train": {"batch": 0, "steps": 3, "optimizer": ADAM}}, "train.batch: Input should be greater than"),
        ({"train": {"batch": 4, "optimizer": ADAM}}, "state exactly one of epochs and steps"),
        ({"train": {"batch": 4, "steps": 3, "optimizer": {"name": "adam", "learning_rate": 1}}}, "found 'adam'"),
        ({"model": {"name": "recurent_lm"}}, "no models/recurent_lm.py; did you mean 'recurrent_lm'?"),
        ({"model": {"name": "recurrent_lm", "widht": 3}}, "unknown key 'widht'; did you mean 'width'?"),
        ({"model": {"name": "recurrent_lm", "cell": "ltsm"}}, "cell is none of rnn, lstm, gru: no layers/ltsm.py"),
        ({"dataset": "onw"}, "no data set 'onw'; did you mean 'own'?"),
        ({"task": "translation"}, "found 'translation', the file holds recipes of task 'language_modeling'"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_with_place_and_cure(
    tmp_path: Path, entry: dict[str, Any], expected: str
) -> None:
    write_project(tmp_path)
    change(tmp_path, "recipes/language_modeling.yaml", **entry)
    message = refused(tmp_path)
    assert expected in message
    assert "recipes" in message or "params.yaml" in message


def test_an_unknown_recipe_names_the_nearest(tmp_path: Path) -> None:
    write_project(tmp_path)
    with pytest.raises(UserError, match=r"no recipe 'smal'; did you mean 'small'\? \(allowed: small\)"):
        load_recipe(tmp_path, "smal")


def test_a_helper_beside_the_parts_cannot_be_named() -> None:
    """`metrics: [bootstrap]` names a file that exists, but no metric."""
    for package, helper in [("metrics", "bootstrap"), ("metrics", "_predictions"), ("tasks", "base")]:
        with pytest.raises(UserError, match=rf"^place: .*\b{package}/{helper}\.py.*\(allowed: ") as error:
            load_part(package, helper, "place")
        assert f" {helper}" not in str(error.value)
    for package in PARTS:
        with pytest.raises(UserError) as error:
            load_part(package, "nonesuch", "place")
        allowed = str(error.value).partition("(allowed: ")[2].rstrip(")").split(", ")
        assert len(allowed) >= 1
        for name in allowed:
            assert callable(getattr(load_part(package, name, "place"), PARTS[package]))


def test_yaml_that_is_none_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("datasets:\n  a: [1, 2\n  b: 3\n")
    with pytest.raises(UserError, match=r"params.yaml: line 3, column \d+ not valid YAML"):
        read_yaml(path)


def test_a_key_stated_twice_is_refused(tmp_path: Path) -> None:
    """YAML takes the last one: half of a recipe would be lost unseen. Keys that come by `<<` may be stated anew."""
    path = tmp_path / "recipes.yaml"
    path.write_text("recipes:\n  a: &a {x: 1, y: 2}\n  b: {<<: *a, x: 3}\n  c: {<<: *a, z: {x: 1}}\n")
    assert read_yaml(path)["recipes"]["b"] == {"x": 3, "y": 2}
    path.write_text("recipes:\n  a: {x: 1}\n  b: {x: 2}\n  a: {x: 3}\n")
    with pytest.raises(UserError, match=r"recipes.yaml: line 4, column 3 not valid YAML: 'a' stands in line 2 too$"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nb: &x 2\n", r"line 2, column 4 not valid YAML: found duplicate anchor 'x'"),
        ("a: \x07\n", r"not valid YAML: unacceptable character #x0007"),
        ("a: " + "[" * 100_000, r"not valid YAML: nested too deeply"),
    ],
)
def test_whatever_is_wrong_with_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        read_yaml(tmp_path / "params.yaml")
    assert "\n" not in str(raised.value)


def test_a_yaml_tag_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"datasets: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(path)
    assert not (tmp_path / "ran").exists()


def test_merge_goes_down_mappings_and_replaces_the_rest() -> None:
    assert merge({"a": {"b": 1, "c": [1, 2]}, "d": 3}, {"a": {"c": [5]}}) == {"a": {"b": 1, "c": [5]}, "d": 3}


def test_the_hash_of_a_run_changes_with_what_training_reads_and_with_nothing_else(tmp_path: Path) -> None:
    write_project(tmp_path)
    before = load_recipe(tmp_path, "small").hash("data", "code")
    change(tmp_path, "recipes/language_modeling.yaml", title="another", evaluate={"metrics": ["perplexity"]})
    assert load_recipe(tmp_path, "small").hash("data", "code") == before
    assert load_recipe(tmp_path, "small").hash("data", "other code") != before
    change(tmp_path, "recipes/language_modeling.yaml", train={"batch": 4, "steps": 3, "optimizer": ADAM})
    assert load_recipe(tmp_path, "small").hash("data", "code") != before


def test_every_recipe_of_the_project_is_valid_and_so_is_its_tiny_twin() -> None:
    recipes = load_recipes(ROOT)
    assert len(recipes) >= 8
    datasets = load_datasets(ROOT)
    for recipe in recipes.values():
        twin = tiny_twin(recipe)
        assert twin.dataset in datasets
        assert model_config(recipe) is not None
        assert model_config(twin) is not None
        assert recipe.tiny, f"{recipe.name} has no tiny twin"


def test_every_recipe_states_the_keys_that_dvc_names() -> None:
    """DVC refuses a stage whose parameters are absent, hours into a reproduction."""
    named = {"suite", "task", "title", "dataset", "model", "train", "predict", "evaluate", "reference", "seeds"}
    for path in (ROOT / "recipes").glob("*.yaml"):
        for name, entry in yaml.safe_load(path.read_text())["recipes"].items():
            assert named - entry.keys() == set(), f"{path.name}: {name}"


def test_the_pipeline_reads_the_same_configuration_as_we_do() -> None:
    """DVC's reader follows YAML 1.2, ours 1.1: what only one of them takes would stop every `dvc repro`."""
    from dvc.utils.serialize import load_yaml

    for path in [ROOT / "params.yaml", *(ROOT / "recipes").glob("*.yaml")]:
        assert load_yaml(path) == yaml.safe_load(path.read_text()), path
