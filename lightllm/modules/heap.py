"""The C library's heap, told how a training step uses memory."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3), in malloc.h
_LARGEST = 2**30


def keep_freed_memory() -> bool:
    """Have the heap keep what is freed, for the next step that allocates the same again.

    By default glibc gives large blocks back to the system at once, so that every activation of every step costs page
    faults anew: about a tenth of a step on a CPU. The process's peak is the same; between steps it shrinks less.

    Returns:
        Whether it was done: only glibc (Linux) has the means; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    try:
        mallopt = library.mallopt
    except AttributeError:  # another C library, such as musl
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _LARGEST), (_M_TOP_PAD, 2**26))
    return all(mallopt(option, value) == 1 for option, value in settings)
