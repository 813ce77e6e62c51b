"""Test the count of skipped steps, in a run and from metrics.jsonl."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dist_gpt.skips import CHANGE, CHANGE_SCALE, GRADIENTS, LOSS, SCALE, Skipped, Skips, cause_of

GOOD = (5.0, 1.0, None)
NAN = (math.nan, math.nan, None)
INF = (5.0, math.inf, None)
OVERFLOW = (5.0, math.inf, 512.0)


@pytest.mark.parametrize(("numbers", "cause"), [
    (GOOD, ""), (NAN, LOSS), (INF, GRADIENTS), (OVERFLOW, SCALE), ((5.0, math.nan, 2.0), SCALE),
    ((math.inf, 1.0, 512.0), LOSS), ((5.0, math.inf, 1.0), GRADIENTS), ((-math.inf, 1.0, None), LOSS),
    ((None, None, None), LOSS), ((5.0, None, 4.0), SCALE), ((5.0, None, None), GRADIENTS), ((5.0, 1.0, 512.0), ""),
])  # fmt: skip
def test_cause(numbers: tuple[float | None, float | None, float | None], cause: str) -> None:
    assert cause_of(*numbers) == cause


def rows_of(steps: list[tuple[float, float, float | None]]) -> list[dict[str, Any]]:
    """Return lines of metrics.jsonl as train and track write them."""
    rows: list[dict[str, Any]] = [{"step": 0, "val_loss": 5.5}]
    for step, (loss, norm, scale) in enumerate(steps, 1):
        row: dict[str, Any] = {"step": step, "loss": loss, "grad_norm": norm}
        row |= {} if math.isfinite(loss) and math.isfinite(norm) else {"skipped": True}
        row |= {} if scale is None else {"loss_scale": scale}
        rows.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
    return rows


@pytest.mark.parametrize(("steps", "failed", "text"), [
    ([GOOD] * 3, False, ""),
    ([GOOD, *[NAN] * 5], True, "5 of 6 steps skipped (loss not finite)"),
    ([NAN] * 2, True, "2 of 2 steps skipped (loss not finite)"),
    ([NAN, GOOD], False, "1 of 2 steps skipped (loss not finite)"),
    ([GOOD, INF], True, "1 of 2 steps skipped (gradients not finite)"),
    ([OVERFLOW, OVERFLOW, GOOD], False,
     "2 of 3 steps skipped (fp16 overflow while the loss scale comes down)"),
    ([GOOD, OVERFLOW], False, "1 of 2 steps skipped (fp16 overflow while the loss scale comes down)"),
    ([OVERFLOW] * 2, True, "2 of 2 steps skipped (fp16 overflow while the loss scale comes down)"),
    ([GOOD, OVERFLOW, NAN], True,
     "2 of 3 steps skipped (fp16 overflow while the loss scale comes down: 1, loss not finite: 1)"),
    ([INF, NAN, NAN, GOOD], False, "3 of 4 steps skipped (gradients not finite: 1, loss not finite: 2)"),
    ([], False, ""),
])  # fmt: skip
def test_a_run_and_its_metrics_say_the_same(
    steps: list[tuple[float, float, float | None]], failed: bool, text: str
) -> None:
    skips = Skips()
    for step, numbers in enumerate(steps, 1):
        skips.count(step, *numbers)
    for found in (skips.so_far, Skipped.of(rows_of(steps))):
        assert (found.failed, found.text()) == (failed, text)
    error = skips.failure()
    assert (error is not None) == failed
    if error is not None:
        assert str(error) == f"{text}. {error.change}"
        assert error.change == (CHANGE_SCALE if steps[-1] == OVERFLOW else CHANGE)


def test_a_validation_loss_that_is_not_finite() -> None:
    """A validation loss that is not finite shows useless weights; a good step after it clears them."""
    skips = Skips()
    skips.validated(0, math.nan)
    skips.count(1, *GOOD)
    assert skips.sound and skips.failure() is None
    skips.validated(1, math.nan)
    assert not skips.sound and "the validation loss after step 1 is not finite" in str(skips.failure())
    rows = rows_of([GOOD])
    rows[-1]["val_loss"] = None
    assert Skipped.of(rows).failed and Skipped.of(rows).text() == "the validation loss after step 1 is not finite"
    skips.count(2, *GOOD)
    assert skips.sound and skips.failure() is None and not Skipped.of([*rows, rows_of([GOOD, GOOD])[-1]]).failed


@pytest.mark.parametrize(("numbers", "sound"), [(GOOD, True), (OVERFLOW, True), (NAN, False), (INF, False)])
def test_what_is_worth_a_checkpoint(numbers: tuple[float, float, float | None], sound: bool) -> None:
    skips = Skips()
    skips.count(1, *numbers)
    assert skips.sound == sound


def test_a_resumed_run_counts_on() -> None:
    before = Skips()
    for step, numbers in enumerate([NAN, GOOD, INF, OVERFLOW, OVERFLOW], 1):
        before.count(step, *numbers)
    assert before.state() == {"skipped": 3, "skipped_loss": 1, "skipped_gradients": 1, "skipped_scale": 2}
    after = Skips()
    after.resume(5, before.state())
    assert (after.in_a_row, after.so_far.count) == (3, 4)
    after.count(6, *NAN)
    assert after.in_a_row == 4 and after.so_far.text().startswith("5 of 6 steps skipped (fp16 overflow")
    old = Skips()
    old.resume(7, {"skipped": 2})  # of a version that kept no causes
    old.count(8, *GOOD)
    assert old.state() == {"skipped": 0} and old.failure() is None
