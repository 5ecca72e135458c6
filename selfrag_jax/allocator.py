"""Host memory of a process that computes on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform
from glob import glob

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*")


def keep_freed_memory() -> bool:
    """What is freed stays with the process, for the next allocation. Returns whether that is so now.

    XLA on a CPU allocates a program's temporaries anew in every call, and glibc gives blocks of that size back to the system: each
    training step begins with pages that the kernel has to clear and map one by one (a quarter of a million a GB, a twelfth to a
    fifth of a step of 0.1B parameters). To be called before JAX starts its threads, which else have arenas of their own that never
    hold large blocks. A block does not always go where the one before it was (small allocations settle in between): within the
    first calls a process comes to hold a few blocks more than it uses at once. Does nothing where there is an accelerator, whose
    host has other things to do with its memory, or no glibc.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(glob, _ACCELERATORS))
    if not on_cpu or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(
        libc.mallopt(*setting)
        for setting in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1))
    )
