"""The C heap of a process on a CPU: it keeps freed memory, and says how much of it is in use.

A step frees all its activations and asks for them again in the next one. glibc gives them back to the system in
between, and every page is then faulted in anew: 50,000 faults and 3 to 6 % of a step were measured at hidden size 512.
"""

from __future__ import annotations

import ctypes

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more


def keep_freed_memory() -> bool:
    """Tell glibc not to shrink the heap, and to take blocks up to 32 MiB from it. False where there is no glibc.

    It is a setting of the whole process; call it once, before training.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD))


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


class Heap:
    """Reads how many bytes the program holds; tensors on a CPU are among them. Only of the main thread's arena and of
    what is mapped apart, which is where training allocates."""

    def __init__(self) -> None:
        self._read = getattr(ctypes.CDLL(None), "mallinfo2", None)
        if self._read is not None:
            self._read.restype = _MallInfo

    def bytes_in_use(self) -> int | None:
        """None where there is no glibc that says so (before 2.33, or another libc)."""
        if self._read is None:
            return None
        info = self._read()
        return int(info.uordblks + info.hblkhd)
