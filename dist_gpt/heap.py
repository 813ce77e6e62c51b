"""The C heap of a process on a CPU: it keeps freed memory, in huge pages, and says how much of it is in use.

A step frees all its activations and asks for them again in the next one. glibc gives them back to the system in
between, and every page is then faulted in anew: 50,000 faults and 3 to 6 % of a step were measured at hidden size 512.
And a page of 2 MiB is found 512 times as rarely as one of 4 kB: reading another rank's memory is 3 to 4 times as fast.
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
"""Bytes of this process's heap that were asked for in huge pages, the last ones at the end."""


def prepare_heap() -> None:
    """Before training on a CPU, once: it is a setting of the whole process."""
    if keep_freed_memory():
        use_huge_pages()


def keep_freed_memory() -> bool:
    """Tell glibc not to shrink the heap, and to take blocks up to 32 MiB from it. False where there is no glibc."""
    libc = _glibc()
    return libc is not None and bool(
        libc.mallopt(M_TRIM_THRESHOLD, -1) and libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    )


def use_huge_pages(reserve: int | None = None) -> bool:
    """Have the next `reserve` bytes of a heap that keeps what is freed (default: half of the machine's memory) in huge
    pages, where the system has them for who asks. It takes addresses, no memory; but larger blocks are then taken from
    the heap and kept, too, which costs what lies between them.

    False, and nothing changes, where addresses are counted (a limit as of ulimit -v or -d, a system that promises no
    more than it has), or where the environment tunes glibc's heap, which may fill each block that it hands out.
    """
    libc = _glibc()
    if libc is None or _addresses_count() or _tuned(os.environ):
        return False
    size = reserve or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.mallopt(M_MMAP_MAX, 0)  # one block at the end of the heap; freed, it is where the next ones come from
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
    """Return what is free in the heap to the system, for once; what was reserved for huge pages is so again."""
    libc = _glibc()
    if libc is None:
        return
    libc.malloc_trim(0)
    if _reserves:
        use_huge_pages(_reserves[-1])


def _glibc() -> ctypes.CDLL | None:
    """glibc itself, also where another allocator was loaded in front of it."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
        libc.free.argtypes, libc.malloc_trim.argtypes = [ctypes.c_void_p], [ctypes.c_size_t]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        return libc if hasattr(libc, "mallopt") else None
    except (OSError, AttributeError):
        return None


def _addresses_count() -> bool:
    """Whether addresses without memory behind them are counted."""
    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    if any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits):
        return True
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == NEVER_OVERCOMMIT
    except OSError:
        return True


def _tuned(environ: Mapping[str, str]) -> bool:
    """Whether somebody sets what mallopt sets (MALLOC_PERTURB_ and the like, glibc.malloc.perturb)."""
    return "glibc.malloc" in environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") and name.endswith("_") for name in environ
    )


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
