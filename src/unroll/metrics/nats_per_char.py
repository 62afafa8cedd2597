"""Nats per character: total log-loss in nats / characters (Unicode code points) of the predicted text.

Compares models of any tokenization on one text; of character models it is the nats per token.
"""

from __future__ import annotations

from unroll.metrics._loss_ratio import loss_ratio

lower_is_better = True
statistics, score, compute = loss_ratio("characters", "nats/char")
