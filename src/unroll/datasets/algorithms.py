"""Generated algorithmic tasks: nothing is stored but what to generate. The operations: `data/algorithms.py`.

Training batches are drawn on the way from (seed, step); the fixed splits are drawn from a seed too, and the manifest
holds the SHA-256 of what that seed gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from unroll.config import DatasetEntry, Strict, check
from unroll.data.algorithms import fixed_hash, operation_of
from unroll.data.sources import Progress, no_progress
from unroll.data.writers import write_manifest
from unroll.errors import UserError
from unroll.files import new_folder


class FixedSplit(Strict):
    """A fixed set of `samples` sequences. `options`: laid over those of the data set (longer sequences, say)."""

    samples: int = Field(ge=1, le=1_000_000)
    options: dict[str, Any] = Field({})


class Options(Strict):
    """`operation` and its `options`; the fixed `splits`, drawn from `seed`."""

    operation: str
    options: dict[str, Any] = Field({})
    splits: dict[str, FixedSplit]
    seed: int = Field(1, ge=0)


def prepare(entry: DatasetEntry, name: str, root: Path, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Write the prepared folder `out` and give its manifest. `progress` counts samples.

    Raises:
        UserError: options that do not fit, or sources given to a data set that has none.
    """
    place = f"params.yaml: datasets.{name}"
    options: Options = check(Options, entry.options, f"{place}.options")
    if entry.sources:
        raise UserError(f"{place}.sources: algorithmic tasks are generated, no source is allowed")
    if "validation" not in options.splits or "train" in options.splits:
        raise UserError(f"{place}.options.splits: validation is needed, train is generated on the way; found "
                        f"{', '.join(options.splits) or 'none'}")  # fmt: skip
    form = operation_of(options.operation, options.options, f"{place}.options").form
    splits: dict[str, Any] = {"train": {"shards": [], "samples": None}}
    done, total = 0, sum(split.samples for split in options.splits.values())
    for split, fixed in options.splits.items():
        where = f"{place}.options.splits.{split}"
        drawn = operation_of(options.operation, {**options.options, **fixed.options}, where)
        if drawn.form != form:
            raise UserError(f"{where}.options: {drawn.form} differs from the form of training, {form}")
        digest = fixed_hash(drawn, fixed.samples, options.seed, split)
        splits[split] = {"shards": [], "samples": fixed.samples, "options": fixed.options, "sha256": digest}
        done += fixed.samples
        progress(done, total)
    with new_folder(out) as folder:
        manifest = {
            "dataset": name,
            "preparer": "algorithms",
            "kind": "generated",
            "options": options.model_dump(mode="json"),
            "licence": entry.licence,
            "sources": [],
            "vocabulary": {"inputs": form.inputs, "outputs": form.outputs},
            "form": {"kind": form.kind, "groups": form.groups, "classes": form.classes},
            "splits": splits,
            "skipped": {},
        }
        return write_manifest(folder, manifest)
