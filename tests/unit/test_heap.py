from __future__ import annotations

import ctypes
import subprocess
import sys

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
