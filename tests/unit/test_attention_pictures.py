"""An attention picture must show the weights where they are, and survive whatever text a model reads or writes."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from report_suite import HOSTILE

from unroll.errors import UserError
from unroll.report import attention
from unroll.report.attention import Attention, attention_svg, label, read_attention
from unroll.report.plots import save_attention

SVG = "{http://www.w3.org/2000/svg}"
SOURCE, TARGET = ["Ein", "Hund", "rennt", "."], ["A", "dog", "."]
WEIGHTS = [[0.9, 0.1, 0.0, 0.0], [0.0, 0.75, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]]


def drawn(svg: str) -> dict[tuple[float, float], tuple[float, str]]:
    """Weight and title of each cell by its place (row, column)."""
    root = ElementTree.fromstring(svg)
    cells = [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    return {
        (float(cell.attrib["y"]) / 22, float(cell.attrib["x"]) / 22): (
            float(cell.attrib["fill-opacity"]),
            cell.findtext(f"{SVG}title", ""),
        )
        for cell in cells
    }


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_each_weight_stands_in_the_row_of_its_target_and_the_column_of_its_source() -> None:
    cells = drawn(attention_svg(SOURCE, TARGET, WEIGHTS))
    assert {place: weight for place, (weight, _) in cells.items()} == {
        (0, 0): 0.9,
        (0, 1): 0.1,
        (1, 1): 0.75,
        (1, 2): 0.25,
        (2, 3): 1.0,
    }
    assert cells[1, 2][1] == "rennt → dog: 0.25"


def test_every_token_is_labelled_where_its_row_or_column_is() -> None:
    svg = attention_svg(SOURCE, TARGET, WEIGHTS)
    assert texts(svg) == [*SOURCE, *TARGET, "0", "1"]
    labels = [element for element in ElementTree.fromstring(svg).iter(f"{SVG}text") if element.text in TARGET[:2]]
    assert [float(element.attrib["y"]) // 22 for element in labels] == [0, 1]
    turned = re.findall(r'translate\(([\d.]+) -7\) rotate\(-50\)">(\w+)', svg)
    assert [(float(x) // 22, text) for x, text in turned] == [(0, "Ein"), (1, "Hund"), (2, "rennt")]


def test_nothing_lies_outside_the_picture() -> None:
    """Long labels make the picture larger; nothing is cut off."""
    svg = attention_svg(["donaudampfschiffahrt", "漢字漢字漢字漢字"], ["x" * 90, "y"], np.eye(2))
    root = ElementTree.fromstring(svg)
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    found = re.search(r"<g transform=\"translate\(([\d.]+) ([\d.]+)\)", svg)
    assert found
    left, top = map(float, found.groups())
    assert left > 24 * 0.5 * 13  # the longest label, cut to 24 characters
    assert left + 2 * 22 < width
    assert top > 20 * 0.5 * 13 * 0.7
    assert top + 2 * 22 + 12 < height


@pytest.mark.parametrize("text", [HOSTILE, "&lt;script&gt;", "]]>", "\"'`", "</text></svg><svg onload=alert(1)>"])
def test_hostile_tokens_are_text(text: str) -> None:
    svg = attention_svg([text], [text], [[1.0]])
    root = ElementTree.fromstring(svg)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {"svg", "rect", "g", "title", "path", "text"}
    assert not any(name.startswith("on") for element in root.iter() for name in element.attrib)
    assert texts(svg)[0] == label(text)


@pytest.mark.parametrize("text", ["\0", "\x1b[31m", "\ud800", "\ufffe\uffff", "a\u202eb", "\r", "\n", "\t", " ", ""])
def test_characters_that_xml_forbids_or_nobody_sees_are_replaced(text: str) -> None:
    svg = attention_svg([text], ["x"], [[0.5]])
    shown = texts(svg)[0]
    assert shown.strip()
    assert not re.search("[\x00-\x1f\u202e\ud800-\udfff\ufffe\uffff]", shown)
    svg.encode("utf-8")


def test_weights_of_another_shape_or_out_of_range_are_refused() -> None:
    for weights in (WEIGHTS[:2], np.transpose(WEIGHTS), [[1.0], [1.0, 0.0]], "x", None, [[[0.1]]]):
        with pytest.raises(ValueError, match=r"expected"):
            attention_svg(SOURCE, TARGET, weights)  # type: ignore[arg-type]
    for wrong in (-0.1, 1.5, np.nan, np.inf):
        with pytest.raises(ValueError, match="between 0 and 1"):
            attention_svg(["a"], ["b"], [[wrong]])


def test_a_sentence_too_long_to_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LARGEST", 3)
    with pytest.raises(UserError, match=r"attention of 3 x 4 tokens: at most 3 on a side can be drawn"):
        attention_svg(SOURCE, TARGET, WEIGHTS)


def test_an_empty_translation_is_a_picture_too() -> None:
    assert texts(attention_svg(SOURCE, [], [])) == [*SOURCE, "0", "1"]
    assert texts(attention_svg([], [], np.zeros((0, 0)))) == ["0", "1"]


def test_the_same_sentence_gives_the_same_bytes() -> None:
    assert attention_svg(SOURCE, TARGET, WEIGHTS) == attention_svg(SOURCE, TARGET, np.array(WEIGHTS))


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def entry(**changes: object) -> dict[str, object]:
    return {"id": 3, "source": SOURCE, "target": TARGET, "weights": WEIGHTS, "reason": "worst", **changes}


def test_a_file_of_attention_is_read_as_written(tmp_path: Path) -> None:
    [one, two] = read_attention(write(tmp_path / "attention.jsonl", entry(), entry(id=4, target=[], weights=[])))
    assert (one.number, one.source, one.target, one.reason) == (3, SOURCE, TARGET, "worst")
    assert one.weights.tolist() == WEIGHTS
    assert two.weights.shape == (0, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"attention\.jsonl:2: not JSON"),
        (entry(id="x"), r":2: 'id' is 'x', a whole number from 0 on"),
        (entry(source="Ein Hund"), r":2: 'source' is 'Ein Hund', a list of strings is expected"),
        (entry(target=["a", 1, "."]), r":2: 'target' is \['a', 1, '\.'\]"),
        (
            entry(weights=WEIGHTS[:2]),
            r":2: 'weights': shape \[2, 4\] found, one row per target token \[3, 4\] is expected",
        ),
        (entry(weights="x"), r":2: 'weights': rows of equally many numbers are expected"),
        (entry(weights=[[2.0] * 4] * 3), r":2: 'weights': numbers between 0 and 1 are expected"),
    ],
)
def test_damaged_files_are_named_with_their_line(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read_attention(write(tmp_path / "attention.jsonl", entry(), line))
    assert "\n" not in str(raised.value)


def test_the_picture_for_the_tracker_is_a_png_of_any_text(tmp_path: Path) -> None:
    """No formula is parsed, and a script that the font lacks is no failure."""
    tokens = [r"$\frac{", "漢字", "\0", ""]
    sentence = Attention(0, tokens, tokens, np.eye(4), "first")
    save_attention(sentence, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
