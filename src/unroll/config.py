"""Typed recipes and data sets: what `params.yaml` and `recipes/*.yaml` may say.

Every entry is checked when it is read. An unknown key is refused with the nearest valid one, a wrong value with the
values allowed; the message names the file and the place in it.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from unroll.errors import UserError


class Strict(BaseModel):
    """Base of every typed configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Copy(Strict):
    """One form of a raw file: its name in a mirror, its address, and what it must hash to. Packed if it ends in .gz."""

    file: str
    url: str | None = None
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")


class Source(Copy):
    """One raw file. `copies` are other forms of the same content, each with its own hash (packed or not, another
    address); `content_sha256` is the hash of what all of them unpack to. `language`: of parallel text, one a file."""

    split: str | None = None
    language: str | None = None
    copies: list[Copy] = []
    content_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def one_content(self) -> Self:
        if self.copies and self.content_sha256 is None:
            raise ValueError("a source with copies must state content_sha256")
        return self


class DatasetEntry(Strict):
    """One entry of `params.yaml: datasets`. A generated data set has no sources."""

    preparer: str
    licence: str
    sources: list[Source] = []
    options: dict[str, Any] = {}


class Schedule(Strict):
    """Learning rate as a function of the step; `warmup` steps rise linearly from 0 to the peak."""

    name: Literal["constant", "cosine", "inverse_square_root", "plateau"] = "constant"
    warmup: int = Field(0, ge=0)
    floor: float = Field(0.0, ge=0.0)
    factor: float = Field(0.25, gt=0.0, lt=1.0)
    patience: int = Field(0, ge=0)


class Optimizer(Strict):
    """The optimiser and what surrounds its step. `averaging`: `ema` keeps an exponential moving average of the weights,
    `nt_asgd` starts Polyak averaging when validation stops improving (Merity et al. 2018, algorithm 1). `ema_ramp`: the
    average is shorter at first, so that a random start is forgotten; of no use to a phase that starts from good weights.
    """

    name: Literal["adamw", "sgd", "rmsprop"] = "adamw"
    learning_rate: float = Field(gt=0.0)
    weight_decay: float = Field(0.0, ge=0.0)
    momentum: float = Field(0.0, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = Field(None, gt=0.0)
    schedule: Schedule = Schedule()
    averaging: Literal["none", "ema", "nt_asgd"] = "none"
    ema_decay: float = Field(0.999, gt=0.0, lt=1.0)
    ema_ramp: bool = True
    trigger: int = Field(5, ge=1)


class Training(Strict):
    """How a model is trained.

    The global batch, over all workers, is stated as `batch` rows of a stream or as `batch_tokens` (rows x longest) of a
    set of samples; accumulation follows from it. `parts`, a power of two, always cuts it into so many parts and adds
    them up in a fixed order, so that every number of workers that divides it gives the same bits. `objective`: what the
    task calls its loss options. `then`: changes laid over all this for a second phase of training, which starts from
    the weights that the first one ends with.
    """

    batch: int | None = Field(None, ge=1)
    batch_tokens: int | None = Field(None, ge=1)
    window: int = Field(64, ge=1)
    random_windows: bool = False
    epochs: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    optimizer: Optimizer
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    rows_per_pass: int | None = Field(None, ge=1)
    tokens_per_pass: int | None = Field(None, ge=1)
    parts: int | None = Field(None, ge=1)
    validate_every: int | None = Field(None, ge=1)
    checkpoint_every: int | None = Field(None, ge=1)
    validation_rows: int = Field(16, ge=1)
    select: Literal["best", "last"] = "best"
    patience: int | None = Field(None, ge=1)
    dropout_by_place: bool = True
    log_every: int = Field(10, ge=1)
    objective: dict[str, Any] = {}
    then: dict[str, Any] | None = None

    @model_validator(mode="after")
    def one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("state exactly one of epochs and steps")
        if (self.batch is None) == (self.batch_tokens is None):
            raise ValueError("state exactly one of batch (rows of a stream) and batch_tokens (samples)")
        return self

    @model_validator(mode="after")
    def parts_fit(self) -> Self:
        if self.parts is None:
            return self
        if self.parts & (self.parts - 1) or self.parts > (self.batch or self.parts):
            raise ValueError(f"parts: a power of two, at most batch, is needed, found {self.parts}")
        if self.rows_per_pass or self.tokens_per_pass:
            raise ValueError("parts: each part is one pass; state no rows_per_pass or tokens_per_pass")
        return self

    def first_phase(self) -> Training:
        """This training without its second phase."""
        return self.model_copy(update={"then": None})

    def last_phase(self, place: str) -> Training:
        """What the second phase does: `then` laid over the rest; `epochs` there replaces `steps` and the reverse."""
        changes = dict(self.then or {})
        plain = self.first_phase().model_dump(mode="json", exclude_unset=True)
        for length in {"epochs", "steps"} & changes.keys():
            plain |= {"epochs": None, "steps": None, length: changes[length]}
        phase: Training = check(Training, merge(plain, changes), f"{place}.train.then")
        return phase


class CountingTraining(Strict):
    """Nothing to state: the model is fitted by counting, in one pass."""

    counting: Literal[True]


def _kind_of_training(value: Any) -> str:
    counted = "counting" in value if isinstance(value, Mapping) else isinstance(value, CountingTraining)
    return "counting" if counted else "gradients"


class Reference(Strict):
    """A published number to stand beside ours. `same_conditions` is false when data, tokens or scoring differ."""

    metric: str
    value: float
    source: str
    same_conditions: bool = False
    note: str = ""


class Recipe(Strict):
    """One entry of `recipes/<task>.yaml`. `model.name` is the file in `models/`; its other keys are that file's Config."""

    name: str
    suite: str
    task: str
    dataset: str
    model: dict[str, Any]
    train: Annotated[
        Annotated[Training, Tag("gradients")] | Annotated[CountingTraining, Tag("counting")],
        Discriminator(_kind_of_training),
    ]
    predict: dict[str, Any] = {}
    evaluate: dict[str, Any]
    seeds: list[int] = Field([1], min_length=1)
    title: str = ""
    reference: Reference | None = None
    tiny: dict[str, Any] = {}

    @property
    def predicted_seeds(self) -> list[int]:
        """The seeds that predict on their own; an ensemble of all of them predicts under the name of the first."""
        return self.seeds[:1] if self.predict.get("ensemble") else self.seeds

    def hash(self, *also: str) -> str:
        """Name of this run: changes when anything that training reads changes. `also`: data and code hashes."""
        keys = self.model_dump(mode="json", include={"task", "dataset", "model", "train"})
        return hash_json([keys, *also])[:12]


def hash_json(value: object) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, mapping by mapping; a list or a number replaces what was there."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def nearest(word: str, allowed: list[str]) -> str:
    """`, did you mean X?` or nothing, and the words allowed: the tail of every unknown-name message."""
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (allowed: {', '.join(sorted(allowed))})"


class _KeysOnce(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, where YAML would take the last one and lose the other unseen."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[str, yaml.Mark] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in first:
                line = first[key.value].line + 1
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} stands in line {line} too", problem_mark=key.start_mark
                )
            first[key.value] = key.start_mark
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (safe loader: tags cannot run code).

    Raises:
        UserError: no such file, not YAML or a key stated twice (with line and column), or not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _KeysOnce)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = [getattr(error, "context", None), getattr(error, "problem", error)]
        problem = " ".join(", ".join(str(part) for part in said if part).split())  # one line, whatever the parser says
        raise UserError(f"{path}:{place} not valid YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping was expected, found {type(content).__name__}")
    return content


def check(kind: type[BaseModel], value: Mapping[str, Any], place: str) -> Any:
    """`value` as a `kind`.

    Raises:
        UserError: one line naming the place, what was found and what is allowed.
    """
    try:
        return kind.model_validate(dict(value))
    except ValidationError as error:
        raise UserError(f"{place}{_explain(kind, error)}") from None


def _explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first complaint of pydantic as one line."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"] if part not in ("gradients", "counting")]
    where = ".".join(location)
    if problem["type"] == "extra_forbidden":
        allowed = list(_fields_at(kind, location[:-1]))
        return f".{where}: unknown key {location[-1]!r}{nearest(location[-1], allowed)}"
    if problem["type"] == "missing":
        return f".{where}: missing"
    return f".{where}: {problem['msg'].removeprefix('Value error, ')}, found {problem['input']!r}"


def _fields_at(kind: type[BaseModel], location: list[str]) -> list[str]:
    """Names allowed where `location` points to, looking through unions and lists."""
    for part in location:
        field = kind.model_fields.get(part)
        if field is None:
            continue
        models = [c for c in _parts(field.annotation) if isinstance(c, type) and issubclass(c, BaseModel)]
        if models:
            kind = models[0]
    return list(kind.model_fields)


def _parts(annotation: Any) -> list[Any]:
    """An annotation and everything inside it, outermost first."""
    return [annotation, *(inner for part in get_args(annotation) for inner in _parts(part))]


def load_datasets(root: Path) -> dict[str, DatasetEntry]:
    """The data sets of `params.yaml`."""
    path = root / "params.yaml"
    entries = read_yaml(path).get("datasets", {})
    return {name: check(DatasetEntry, entry, f"{path}: datasets.{name}") for name, entry in entries.items()}


def load_dataset(root: Path, name: str) -> DatasetEntry:
    """One data set by name."""
    return _pick(load_datasets(root), name, "data set", root / "params.yaml")


def load_recipes(root: Path) -> dict[str, Recipe]:
    """Every recipe of `recipes/*.yaml`, by name."""
    recipes: dict[str, Recipe] = {}
    for path in sorted((root / "recipes").glob("*.yaml")):
        for name, entry in (read_yaml(path).get("recipes") or {}).items():
            place = f"{path}: recipes.{name}"
            recipe: Recipe = check(Recipe, {"name": name, **entry}, place)
            if recipe.task != path.stem:
                raise UserError(f"{place}.task: found {recipe.task!r}, the file holds recipes of task {path.stem!r}")
            if name in recipes:
                raise UserError(f"{place}: the name is used twice")
            recipes[name] = recipe
    return recipes


TINY_SUFFIX, TINY_SUITE = "-tiny", "tiny"


def load_recipe(root: Path, name: str, tiny: bool = False, model: bool = True) -> Recipe:
    """One recipe by name, with its parts checked; `tiny`, or -tiny after the name, gives its twin that ends in seconds.

    Without `model` the options of its model are not looked at, which would load torch: scoring has no use for them.
    """
    recipes = load_recipes(root)
    if name not in recipes and name.endswith(TINY_SUFFIX):
        name, tiny = name.removesuffix(TINY_SUFFIX), True
    recipe: Recipe = _pick(recipes, name, "recipe", root / "recipes")
    if tiny:
        recipe = tiny_twin(recipe)
    _pick(load_datasets(root), recipe.dataset, "data set", root / "params.yaml")
    if model:
        model_config(recipe)
    return recipe


def tiny_twin(recipe: Recipe) -> Recipe:
    """The recipe with its `tiny` changes laid over it: same code path, seconds instead of minutes.

    Its name and suite are its own, so that it overwrites no model and no result of the recipe.
    """
    plain = recipe.model_dump(mode="json", exclude={"tiny"}, exclude_unset=True)
    twin: Recipe = check(Recipe, merge(plain, recipe.tiny), f"recipes.{recipe.name}.tiny")
    return twin.model_copy(update={"name": recipe.name + TINY_SUFFIX, "suite": TINY_SUITE})


PARTS = {
    "layers": "Layer",
    "models": "Model",
    "tasks": "Task",
    "datasets": "prepare",
    "metrics": "compute",
    "pictures": "draw",
}
"""What a file of each package must define to be named in a recipe; the others there are helpers."""


def load_part(package: str, name: str, place: str) -> Any:
    """The module `unroll.<package>.<name>`: the file named in a recipe.

    Raises:
        UserError: no such file, or a helper; the nearest name is given.
    """
    files = {path.stem: path for path in (Path(__file__).parent / package).glob("[!_]*.py")}
    if name in files:
        module = importlib.import_module(f"unroll.{package}.{name}")
        if hasattr(module, PARTS[package]):
            return module
    allowed = [stem for stem, path in files.items() if PARTS[package] in _names_defined(path)]
    problem = f"{package}/{name}.py has no {PARTS[package]}" if name in files else f"no {package}/{name}.py"
    raise UserError(f"{place}: {problem}{nearest(str(name), allowed)}")


def _names_defined(path: Path) -> set[str]:
    """What a file defines, from its text: to list what is allowed must import nothing."""
    names = set()
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(statement.name)
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        names |= {node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)}
    return names


def model_config(recipe: Recipe) -> Any:
    """The typed `Config` of the recipe's model."""
    place = f"recipes/{recipe.task}.yaml: recipes.{recipe.name}.model"
    if "name" not in recipe.model:
        raise UserError(f"{place}.name: missing")
    module = load_part("models", recipe.model["name"], f"{place}.name")
    return check(module.Config, {key: value for key, value in recipe.model.items() if key != "name"}, place)


def _pick(entries: Mapping[str, Any], name: str, kind: str, place: Path) -> Any:
    if name not in entries:
        raise UserError(f"{place}: no {kind} {name!r}{nearest(name, list(entries))}")
    return entries[name]
