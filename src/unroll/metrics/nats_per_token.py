"""Nats per token: total log-loss in nats / predicted tokens; the logarithm of the perplexity."""

from __future__ import annotations

from unroll.metrics._loss_ratio import loss_ratio

lower_is_better = True
statistics, score, compute = loss_ratio("tokens", "nats/token")
