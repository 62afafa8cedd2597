"""The leaderboard of a suite as Markdown for people and as JSON for programs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from unroll.report import formatting, view
from unroll.report.inputs import Result
from unroll.report.leaderboard import LEVEL, Group, Leaderboard

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&])")


def escape(text: str) -> str:
    """Text as it stands in a Markdown table cell: one line, nothing in it is markup or HTML."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """A Markdown table; cells are taken as they are. Columns named in `right` are aligned to the right."""
    rule = ["---:" if column in right else "---" for column in header]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def markdown(board: Leaderboard) -> str:
    """All groups of a suite, best system first, with the notes to the published numbers."""
    parts = [f"# {escape(board.suite)}\n"]
    for group in board.groups:
        better = "lower" if group.lower_is_better else "higher"
        parts.append(f"## {escape(', '.join(filter(None, (group.dataset, group.split))))}\n")
        parts.append(f"{escape(group.unit)}, {better} is better; in brackets the 95 % interval.\n")
        parts.append(_group_table(group))
        notes = [
            f"- {escape(system.result.name)}: {escape(view.conditions(system.result))}" for system in group.systems
        ]
        parts.append("".join(f"{note}\n" for note in notes if not note.endswith(": ")))
    if board.unscored:
        parts.append("## Without a score\n")
        parts.append("".join(f"- {escape(recipe)}: {escape(why)}\n" for recipe, why in board.unscored.items()))
    return "\n".join(part for part in parts if part)


def as_json(board: Leaderboard) -> str:
    """Everything the leaderboard says. Infinite scores are written "inf"."""
    content = {
        "suite": board.suite,
        "level": LEVEL,
        "groups": [_group_json(group) for group in board.groups],
        "unscored": board.unscored,
    }
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def score_cell(result: Result, digits: int) -> str:
    """The primary score with its interval, as Markdown."""
    score = result.score
    if score is None:
        return formatting.NOTHING
    bounds = formatting.interval(score.low, score.high, digits)
    return f"**{formatting.fixed(score.value, digits)}**" + (f" {escape(bounds)}" if bounds else "")


def published_cell(result: Result) -> str:
    """The published number, marked where the conditions differ, as Markdown."""
    differs = result.reference is not None and not result.reference.same_conditions
    return escape(view.published(result)) + (f" {view.DIFFERENT}" if differs else "")


def _group_table(group: Group) -> str:
    digits = formatting.decimals((score.value for score in group.scores if score), group.unit)
    header = ["#", "System", escape(group.unit), "Against the best", "Published", "Parameters", "Tokens/s", "Minutes"]
    rows = [
        [
            str(position),
            escape(system.result.name),
            score_cell(system.result, digits),
            escape(view.mark(group, system)),
            published_cell(system.result),
            formatting.scaled(system.result.cost.parameters),
            formatting.scaled(system.result.cost.tokens_per_second),
            escape(formatting.minutes(system.result.cost.minutes)),
        ]
        for position, system in enumerate(group.systems, start=1)
    ]
    return table(header, rows, right=("#", escape(group.unit), "Published", "Parameters", "Tokens/s", "Minutes"))


def _group_json(group: Group) -> dict[str, Any]:
    systems = []
    for position, system in enumerate(group.systems, start=1):
        result = system.result
        systems.append(
            {
                "rank": position,
                "recipe": result.recipe,
                "name": result.name,
                "score": result.score.model_dump() if result.score else None,
                "standing": group.standing(system),
                "p_value_against_best": group.p_value(group.systems[0], system) if position > 1 else None,
                "reference": result.reference.model_dump() if result.reference else None,
                "seeds": result.seeds,
                "cost": result.cost.model_dump(),
                "commit": result.commit,
                "missing": system.missing,
            }
        )
    return {
        "dataset": group.dataset,
        "split": group.split,
        "metric": group.metric,
        "unit": group.unit,
        "lower_is_better": group.lower_is_better,
        "systems": systems,
        "p_values": [
            {"systems": list(pair), "corrected": value, "bootstrap": group.bootstrap_p_values[pair]}
            for pair, value in sorted(group.p_values.items())
        ],
    }


def _finite(value: Any) -> Any:
    """A JSON value with infinities as the strings "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
