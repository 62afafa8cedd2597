"""Nats per prediction: total log-loss in nats / targets of generated sequences."""

from __future__ import annotations

from unroll.metrics._sequences import sequence_ratio

lower_is_better = True
statistics, score, compute = sequence_ratio("loss", "predictions", "nats/prediction")
