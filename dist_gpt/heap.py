"""Tune the C heap for training on a CPU: keep freed memory, use huge pages, and report the bytes in use.

Each step frees all its activations and the next one allocates them again. By default glibc returns them to the system
in between, and every page is faulted in anew: 50,000 faults and 3 to 6 % of a step were measured at hidden size 512.
A page of 2 MiB is looked up 512 times less often than one of 4 kB: reading another rank's memory is 3 to 4 times as
fast.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Mapping
from pathlib import Path

# glibc's malloc.h and Linux's mman.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more
DEFAULT_MMAP_MAX = 65_536
MADV_HUGEPAGE = 14
HUGE = 2 << 20
NEVER_OVERCOMMIT = "2"
_reserves: list[int] = []
"""Bytes of this process's heap that were requested in huge pages, the latest request last."""


def prepare_heap() -> None:
    """Prepare the heap for training on a CPU. Call this once, before training: it changes the whole process."""
    if keep_freed_memory():
        use_huge_pages()


def keep_freed_memory() -> bool:
    """Tell glibc never to shrink the heap and to take blocks up to 32 MiB from it. Return False without glibc."""
    libc = _glibc()
    return libc is not None and bool(
        libc.mallopt(M_TRIM_THRESHOLD, -1) and libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    )


def use_huge_pages(reserve: int | None = None) -> bool:
    """Request huge pages for the next `reserve` bytes of the heap (default: half of the machine's memory).

    The heap must keep freed memory, and the system must offer huge pages on request (madvise). The reserve takes
    addresses, not memory. Blocks above 32 MiB then come from the heap and stay in it too, at the cost of gaps.

    Return False and change nothing if addresses are counted (a limit such as ulimit -v or -d, or a system without
    overcommit), or if the environment tunes glibc's heap, which may fill each block that it hands out.
    """
    libc = _glibc()
    if libc is None or _addresses_count() or _tuned(os.environ):
        return False
    size = reserve or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.mallopt(M_MMAP_MAX, 0)  # one block at the heap's end; once freed, it serves the next ones
    block = libc.malloc(size)
    libc.mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
    if block is None:
        return False
    first, end = -(-block // HUGE) * HUGE, (block + size) // HUGE * HUGE
    advised = end > first and libc.madvise(first, end - first, MADV_HUGEPAGE) == 0
    libc.free(block)
    if advised:
        _reserves.append(size)
    return advised


def give_back() -> None:
    """Return the free memory of the heap to the system once, and renew the reserve of huge pages if there was one."""
    libc = _glibc()
    if libc is None:
        return
    libc.malloc_trim(0)
    if _reserves:
        use_huge_pages(_reserves[-1])


def _glibc() -> ctypes.CDLL | None:
    """Return glibc itself, even if another allocator is preloaded; None if the process has no glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
        libc.free.argtypes, libc.malloc_trim.argtypes = [ctypes.c_void_p], [ctypes.c_size_t]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        return libc if hasattr(libc, "mallopt") else None
    except (OSError, AttributeError):
        return None


def _addresses_count() -> bool:
    """Return whether the system limits addresses that have no memory behind them, or cannot tell."""
    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    if any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits):
        return True
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == NEVER_OVERCOMMIT
    except OSError:
        return True


def _tuned(environ: Mapping[str, str]) -> bool:
    """Return whether the environment tunes glibc's malloc (MALLOC_PERTURB_ and the like, glibc.malloc.perturb)."""
    return "glibc.malloc" in environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") and name.endswith("_") for name in environ
    )


class _MallInfo(ctypes.Structure):
    """Layout of glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


class Heap:
    """Reader of the bytes that the program holds, tensors on a CPU among them.

    Only the main thread's arena and separately mapped blocks are counted: this is where training allocates.
    """

    def __init__(self) -> None:
        self._read = getattr(ctypes.CDLL(None), "mallinfo2", None)
        if self._read is not None:
            self._read.restype = _MallInfo

    def bytes_in_use(self) -> int | None:
        """Return the bytes in use; None without glibc 2.33 or later."""
        if self._read is None:
            return None
        info = self._read()
        return int(info.uordblks + info.hblkhd)
