"""One rank's output to its log and to the terminal."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from launch.monitor.tee import Tee, plain


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"text", b"text"),
        (b"\x1b[31mred\x1b[0m", b"red"),
        (b"bar 1\r\x1b[2Kbar 2\r\x1b[2Kstep 2", b"step 2"),
        (b"windows\r", b"windows"),
    ],
)
def test_logs_hold_no_control_codes(line: bytes, expected: bytes) -> None:
    assert plain(line) == expected


def test_a_full_disk_does_not_stop_the_copying() -> None:
    """Rank 0 would otherwise fail for a closed pipe, and nobody would hear of the disk."""
    read, write = os.pipe()
    shown = io.StringIO()
    tee = Tee(os.fdopen(read, "rb", buffering=0), Path("/dev/full"), shown)
    for n in range(3):
        os.write(write, f"step {n}\n".encode())
    os.close(write)
    tee.close()
    assert shown.getvalue().count("cannot write /dev/full: No space left on device") == 1
    assert not tee.thread.is_alive() and all(f"step {n}\n" in shown.getvalue() for n in range(3))
