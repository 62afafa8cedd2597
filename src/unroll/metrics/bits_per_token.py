"""Bits per token: total log-loss in bits / predicted tokens; the logarithm to base 2 of the perplexity."""

from __future__ import annotations

import math

from unroll.metrics._loss_ratio import loss_ratio

lower_is_better = True
statistics, score, compute = loss_ratio("tokens", "bits/token", scale=1 / math.log(2))
