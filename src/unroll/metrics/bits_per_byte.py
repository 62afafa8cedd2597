"""Bits per byte: total log-loss in bits / UTF-8 bytes of the predicted text.

Compares models of any tokenization on one text; 8 is what a model that knows nothing needs.
"""

from __future__ import annotations

import math

from unroll.metrics._loss_ratio import loss_ratio

lower_is_better = True
statistics, score, compute = loss_ratio("bytes", "bits/byte", scale=1 / math.log(2))
