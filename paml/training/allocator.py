"""Memory of a CPU run: kept by the process between steps, instead of handed back and asked for again.

The C library takes blocks of more than a few hundred kB from the system and returns them when they are freed, so that
every activation of every step is a fresh mapping whose pages the system zeroes one by one. A training step frees and
asks for the same sizes over and over: keeping them made it 1.6 times as fast (benchmarks/RESULTS.md).
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
_NEVER, _GROW_BY = 2**31 - 1, 64 << 20


def keep_memory() -> bool:
    """Let this process keep what it frees; returns whether the C library could be told so (glibc alone).

    It holds until the process ends: its memory stays at the largest that it was. Calling it again changes nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    told = [
        library.mallopt(_M_MMAP_MAX, 0),
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER),
        library.mallopt(_M_TOP_PAD, _GROW_BY),
    ]
    return all(told)
