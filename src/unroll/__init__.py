"""unroll: one reproducible, distributed benchmark for sequence models."""

__version__ = "0.1.0"
