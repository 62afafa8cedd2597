"""The tables of all results: `docs/results.md`, and the same tables in the README between two markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unroll.config import TINY_SUITE
from unroll.errors import UserError
from unroll.report import formatting, view
from unroll.report.inputs import Result, read_results
from unroll.report.leaderboard import direction, group_by_test_set, rank, signatures
from unroll.report.tables import escape, published_cell, score_cell, table

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

_INTRODUCTION = f"""# Results

Generated from `results/`; do not edit by hand. Ours is the first seed's score with its 95 % interval.
{view.DIFFERENT} marks a published number whose conditions differ from ours; the notes below each table say how. Which
differences are significant stands in `reports/<suite>/index.html`.
"""
_RIGHT = ("Ours", "Published", "Seeds", "Minutes", "Parameters", "Tokens/s")


def write(root: Path, check: bool = False) -> None:
    """Write `docs/results.md` and the tables between the markers in `README.md` from `results/*/*.json`.

    Args:
        root: folder of the project.
        check: write nothing, and fail if a page does not say what the results say.

    Raises:
        UserError: no results, a damaged results file, no markers in the README, or (checking) a page out of date.
    """
    results, readme = root / "results", root / "README.md"
    for path, text in ((root / "docs" / "results.md", page(results)), (readme, spliced(results, readme))):
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path}: differs from what {results} says; write it anew with `unroll results`")


def page(results: Path) -> str:
    """The text of `docs/results.md`: the tables of every suite in `results/*/`, with notes to the published numbers."""
    parts = [_INTRODUCTION]
    for suite in _suites(results):
        parts.append(f"## Suite {escape(suite)}\n")
        parts += _tables(read_results(results / suite))
    return "\n".join(parts)


def spliced(results: Path, readme: Path) -> str:
    """The text of `readme` with one table for each suite between the markers; nothing else changes."""
    try:
        text = readme.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{readme}: no such file") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{readme}: the lines {BEGIN} and {END} are expected, in this order")
    tables = [_short(suite, read_results(results / suite)) for suite in _suites(results)]
    return f"{before}{BEGIN}\n\n{chr(10).join(tables)}\n{END}{after}"


def _suites(results: Path) -> list[str]:
    """Folders in `results` that hold a results file; those of tiny twins say nothing."""
    suites = sorted({path.parent.name for path in results.glob("*/*.json")} - {TINY_SUITE})
    if not suites:
        raise UserError(f"{results}: no results of any suite; evaluate some recipes first")
    return suites


def _short(suite: str, results: Sequence[Result]) -> str:
    """All systems of a suite in one table, best first on each test set: what fits into a README."""
    header, rows = ["Test set", "System", "Ours", "Published", "Minutes", "Parameters"], []
    for (dataset, split, metric), group in group_by_test_set(results).items():
        ranked, unit, arrow = _ranked(metric, group)
        name = f"**{escape(', '.join(filter(None, (dataset, split))))}**<br>{escape(unit)} {arrow}"
        for result, cells in zip(ranked, _rows(ranked, unit), strict=True):
            system, ours, published, *_, minutes, parameters, _ = cells
            rows.append([name if result is ranked[0] else "", system, ours, published, minutes, parameters])
    return f"**Suite {escape(suite)}**\n\n{table(header, rows, _RIGHT)}"


def _tables(results: Sequence[Result]) -> list[str]:
    """A heading line, a table and its notes for each test set."""
    parts = []
    header = ["System", "Ours", "Published", "Seeds", "Commit", "Minutes", "Parameters", "Tokens/s"]
    for (dataset, split, metric), group in group_by_test_set(results).items():
        ranked, unit, _ = _ranked(metric, group)
        better = "lower" if direction(metric)[0] else "higher"
        name = ", ".join(filter(None, (dataset, split)))
        parts.append(f"**{escape(name)}** ({escape(unit)}, {better} is better)\n")
        parts.append(table(header, _rows(ranked, unit), _RIGHT))
        parts.append("".join([*map(_note, ranked), *_signatures(ranked)]))
    return [part for part in parts if part]


def _ranked(metric: str, group: Sequence[Result]) -> tuple[list[Result], str, str]:
    """The systems of a test set, best first, the unit of their score, and an arrow to where it is better."""
    lower_is_better = direction(metric)[0]
    ranked = list(rank(group, lower_is_better))
    unit = next((result.score.unit for result in ranked if result.score), metric)
    return ranked, unit, "↓" if lower_is_better else "↑"


def _rows(ranked: Sequence[Result], unit: str) -> list[list[str]]:
    digits = formatting.decimals((result.score.value for result in ranked if result.score), unit)
    return [_row(result, digits) for result in ranked]


def _row(result: Result, digits: int) -> list[str]:
    cost = result.cost
    return [
        escape(result.name),
        score_cell(result, digits),
        published_cell(result),
        view.seeds(result, digits),
        escape(result.commit or formatting.NOTHING),
        escape(formatting.minutes(cost.minutes)),
        formatting.scaled(cost.parameters),
        formatting.scaled(cost.tokens_per_second),
    ]


def _note(result: Result) -> str:
    return f"- {escape(result.name)}: {escape(view.conditions(result))}\n" if result.reference else ""


def _signatures(ranked: Sequence[Result]) -> list[str]:
    """How the scores were computed, where that is more than a number of blocks; whose, where they differ."""
    ways, lines = signatures(ranked), []
    if len(ways) == 1 and "|" not in next(iter(ways)):
        return []
    for way, results in ways.items():
        whose = f" of {', '.join(escape(result.name) for result in results)}" if len(ways) > 1 else ""
        lines.append(f"- Signature{whose}: {escape(way)}\n")
    return lines
