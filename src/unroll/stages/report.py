"""Stage `report`: the leaderboard page of one suite from the results of its recipes."""

from __future__ import annotations

from pathlib import Path

from unroll.report.build import build


def report(root: Path, suite: str) -> Path:
    """Write `reports/<suite>/index.html` and return its path.

    Raises:
        UserError: the suite has no results.
    """
    out = root / "reports" / suite
    build(suite, root / "results" / suite, root / "evaluations" / suite, out)
    return out / "index.html"
