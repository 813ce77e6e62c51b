"""The wish to stop, from signals and from elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_gpt.train.preemption import SIGNALS, Stop
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_reason_counts() -> None:
    stop = Stop()
    assert stop.requested is None
    stop.request("told")
    stop.request("told again")
    assert stop.requested == "told"


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_ask_and_do_nothing_else(number: signal.Signals) -> None:
    stop = Stop()
    with stop.listen():
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert stop.requested == f"{number.name} received"
    os.kill(os.getpid(), number)  # while it leaves


def test_handlers_come_back_when_nobody_asked() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stop().listen():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_in_another_thread_it_listens_to_nothing() -> None:
    found = []

    def body() -> None:
        with Stop().listen() as stop:
            stop.request("a thread may ask")
            found.append(stop.requested)

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == ["a thread may ask"] and [signal.getsignal(number) for number in SIGNALS] == before


def test_a_second_signal_does_not_change_the_code_of_a_process_that_leaves() -> None:
    """Also when it comes while the interpreter shuts down."""
    code = (
        "import atexit, os, signal, sys; from dist_gpt.train.preemption import Stop\n"
        "class Late:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGTERM)\n"
        "with Stop().listen(): os.kill(os.getpid(), signal.SIGTERM)\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGUSR1); late = Late(); sys.exit(75)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=PATIENCE_S, check=False).returncode == 75
