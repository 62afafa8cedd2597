"""Pictures of the predictions: drawn from their lines, listed and shown in the page; what cannot be drawn is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_suite import HOSTILE, write_lines, write_suite

from unroll.errors import UserError
from unroll.pictures import draw_all
from unroll.report.build import build

PNG = b"\x89PNG\r\n\x1a\n"


def heat_map(**panel: Any) -> dict[str, Any]:
    panels = [
        {
            "values": [[0.1, 0.9], [1.0, 0.0]],
            "title": "read $x$",
            "rows": ["a", "b"],
            "columns": ["long word", "d"],
            **panel,
        }
    ]
    return {"kind": "heat_maps", "title": "Weights", "text": "of one head", "data": {"panels": panels}}


def test_every_line_becomes_a_listed_png(tmp_path: Path) -> None:
    write_lines(tmp_path / "pictures.jsonl", [heat_map(), heat_map(values=[[3.0, -2.0]])])
    assert draw_all(tmp_path, tmp_path) == 2
    listed = json.loads((tmp_path / "pictures.json").read_text())
    assert [entry["title"] for entry in listed] == ["Weights", "Weights"]
    for entry in listed:
        assert (tmp_path / "pictures" / entry["file"]).read_bytes().startswith(PNG)


def test_a_long_title_above_long_labels_is_not_cut(tmp_path: Path) -> None:
    """Facts of a story beside four hops: nothing is squeezed away (a warning, and an error here) or runs over the edge."""
    line = heat_map(
        values=[[0.1] * 4] * 9, title="who came back to Koushoub-gleck? Glytriv-Sydriom", rows=["x" * 60] * 9
    )
    write_lines(tmp_path / "pictures.jsonl", [line])
    draw_all(tmp_path, tmp_path)
    drawn = np.asarray(Image.open(tmp_path / "pictures" / "00-heat_maps.png").convert("L"))  # [H,W]
    assert drawn.min() < 255
    assert all((edge == 255).all() for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]))


def test_predictions_without_pictures_list_none(tmp_path: Path) -> None:
    assert draw_all(tmp_path, tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**heat_map(), "kind": "heat_map"}, "did you mean 'heat_maps'"),
        ({**heat_map(), "kind": "../x"}, "no pictures/../x.py"),
        ({**heat_map(), "data": {}}, "cannot be drawn from this: KeyError('panels')"),
        (heat_map(values=[]), "pictures.jsonl:1: panel 0: found a table of shape (0,)"),
    ],
)
def test_what_cannot_be_drawn_is_named(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    write_lines(tmp_path / "pictures.jsonl", [line])
    with pytest.raises(UserError) as error:
        draw_all(tmp_path, tmp_path)
    assert message in str(error.value)


def test_the_page_holds_the_pictures_escaped(tmp_path: Path) -> None:
    root = write_suite(tmp_path)
    folder = root / "evaluations" / "demo" / "lstm"
    write_lines(folder / "pictures.jsonl", [{**heat_map(), "title": HOSTILE, "text": HOSTILE}] * 10)
    draw_all(folder, folder)
    page = build(
        "demo", root / "results" / "demo", root / "evaluations" / "demo", root / "reports" / "demo"
    ).read_text()
    assert page.count('<img src="data:image/png;base64,') == 8
    assert "2 more pictures in the evaluation&#39;s folder." in page
    assert HOSTILE not in page


@pytest.mark.parametrize(
    ("file", "message"), [("../../x.png", "String should match pattern"), ("00-gone.png", "missing")]
)
def test_a_damaged_list_is_named(tmp_path: Path, file: str, message: str) -> None:
    root = write_suite(tmp_path)
    listed = root / "evaluations" / "demo" / "lstm" / "pictures.json"
    listed.write_text(json.dumps([{"file": file, "title": "t", "text": ""}]))
    with pytest.raises(UserError) as error:
        build("demo", root / "results" / "demo", root / "evaluations" / "demo", root / "reports" / "demo")
    assert message in str(error.value)
