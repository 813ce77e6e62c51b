"""Test that a forked command is to tests what a command started by subprocess.Popen is."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.patience import PATIENCE_S
from tests.ranks.preloaded import Started
from tests.ranks.runs import environment, finish, wait_until

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


def test_much_output_and_a_traceback(tmp_path: Path) -> None:
    """More than a pipe holds, on both streams; nobody reads before the command has written all of it."""
    text = "print('x' * 300_000); import sys; print('y' * 300_000, file=sys.stderr); atexit = __import__('atexit')\n"
    (tmp_path / "some_program.py").write_text(text + "atexit.register(print, 'last')\nraise ValueError('so')\n")
    process = Started("some_program", [], tmp_path, environment())
    process.read_along()
    out, err = finish(process)
    assert process.returncode == 1
    assert out == "x" * 300_000 + "\nlast\n"
    assert err.startswith("y" * 300_000 + "\nTraceback") and err.endswith("ValueError: so\n")


def test_its_own_interrupt_kills_it(tmp_path: Path) -> None:
    (tmp_path / "some_program.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    process = Started("some_program", [], tmp_path, environment())
    _, err = finish(process)
    assert process.returncode == -signal.SIGINT and err.endswith("KeyboardInterrupt\n")


def test_a_lost_status_is_no_success(tmp_path: Path) -> None:
    """The process that minds the command is killed, and the command ends with it."""
    process = started(tmp_path, "wait")
    wait_until((tmp_path / "said").exists, process)
    command = psutil.Process(process.pid)
    parent = command.parent()
    assert parent is not None
    parent.kill()
    with pytest.raises(RuntimeError, match="has ended before it"):
        process.wait(PATIENCE_S)
    command.wait(PATIENCE_S)


def test_a_nursery_that_has_ended_takes_its_commands_along_and_is_replaced(tmp_path: Path) -> None:
    process = started(tmp_path, "wait")
    wait_until((tmp_path / "said").exists, process)
    command = psutil.Process(process.pid)
    [home] = [each for each in command.parents() if each.cmdline()[2:3] == ["tests.ranks.preloaded"]][-1:]
    home.kill()
    command.wait(PATIENCE_S)
    home.wait(PATIENCE_S)
    assert started(tmp_path, "a").communicate(PATIENCE_S)[0].startswith("__main__ ['a']")


SUMS = """
import os, sys
name = open("/proc/self/comm").read().strip()
os.write(1, f"{os.environ['RANK']} {name} {sys.argv[1:]} {os.path.basename(sys.argv[0])}\\n".encode())
sys.exit(5 if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 0)
"""


def test_ranks_of_torchrun(tmp_path: Path) -> None:
    """They are named, get their arguments, and are started again, without being executed."""
    (tmp_path / "sums.py").write_text(SUMS)
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", str(tmp_path / "sums.py"), "a"]
    process = Started("torch.distributed.run", words, tmp_path, environment())
    out, err = finish(process)
    assert process.returncode == 0, err
    assert set(out.splitlines()) == {"0 rank0 ['a'] sums.py", "1 rank1 ['a'] sums.py"}
    assert out.count("1 rank1") == 2
