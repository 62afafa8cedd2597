"""Stage `prepare`: raw sources of one data set become shards, manifest and tokenizer."""

from __future__ import annotations

from pathlib import Path

from unroll.config import load_dataset, load_part
from unroll.progress import progress
from unroll.training.runs import Place


def prepare(root: Path, name: str) -> Path:
    """Prepare the data set `name` and return its folder.

    Raises:
        UserError: unknown name, source missing or damaged, bad text.
    """
    entry = load_dataset(root, name)
    preparer = load_part("datasets", entry.preparer, f"{root / 'params.yaml'}: datasets.{name}.preparer")
    folder = Place(root).data(name)
    with progress(f"prepare {name}", None) as bar:
        preparer.prepare(entry, name, root, folder, bar.reach)
    return folder
