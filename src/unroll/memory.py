"""Keep the memory that a training step frees for the next step.

glibc gives large freed blocks back to the system at once. The next step's tensors then start with a page fault for
every 4 KiB, which on a virtual machine costs 0.2 to 0.4 ms for each MiB: as much as the arithmetic of a small language
model. Keeping the memory makes training on a CPU up to twice as fast (`benchmarks/speed_lstm.py` has the figures) and
changes no number; the process then holds its peak, and up to half as much again, until it ends.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Ask the C library to return nothing to the system from now on; false where it cannot (not glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return mallopt(_M_MMAP_MAX, 0) == 1 and mallopt(_M_TRIM_THRESHOLD, -1) == 1
