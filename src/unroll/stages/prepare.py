"""Stage `prepare`: raw sources of one data set become shards, manifest and tokenizer."""

from __future__ import annotations

from pathlib import Path

from unroll.config import load_dataset, load_part
from unroll.place import Place
from unroll.progress import progress
from unroll.stages.first_download import with_hashes


def prepare(root: Path, name: str, trust_first_download: bool = False) -> Path:
    """Prepare the data set `name` and return its folder. `trust_first_download`: see `first_download.py`.

    Raises:
        UserError: unknown name, source missing or damaged, bad text.
    """
    entry = load_dataset(root, name)
    preparer = load_part("datasets", entry.preparer, f"{root / 'params.yaml'}: datasets.{name}.preparer")
    folder = Place(root).data(name)
    with progress(f"prepare {name}", None) as bar:
        entry = with_hashes(entry, root, name, trust_first_download, bar.reach)
        preparer.prepare(entry, name, root, folder, bar.reach)
    return folder
