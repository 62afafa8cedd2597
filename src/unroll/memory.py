"""Keep the memory that a training step frees for the next step.

glibc gives every freed block of more than 32 MiB, and most smaller ones, back to the system at once. The next step's tensors
then start with a page fault for every 4 KiB, which on a virtual machine costs 0.2 to 0.4 ms for each MiB: as much as the
arithmetic of a small language model. Keeping the memory makes training 1.2 to 1.6 times as fast (`benchmarks/speed_lstm.py`); the
process then holds its peak until it ends.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Ask the C library to return nothing to the system from now on; false where it cannot (not glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return mallopt(_M_MMAP_MAX, 0) == 1 and mallopt(_M_TRIM_THRESHOLD, -1) == 1
