from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHURN = """
import resource, sys
from dist_gpt.heap import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
block = bytearray(20 << 20); del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    block = bytearray(20 << 20); block[::4096] = b"x" * (5 << 10); del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this system has no glibc")
def test_freed_memory_is_not_faulted_in_again() -> None:
    def faults(mode: str) -> int:
        done = subprocess.run([sys.executable, "-c", CHURN, mode], capture_output=True, text=True, check=True)
        return int(done.stdout)

    # 5 x 20 MiB are 25,600 pages of 4 KiB
    assert faults("keep") < 2_000 < faults("leave")


HUGE = """
import re, resource, sys
from pathlib import Path
from dist_gpt.heap import Heap, keep_freed_memory, use_huge_pages
if sys.argv[1] == "limited":
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, resource.RLIM_INFINITY))
assert keep_freed_memory()
before = Heap().bytes_in_use()
reserve = 1 << 60 if sys.argv[1] == "too much" else None
took = use_huge_pages(reserve)
after = Path("/proc/self/status").read_text()
assert int(re.search(r"VmHWM:[^0-9]*([0-9]+) kB", after)[1]) < 200 << 10, "addresses, no memory"
assert Heap().bytes_in_use() - before < 1 << 20, "addresses, no memory"
blocks = [bytearray(20 << 20) for _ in range(4)]
for block in blocks:
    block[::4096] = b"x" * (5 << 10)
huge = re.search(r"AnonHugePages: *([0-9]+) kB", Path("/proc/self/smaps_rollup").read_text())
print(took, int(huge[1]))
"""


def huge_pages(mode: str, **environ: str) -> tuple[bool, int]:
    """Whether they were asked for, and kB that 80 MiB of blocks got."""
    env = {**os.environ, **environ}
    done = subprocess.run([sys.executable, "-c", HUGE, mode], capture_output=True, text=True, check=True, env=env)
    took, kb = done.stdout.split()
    return took == "True", int(kb)


def _given_to_who_asks() -> bool:
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return "[madvise]" in setting and Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "2"
    except OSError:
        return False


@pytest.mark.skipif(not _given_to_who_asks(), reason="this system gives huge pages to all or to nobody")
def test_the_heap_is_in_huge_pages() -> None:
    took, kb = huge_pages("as it is")
    assert took and kb > 70 << 10


@pytest.mark.skipif(not _given_to_who_asks(), reason="this system gives huge pages to all or to nobody")
@pytest.mark.parametrize("mode", ["limited", "too much"])
def test_where_addresses_are_short_the_heap_stays_as_it_is(mode: str) -> None:
    assert huge_pages(mode) == (False, 0)


@pytest.mark.skipif(not _given_to_who_asks(), reason="this system gives huge pages to all or to nobody")
@pytest.mark.parametrize("setting", [{"MALLOC_PERTURB_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=1"}])
def test_where_somebody_else_tunes_the_heap_it_stays_as_it_is(setting: dict[str, str]) -> None:
    """Filling every block that is handed out would make the reserve memory."""
    assert huge_pages("as it is", **setting) == (False, 0)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this system has no glibc")
def test_what_is_free_can_be_given_back() -> None:
    code = """
import re
from pathlib import Path
from dist_gpt.heap import give_back, keep_freed_memory
resident = lambda: int(re.search(r"VmRSS:[^0-9]*([0-9]+) kB", Path("/proc/self/status").read_text())[1])
keep_freed_memory()
blocks = [bytearray(20 << 20) for _ in range(3)]
for block in blocks: block[::4096] = b"x" * (5 << 10)
del block, blocks
held = resident()
give_back()
print(held - resident())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 50 << 10


@pytest.mark.skipif(not _given_to_who_asks(), reason="this system gives huge pages to all or to nobody")
def test_what_was_reserved_is_so_again_afterwards() -> None:
    code = """
import re
from pathlib import Path
from dist_gpt.heap import give_back, keep_freed_memory, use_huge_pages
keep_freed_memory()
assert use_huge_pages()
give_back()
blocks = [bytearray(20 << 20) for _ in range(4)]
for block in blocks: block[::4096] = b"x" * (5 << 10)
print(re.search(r"AnonHugePages: *([0-9]+) kB", Path("/proc/self/smaps_rollup").read_text())[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 70 << 10
