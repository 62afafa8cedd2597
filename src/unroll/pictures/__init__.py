"""Pictures of what a system did, one file a kind, named in the predictions; drawn by stage `evaluate`.

A task's `predict` writes `pictures.jsonl`, one line a picture: `{"kind": file in pictures/, "title", "text", "data": what
that file's `draw` reads}`; image files that a picture needs lie beside it in `files/`. Drawing is apart from predicting, so
that a better picture needs no new prediction. A kind defines

    draw(data, folder, out)     writes a PNG to `out`; `folder` holds the predictions

and raises UserError where `data` is not what it draws.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unroll.config import load_part
from unroll.errors import UserError
from unroll.metrics._predictions import read_lines

LINES, LISTED = "pictures.jsonl", "pictures.json"


def draw_all(predictions: Path, out: Path) -> int:
    """Draw every line of `pictures.jsonl` into `out/pictures/`, list them in `out/pictures.json`; gives their number.

    Raises:
        UserError: an unknown kind, or data that it cannot draw (file and line).
    """
    path = predictions / LINES
    listed: list[dict[str, Any]] = []
    for number, line in read_lines(path) if path.exists() else []:
        place = f"{path}:{number}"
        kind = line.get("kind")
        name = f"{len(listed):02}-{kind}.png"
        drawer = load_part("pictures", str(kind), place)
        (out / "pictures").mkdir(exist_ok=True)
        try:
            drawer.draw(line["data"], predictions, out / "pictures" / name)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{place}: a picture of kind {kind!r} cannot be drawn from this: {error!r}") from error
        listed.append({"file": name, "title": str(line.get("title", "")), "text": str(line.get("text", ""))})
    if listed:
        (out / LISTED).write_text(json.dumps(listed, indent=1, ensure_ascii=False))
    return len(listed)
