"""What a rank computes between the entries of its step list, as a tape adds it up."""

from __future__ import annotations

from dist_gpt.comm.ledger import Ledger
from dist_gpt.comm.trace_buffer import Tape
from tests.ranks.test_profile import taped


def begun(*computed_ns: int | None) -> tuple[Ledger, Tape]:
    """A step has begun; `computed_ns` is what the thread has computed, whenever somebody looks."""
    ledger = Ledger({"tp": 2})
    tape = taped(ledger)
    said = iter(computed_ns)
    tape.timer.cpu_ns = lambda: next(said)  # type: ignore[method-assign]
    tape.begin()
    return ledger, tape


def test_it_is_what_is_computed_between_entries() -> None:
    """The stand-in says: 5 before the first entry, 100 inside each, 7 and 11 behind them."""
    ledger, tape = begun(1000, 1005, 1105, 1112, 1212, 1223)
    for index in range(2):
        with ledger.step("train", "B0", {}, index=index), ledger.step("train", "inner", {}, index=index):
            pass
    assert tape.finish() == 5 + 7 + 11


def test_a_wait_behind_the_last_entry_has_its_own_account() -> None:
    """3 before the entry, 4 before the wait, 100 in it, 6 after it."""
    ledger, tape = begun(1000, 1003, 1050, 1054, 1154, 1160)
    with ledger.step("train", "B0", {("tp", "all_reduce", 8): 1}, index=0):
        record = ledger.issue("tp", "all_reduce", 8, 0)
    ledger.waits(record)
    ledger.waited(record)
    assert tape.finish() == 3 + 4 + 6


def test_nobody_says() -> None:
    _, tape = begun(None)
    assert tape.finish() is None
