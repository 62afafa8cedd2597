"""Bits per sequence: total log-loss in bits / sequences. 0 is a task that is solved."""

from __future__ import annotations

import math

from unroll.metrics._sequences import sequence_ratio

lower_is_better = True
statistics, score, compute = sequence_ratio("loss", None, "bits/sequence", scale=1 / math.log(2))
