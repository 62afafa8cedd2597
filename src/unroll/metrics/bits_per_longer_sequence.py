"""Bits per sequence of sequences longer than those of training: does the system generalise?"""

from __future__ import annotations

import math

from unroll.metrics._sequences import sequence_ratio

lower_is_better = True
statistics, score, compute = sequence_ratio("loss", None, "bits/sequence", scale=1 / math.log(2), longer=True)
