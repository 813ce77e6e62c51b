"""Test that a forked command is to tests what a command started by subprocess.Popen is."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.patience import PATIENCE_S
from tests.ranks.preloaded import Started
from tests.ranks.runs import environment, wait_until

PROGRAM = """
import os, sys, time
print(__name__, sys.argv[1:], os.getcwd(), os.environ["TOLD"], flush=True)
print("aside", file=sys.stderr, flush=True)
open("said", "w").close()
while "wait" in sys.argv:
    time.sleep(0.1)
sys.exit(3)
"""


def started(folder: Path, *arguments: str) -> Started:
    (folder / "some_program.py").write_text(PROGRAM)
    return Started("some_program", arguments, folder, {**environment(), "TOLD": "so"})


def test_what_it_gets_and_what_it_leaves(tmp_path: Path) -> None:
    process = started(tmp_path, "a", "b")
    assert process.communicate(PATIENCE_S) == (f"__main__ ['a', 'b'] {tmp_path} so\n", "aside\n")
    assert process.returncode == process.wait() == process.poll() == 3
    process.kill()  # it has ended: no other process gets the signal


def test_a_killed_command_loses_nothing_that_it_has_said(tmp_path: Path) -> None:
    process = started(tmp_path, "wait")
    wait_until((tmp_path / "said").exists, process)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(0.01)
    assert process.poll() is None
    process.kill()
    assert process.communicate(PATIENCE_S) == (f"__main__ ['wait'] {tmp_path} so\n", "aside\n")
    assert process.returncode == -signal.SIGKILL
