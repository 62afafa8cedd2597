"""What the page shows, as plain values: the template only lays it out."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from unroll.report import formatting, plots
from unroll.report.attention import Attention, attention_svg
from unroll.report.inputs import Example, MetricValue, Picture, Result, System
from unroll.report.leaderboard import LEVEL, Group, Leaderboard, direction, signatures

SAMPLES_SHOWN = 12  # of each system
CHARACTERS_SHOWN = 1500  # of each sample
HEAT_MAPS_SHOWN = 6  # of each system
PICTURES_SHOWN = 8  # of each system
BESIDE = ("bits_per_byte", "bleu", "chrf", "ter", "exact_match")  # metrics that have a column where they are no primary
DIFFERENT = "†"
REASONS = {"first": "one of the first", "worst": "one of those it was least sure of", "longest": "one of the longest"}


def page(board: Leaderboard) -> dict[str, Any]:
    """All values of the template."""
    return {
        "suite": board.suite,
        "facts": _facts(board),
        "groups": [_group(group, number) for number, group in enumerate(board.groups, start=1)],
        "systems": [_system(system) for system in board.systems],
        "has_samples": any(system.samples for system in board.systems),
        "has_examples": any(system.examples or system.attention for system in board.systems),
        "has_pictures": any(system.pictures for system in board.systems),
        "unscored": board.unscored,
        "definitions": _definitions(board),
        "level": LEVEL,
    }


def mark(group: Group, system: System) -> str:
    """How a system stands against the best of its group, in words."""
    standing = group.standing(system)
    if standing == "best":
        return "best" if len(group.ranked) > 1 else "the only one"
    if standing == "untested":
        return "not tested" if system.result.score else "no score"
    shown = formatting.p_value(group.p_value(group.systems[0], system) or 0.0)
    p_value = f"p {shown}" if shown.startswith("<") else f"p = {shown}"
    return f"{'≈ best' if standing == 'tied' else 'worse'}, {p_value}"


def published(result: Result) -> str:
    """The published number with its metric, where that is not the one the table is sorted by."""
    reference = result.reference
    if reference is None:
        return formatting.NOTHING
    metric = "" if reference.metric == result.primary else reference.metric.replace("_", " ")
    return f"{reference.value:,.6g} {metric}".strip()


def conditions(result: Result) -> str:
    """Where the published number is from, and whether it was got under our conditions."""
    reference = result.reference
    if reference is None:
        return ""
    same = "same conditions" if reference.same_conditions else "conditions differ"
    return f"{reference.source} ({same}){': ' + reference.note if reference.note else ''}"


def seeds(result: Result, digits: int) -> str:
    """How many seeds, with mean, deviation and best of the primary metric over them."""
    return _seeds(result.primary, result.score, len(result.seeds), digits)


def _seeds(metric: str, score: MetricValue | None, count: int, digits: int) -> str:
    if score is None or not score.per_seed:
        return str(count)
    best = (min if direction(metric)[0] else max)(score.per_seed)
    return formatting.seeds(count, score.mean, score.deviation, best, digits)


def _facts(board: Leaderboard) -> str:
    """The suite in a sentence."""
    commits = sorted({system.result.commit for system in board.systems if system.result.commit})
    shown = ", ".join(commits[:3]) + (f" and {len(commits) - 3} more" if len(commits) > 3 else "")
    systems = _count(len(board.systems), "system")
    tests = _count(len(board.groups), "test set")
    return f"{systems} on {tests}" + (f", trained at commit {shown}." if commits else ".")


def _group(group: Group, number: int) -> dict[str, Any]:
    name = f"group-{number}"
    footnotes = _footnotes(group, name)
    rows = [_row(group, index, system, footnotes) for index, system in enumerate(group.systems)]
    return {
        "id": name,
        "dataset": group.dataset,
        "split": group.split,
        "unit": group.unit,
        "lower_is_better": group.lower_is_better,
        "definition": group.definition,
        "summary": _summary(group),
        "columns": _columns(group),
        "rows": rows,
        "footnotes": list(footnotes.values()),
        "figures": _figures(group, name),
        "matrix": _matrix(group) if group.p_values else None,
    }


def _strong(system: System) -> Markup:
    return Markup("<strong>{}</strong>").format(system.result.name)


def _summary(group: Group) -> str:
    """Who is best and how sure that is, in a sentence or two."""
    return _standings(group) + _warning(group)


def _standings(group: Group) -> str:
    best, others = group.systems[0], group.systems[1:]
    if best.result.score is None:
        return "No system has a score yet."
    digits = _digits(group)
    value = formatting.fixed(best.result.score.value, digits)
    bounds = formatting.interval(best.result.score.low, best.result.score.high, digits)
    verb = "is best with" if len(group.ranked) > 1 else "reaches"
    text = _strong(best) + f" {verb} {value} {group.unit}{' ' if bounds else ''}{bounds}."
    tied = [_strong(system) for system in others if group.standing(system) == "tied"]
    if len(tied) > 3:
        return text + f" {len(tied)} systems are not significantly different from it."
    if tied:
        return text + " " + _join(tied) + f" {'is' if len(tied) == 1 else 'are'} not significantly different from it."
    if any(group.standing(system) == "worse" for system in others):
        return text + " Its lead over every other tested system is significant."
    return text


def _warning(group: Group) -> str:
    """That scores were computed in different ways, where they were."""
    ways = signatures([system.result for system in group.systems])
    if len(ways) < 2:
        return ""
    return f" Take care: the scores were computed in {len(ways)} ways, see the signatures under Systems."


def _digits(group: Group) -> int:
    return formatting.decimals((score.value for score in group.scores if score), group.unit)


def _columns(group: Group) -> list[str]:
    columns = ["Published"] if any(system.result.reference for system in group.systems) else []
    columns += _others(group)
    columns += ["Parameters", "Tokens/s", "Minutes", "FLOPs/token"]
    if any(system.result.cost.energy_joules is not None for system in group.systems):
        columns.append("Energy")
    return [*columns, "Seeds"]


def _others(group: Group) -> dict[str, str]:
    """Column and name of the metrics that stand beside the one the table is sorted by."""
    found = {}
    for name in BESIDE:
        units = [system.result.metrics[name].unit for system in group.systems if name in system.result.metrics]
        if name != group.metric and units:
            found[units[0]] = name
    return found


def _row(group: Group, index: int, system: System, footnotes: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    result, score, digits = system.result, system.result.score, _digits(group)
    return {
        "index": index,
        "id": _identifier(result),
        "rank": index + 1 if score else formatting.NOTHING,
        "name": result.name,
        "recipe": result.recipe,
        "value": formatting.fixed(score.value if score else None, digits),
        "interval": formatting.interval(score.low, score.high, digits) if score else "",
        "standing": group.standing(system),
        "mark": mark(group, system),
        "reference": _reference(result, footnotes),
        "cells": _cells(result, _others(group)),
        "over_seeds": seeds(result, digits).partition(": ")[2],
    }


def _cells(result: Result, others: Mapping[str, str]) -> dict[str, str]:
    cost = result.cost
    energy = formatting.scaled(cost.energy_joules)
    return {
        **{unit: _other(result.metrics.get(name)) for unit, name in others.items()},
        "Parameters": formatting.scaled(cost.parameters),
        "Tokens/s": formatting.scaled(cost.tokens_per_second),
        "Minutes": formatting.minutes(cost.minutes),
        "FLOPs/token": formatting.scaled(cost.flops_per_token),
        "Energy": energy if energy == formatting.NOTHING else f"{energy}{'' if energy[-1].isalpha() else ' '}J",
        "Seeds": str(len(result.seeds)),
    }


def _other(score: MetricValue | None) -> str:
    return (
        formatting.fixed(score.value, formatting.decimals([score.value], score.unit)) if score else formatting.NOTHING
    )


def _footnotes(group: Group, name: str) -> dict[str, dict[str, Any]]:
    """One numbered note for each different source and note; a dagger where the conditions differ."""
    notes: dict[str, dict[str, Any]] = {}
    for system in group.systems:
        reference, text = system.result.reference, conditions(system.result)
        if reference and text not in notes:
            number = len(notes) + 1
            symbol = "" if reference.same_conditions else DIFFERENT
            notes[text] = {"id": f"{name}-note-{number}", "number": number, "symbol": symbol, "text": text}
    return notes


def _reference(result: Result, footnotes: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    if result.reference is None:
        return None
    text = conditions(result)
    note = footnotes[text]
    value, _, metric = published(result).partition(" ")
    values = {"symbol": note["symbol"], "footnote": note["number"], "footnote_id": note["id"]}
    return {"value": value, "metric": metric, "tooltip": text, **values}


def _figures(group: Group, name: str) -> list[dict[str, Any]]:
    """The pictures of a group that can be drawn."""
    everywhere = all("bits_per_byte" in system.result.metrics for system in group.systems)
    metric = "bits_per_byte" if everywhere else group.metric
    silent = [system.result.name for system in group.systems if not plots.has_losses(system)]
    without = f" Without a curve: {'; '.join(silent)}." if silent else ""
    validated = "Thick with marks: validation. " if any(map(plots.has_validation_losses, group.systems)) else ""
    drawn = [
        (
            "Bits per byte" if everywhere else _capital(group.unit),
            plots.bars(group, metric, f"{name}-bars"),
            "Bars start at zero; the whiskers are 95 % intervals.",
        ),
        (
            f"{_capital(group.unit)} by length",
            plots.by_length(group, f"{name}-lengths"),
            "Over the samples of each length alone; few of them make a noisy point.",
        ),
        (
            "Loss",
            plots.losses(group, f"{name}-losses"),
            f"{validated}Thin: training, as logged. The first fall is cut off.{without}",
        ),
        (
            "Gradient norm",
            plots.gradient_norms(group, f"{name}-gradients"),
            "Norm over all parameters before clipping, logarithmic scale. Thin: as logged. Thick: running mean.",
        ),
    ]
    return [{"title": title, "svg": svg, "caption": caption} for title, svg, caption in drawn if svg is not None]


def _matrix(group: Group) -> list[dict[str, Any]]:
    """Rows of cells: the corrected p-value of row and column, with who is better where they differ."""
    return [
        {"name": system.result.name, "cells": [_cell(group, row, column) for column in range(len(group.systems))]}
        for row, system in enumerate(group.systems)
    ]


def _cell(group: Group, row: int, column: int) -> dict[str, str]:
    p_value = group.p_value(group.systems[row], group.systems[column])
    if row == column or p_value is None:
        return {"kind": "none", "text": "" if row == column else formatting.NOTHING, "bootstrap": ""}
    resampled = group.bootstrap_p_value(group.systems[row], group.systems[column])
    small = formatting.NOTHING if resampled is None else formatting.p_value(resampled)
    kind, sign = ("equal", "=") if p_value >= LEVEL else ("better", "▲") if row < column else ("worse", "▼")
    return {"kind": kind, "text": f"{sign} {formatting.p_value(p_value)}", "bootstrap": small}


def _system(system: System) -> dict[str, Any]:
    result = system.result
    left_out = len(system.samples) - SAMPLES_SHOWN
    return {
        "id": _identifier(result),
        "name": result.name,
        "recipe": result.recipe,
        "test_set": ", ".join(filter(None, result.tested_on)),
        "missing": system.missing,
        "metrics": [_metric(name, value) for name, value in result.metrics.items()],
        "parts": _parts(result),
        "samples": [
            {"setting": sample.setting, "prompt": _cut(sample.prompt), "text": _cut(sample.text)}
            for sample in system.samples[:SAMPLES_SHOWN]
        ],
        "samples_left_out": f"{_count(left_out, 'more sample')} in samples.jsonl." if left_out > 0 else "",
        "examples": [_example(example) for example in system.examples],
        "heat_maps": [_heat_map(attention) for attention in system.attention if attention.fits][:HEAT_MAPS_SHOWN],
        "heat_maps_left_out": _left_out(system),
        "pictures": [_picture(picture) for picture in system.pictures[:PICTURES_SHOWN]],
        "pictures_left_out": _more_pictures(system),
    }


def _example(example: Example) -> dict[str, Any]:
    return {
        "heading": f"{_capital(example.rank)}: sentence {example.id}, chrF {example.chrf:.1f}",
        "texts": [
            ("source", _cut(example.source)),
            *(("reference", _cut(reference)) for reference in example.references),
            ("system", _cut(example.hypothesis)),
        ],
    }


def _heat_map(attention: Attention) -> dict[str, Any]:
    """`attention_svg` escapes what it is given; its text is markup from here on."""
    svg = attention_svg(attention.source, attention.target, attention.weights)
    reason = REASONS.get(attention.reason, attention.reason)
    return {"svg": Markup(svg), "caption": f"Sentence {attention.number}{f': {reason}' if reason else ''}"}


def _picture(picture: Picture) -> dict[str, str]:
    """The PNG stands in the page itself, which loads nothing."""
    source = "data:image/png;base64," + base64.b64encode(picture.png).decode()
    return {"title": picture.title, "text": _cut(picture.text), "source": source}


def _more_pictures(system: System) -> str:
    more = len(system.pictures) - PICTURES_SHOWN
    return f"{_count(more, 'more picture')} in the evaluation's folder." if more > 0 else ""


def _left_out(system: System) -> str:
    large = sum(not attention.fits for attention in system.attention)
    more = max(0, len(system.attention) - large - HEAT_MAPS_SHOWN)
    parts = [f"{_count(more, 'more sentence')} in attention.jsonl."] if more else []
    return " ".join([*parts, f"{_count(large, 'sentence')} too long to be drawn."] if large else parts)


def _metric(name: str, score: MetricValue) -> dict[str, Any]:
    digits = formatting.decimals([score.value], score.unit)
    each = ", ".join(formatting.fixed(value, digits) for value in score.per_seed or [])
    shown = _seeds(name, score, len(score.per_seed or [score]), digits)
    return {
        "name": name,
        "value": f"{formatting.fixed(score.value, digits)} {score.unit}",
        "interval": formatting.interval(score.low, score.high, digits) or formatting.NOTHING,
        "n": score.n,
        "seeds": f"{shown} ({each})" if each else shown,
        "signature": score.signature,
    }


def _parts(result: Result) -> list[dict[str, Any]]:
    """Lists of facts about a system: where it comes from, what it cost, how it was configured."""
    cost = result.cost
    origin = [
        ("task", result.task),
        ("model", result.model_name),
        ("data set", f"{result.dataset} ({result.split})"),
        ("test set", ", ".join(filter(None, result.tested_on))),
        ("data hash", result.data_hash or formatting.NOTHING),
        ("commit", result.commit or formatting.NOTHING),
        ("seeds", ", ".join(map(str, result.seeds))),
    ]
    memory = formatting.NOTHING if cost.peak_memory_mb is None else f"{cost.peak_memory_mb:,.0f} MB"
    spent = [
        ("device", cost.device or formatting.NOTHING),
        ("parameters", formatting.NOTHING if cost.parameters is None else f"{cost.parameters:,}"),
        ("minutes", formatting.minutes(cost.minutes)),
        ("tokens/s", formatting.scaled(cost.tokens_per_second)),
        ("FLOPs/token", formatting.scaled(cost.flops_per_token)),
        ("peak memory", memory),
        ("energy", "not readable" if cost.energy_joules is None else f"{cost.energy_joules:,.0f} J"),
    ]
    parts = [{"title": "Origin", "entries": origin}, {"title": "Cost", "entries": spent}]
    flat = _flatten(result.configuration or {"model": result.model})
    return [*parts, {"title": "Configuration", "entries": flat}] if flat else parts


def _flatten(configuration: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested keys joined by points, in the order they stand."""
    entries: list[tuple[str, str]] = []
    for key, value in configuration.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            entries += _flatten(value, f"{name}.")
        else:
            entries.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return entries


def _definitions(board: Leaderboard) -> dict[str, str]:
    """What each unit shown means: the first line of its metric's file."""
    units = {
        score.unit: direction(name)[1].split(": ", 1)[-1]
        for system in board.systems
        for name, score in system.result.metrics.items()
    }
    return dict(sorted(units.items()))


def _identifier(result: Result) -> str:
    return f"system-{result.recipe}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS_SHOWN else f"{text[:CHARACTERS_SHOWN]}…"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else Markup(", ").join(names[:-1]) + " and " + names[-1]
