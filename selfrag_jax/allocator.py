"""Settings of the C library's allocator for computing on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from typing import Any

from selfrag_jax import accelerators

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_SLACK = 2**20  # bytes that small allocations may take before a program takes the rest
_PATIENCE = 1.0  # seconds until a program that has given its results has freed its temporaries


_glibc: Any = None  # once freed memory is kept


class _HeapInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for later allocations. Returns whether the setting is on.

    On a CPU, XLA allocates a program's temporaries anew on every call, and glibc returns blocks of
    that size to the system. Each training step then faults on pages that the kernel must clear and
    map one by one: a quarter of a million per GB, 8 to 20% of a step at 0.1B parameters.

    Call it before JAX starts its threads. Later ones would get arenas of their own, which never
    hold large blocks. A freed block is not always reused in place, because small allocations settle
    in the gap; during the first calls the process grows to a few blocks more than it uses at once.

    Does nothing on a host with an accelerator, which has other uses for its memory, or without
    glibc.
    """
    has_accelerator = accelerators.has_gpu() or accelerators.has_tpu()
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not has_accelerator
    if not on_cpu or platform.libc_ver()[0] != "glibc":
        return False
    global _glibc
    glibc = ctypes.CDLL(None)
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1))  # -1: never
    if not all(glibc.mallopt(*setting) for setting in settings):
        return False
    glibc.malloc.argtypes, glibc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    glibc.free.argtypes, glibc.free.restype = [ctypes.c_void_p], None
    glibc.malloc_trim.argtypes = [ctypes.c_size_t]
    if hasattr(glibc, "mallinfo2"):  # from glibc 2.33 on
        glibc.mallinfo2.restype = _HeapInfo
    _glibc = glibc
    return True


def return_freed_memory() -> None:
    """Returns what is kept to the system, after work that needed more than what follows.

    Does nothing unless `keep_freed_memory` is on.
    """
    if _glibc is not None:
        _glibc.malloc_trim(0)


def _bytes_in_use() -> int | None:
    """The bytes of the heap that are allocated; None if the library does not tell."""
    if not hasattr(_glibc, "mallinfo2"):
        return None
    return _glibc.mallinfo2().uordblks


class KeptBlock:
    """Keeps the place of a program's temporaries in the heap from call to call.

    A program on a CPU takes all of its temporaries as one block, and frees it at its end. Small
    allocations would settle in the gap, and the next call would find no room there: the process
    would grow by another block, and sometimes by a third. So a block of the same size holds the
    place between the calls. It is never written to: it takes no memory of its own.

    A context manager around a call; the results may still be computed when it ends, but for
    `hold`, which is called when they are there. With size 0, and unless `keep_freed_memory` is on,
    it does nothing.
    """

    def __init__(self, size: int):
        self._size = size + _SLACK if size else 0
        self._address: int | None = None
        self._last: int | None = None
        self._in_use: int | None = None  # bytes of the heap, before the call
        self._patience = _PATIENCE

    def __enter__(self) -> None:
        if self._address is not None and _glibc is not None:
            _glibc.free(self._address)
            self._address = None
        if self._size and _glibc is not None:
            self._in_use = _bytes_in_use()

    def __exit__(self, *_) -> None:
        pass

    def give_up(self) -> None:
        """Returns the place to the system: the next call finds its memory anew."""
        self.__enter__()
        self._last = None
        if self._size:
            return_freed_memory()

    def hold(self) -> None:
        """Takes the place again. If something is in it, that of before goes back to the system.

        Results are there a moment before the temporaries are freed, whose place this is: it waits
        for that. Else the block would lie elsewhere, and the next call take memory there, too.
        """
        if not self._size or _glibc is None or self._address is not None:
            return
        self._wait_until_freed()
        self._address = _glibc.malloc(self._size)
        if self._address != self._last:
            return_freed_memory()
        self._last = self._address

    def _wait_until_freed(self) -> None:
        if self._in_use is None:
            return
        most, end = self._in_use + self._size // 2, time.monotonic() + self._patience
        while (in_use := _bytes_in_use()) is not None and in_use > most:
            if time.monotonic() > end:
                self._patience /= 2  # something else has come to stay: wait less for it
                return
            time.sleep(0.001)
