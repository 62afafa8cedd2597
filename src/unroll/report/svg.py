"""A matplotlib figure as an SVG element that lives in the page: its font, its colours in light and dark, its policy.

matplotlib writes `style` attributes and fixed colours. The page's content policy forbids the first, dark mode the
second: styles become presentation attributes, and the colours named below become CSS variables of the page. Metadata,
fonts and identifiers that nothing refers to are dropped, so the bytes depend on the data alone.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree

from markupsafe import Markup
from matplotlib.figure import Figure

# Stand-ins for the page's colours. They are never shown: each is replaced by the CSS variable of its name.
INK, FAINT, GRID = "#010101", "#010102", "#010103"
SERIES = tuple(f"#0202{index:02x}" for index in range(8))

_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", GRID: "var(--grid)"} | {
    color: f"var(--series-{index})" for index, color in enumerate(SERIES)
}
_NAMESPACE = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"#([\w.-]+)")


def inline(figure: Figure, name: str, label: str) -> Markup:
    """The figure as one `<svg>` element.

    Args:
        figure: drawn with the colours of this module, `svg.fonttype` "none" and a fixed `svg.hashsalt`.
        name: prefix of its identifiers, different for each figure of a page.
        label: what the figure shows, for those who cannot see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _drop(root, f"{{{_NAMESPACE}}}metadata")
    _drop(root, f"{{{_NAMESPACE}}}style")
    for element in root.iter():
        _presentation(element)
    _rename(root, name)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", label)
    root.set("class", "plot")
    ElementTree.register_namespace("", _NAMESPACE)
    text = ElementTree.tostring(root, encoding="unicode")
    return Markup(re.sub(r"\s*\n\s*", " ", text))


def _drop(root: ElementTree.Element, tag: str) -> None:
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag == tag]:
            parent.remove(child)


def _presentation(element: ElementTree.Element) -> None:
    """The element's `style` as attributes; the font family is the page's."""
    for declaration in filter(None, element.attrib.pop("style", "").split(";")):
        key, value = (part.strip() for part in declaration.split(":", 1))
        if key != "font-family":
            element.set(key, _VARIABLES.get(value, value))


def _rename(root: ElementTree.Element, name: str) -> None:
    """Keep the identifiers that something refers to, prefixed; drop the others."""
    used = {
        match for element in root.iter() for value in element.attrib.values() for match in _REFERENCE.findall(value)
    }
    for element in root.iter():
        if _LINK in element.attrib:
            element.set("href", element.attrib.pop(_LINK))
        for key, value in list(element.attrib.items()):
            if key == "id" and value not in used:
                del element.attrib[key]
            elif key == "id":
                element.set(key, f"{name}-{value}")
            elif key in ("href", "clip-path"):
                element.set(key, _REFERENCE.sub(lambda found: f"#{name}-{found[1]}", value))
