"""Perplexity: exp(total log-loss in nats / predicted tokens); the unit is "perplexity", 1 is the least.

A token is whatever the data set's tokenizer made: perplexities of different tokenizations do not compare (bits per byte
do). `<eos>` counts where it is predicted. The mean is over tokens, not over blocks or batches.
"""

from __future__ import annotations

import numpy as np

from unroll.metrics._loss_ratio import loss_ratio

lower_is_better = True
statistics, score, compute = loss_ratio("tokens", "perplexity", change=np.exp)
