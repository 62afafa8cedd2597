"""Ponder steps: what a system with adaptive computation time computed, N + R of Graves 2016, / sequences."""

from __future__ import annotations

from unroll.metrics._sequences import sequence_ratio

lower_is_better = True
statistics, score, compute = sequence_ratio("ponder", None, "steps/sequence")
