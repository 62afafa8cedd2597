"""Keep the memory that a training step frees for the next step.

glibc gives large freed blocks back to the system at once. The next step's tensors then start with a page fault for
every 4 KiB, which on a virtual machine costs 0.2 to 0.4 ms for each MiB: as much as the arithmetic of a small language
model. Keeping the memory makes training on a CPU up to twice as fast (`benchmarks/speed_lstm.py` has the figures) and
changes no number; the process then holds its peak, and up to half as much again, until it ends.

Where batches differ in shape from step to step, freed blocks seldom fit the next one and what is held grows to several
times the peak. `return_unused` gives the pages that nobody uses back; called every few dozen steps it costs little.

There, too, oneDNN compiles for each new shape, and what it compiled is kept in two caches of 1,024 entries, its own and
that of torch's wrapper: a megabyte an entry for bfloat16 matrix products, 1.5 GB for a small translator.
`keep_few_compiled_shapes` bounds them. Full caches would find three of four shapes of a step again, so training takes a
tenth longer (`benchmarks/shape_caches.py`), or twice as long where the model is small; no number changes.
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

COMPILED_SHAPES = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""Entries of torch's and of oneDNN's cache. More than the layers of one step need, so that layers of one shape share."""


def keep_freed_memory() -> bool:
    """Ask the C library to return nothing to the system from now on; false where it cannot (not glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return mallopt(_M_MMAP_MAX, 0) == 1 and mallopt(_M_TRIM_THRESHOLD, -1) == 1


def return_unused() -> None:
    """Give freed memory back to the system now, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_few_compiled_shapes() -> None:
    """Bound oneDNN's caches in this process, unless the environment says how much they may hold.

    Both sizes are read once, when the first operation uses oneDNN; after that a call changes nothing.
    """
    for name, entries in COMPILED_SHAPES.items():
        os.environ.setdefault(name, entries)
