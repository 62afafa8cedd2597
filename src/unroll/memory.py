"""Keep the memory that a training step frees for the next step.

glibc gives large freed blocks back to the system at once. The next step's tensors then start with a page fault for
every 4 KiB, which on a virtual machine costs 0.2 to 0.4 ms for each MiB: as much as the arithmetic of a small language
model. Keeping the memory makes training on a CPU up to twice as fast (`benchmarks/speed_lstm.py` has the figures) and
changes no number; the process then holds its peak, and up to half as much again, until it ends.

Where batches differ in shape from step to step, freed blocks seldom fit the next one and what is held grows to several
times the peak. `return_unused` gives the pages that nobody uses back; called every few dozen steps it costs little.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


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
