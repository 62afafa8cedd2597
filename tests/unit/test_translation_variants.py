"""docs/translation.md: every variant that the page names trains and translates with the change that it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sentence_pairs import prepare_pairs, recipe

from unroll.config import Recipe, check, merge
from unroll.place import Place
from unroll.training.context import WorkerContext
from unroll.training.runs import build, train_one

PAGE = Path(__file__).parents[2] / "docs" / "translation.md"
[BLOCK] = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.S | re.M)
VARIANTS: dict[str, dict[str, Any]] = yaml.safe_load(BLOCK)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return prepare_pairs(tmp_path_factory.mktemp("project"))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_the_page_trains_and_translates(name: str, place: Place, tmp_path: Path) -> None:
    plain = recipe(batch_tokens=60, steps=2, validate_every=2).model_dump(mode="json", exclude_unset=True)
    plain["model"] |= {"width": 8, "decoder_width": 16, "embedding": 8, "decoder_layers": 2, "attention": "general"}
    changed: Recipe = check(Recipe, merge(plain, VARIANTS[name]), f"docs/translation.md: {name}")
    train_one(changed, 1, place, WorkerContext())
    task, model = build(changed, place)
    task.predict(model.eval(), tmp_path, 1, torch.device("cpu"))
    lines = [json.loads(line) for line in (tmp_path / "translations.jsonl").read_text().splitlines()]
    assert len(lines) == 15
