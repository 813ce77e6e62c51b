"""Count steps that changed no weight because the loss or the gradients were not finite. Standard library only.

`Skips` counts them while a run trains and decides whether it has failed; `Skipped.of(rows)` finds the same in the lines
of metrics.jsonl. Loss, gradient norm and loss scale are equal on all ranks, so all ranks decide alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

LOSS, GRADIENTS, SCALE = "loss not finite", "gradients not finite", "fp16 overflow while the loss scale comes down"
KEYS = {"skipped_loss": LOSS, "skipped_gradients": GRADIENTS, "skipped_scale": SCALE}
"""Keys of a checkpoint's trainer state -> the causes that they count."""
CHANGE = "Lower optim.lr, lengthen optim.warmup or lower optim.clip"
CHANGE_SCALE = "Raise train.steps or train.max_skipped, or lower train.loss_scale"


class DivergedError(RuntimeError):
    """Error of a run that cannot train as configured; `change` says what to change before a restart."""

    def __init__(self, text: str, change: str) -> None:
        super().__init__(text)
        self.change = change


def cause_of(loss: float | None, norm: float | None, scale: float | None) -> str:
    """Return why a step with these numbers is skipped; empty if it is not.

    `scale` is the loss scale after the step; at the smallest scale, 1, the gradients themselves overflow.
    """
    if loss is None or not math.isfinite(loss):
        return LOSS
    if norm is None or not math.isfinite(norm):
        return SCALE if scale is not None and scale > 1 else GRADIENTS
    return ""


@dataclass(frozen=True)
class Skipped:
    """Number of steps of a run, and of skipped ones by cause."""

    steps: int
    causes: Mapping[str, int]
    last: str = ""
    """Why the last step was skipped; empty if it was not."""
    validation: int | None = None
    """The last step, if the validation loss after it was not finite."""

    @staticmethod
    def of(rows: Iterable[Mapping[str, Any]]) -> Skipped:
        """Count the lines of metrics.jsonl, in which numbers that are not finite are null."""
        steps, causes, last, validation = 0, Counter[str](), "", None
        for row in rows:
            if "loss" not in row:
                continue  # a validation before the first step
            steps += 1
            norm = row.get("grad_norm") if row.get("skipped") else 0.0
            last = cause_of(row["loss"], norm, row.get("loss_scale"))
            causes.update([last] if last else [])
            validation = row.get("step") if row.get("val_loss", 0.0) is None else None
        return Skipped(steps, causes, last, validation)

    @property
    def count(self) -> int:
        """Number of skipped steps."""
        return sum(self.causes.values())

    @property
    def failed(self) -> bool:
        """True if the run trained nothing, or ended while a loss or its gradients were not finite."""
        diverged = self.last in (LOSS, GRADIENTS) or self.validation is not None
        return self.steps > 0 and (self.count == self.steps or diverged)

    @property
    def change(self) -> str:
        """Advice on what to change if the run failed."""
        return CHANGE_SCALE if self.last == SCALE else CHANGE

    def text(self) -> str:
        """Return text such as `5 of 6 steps skipped (loss not finite)`; empty if there is nothing to report."""
        parts = []
        if self.count:
            one = len(self.causes) == 1
            why = ", ".join(cause if one else f"{cause}: {count}" for cause, count in sorted(self.causes.items()))
            parts.append(f"{self.count} of {self.steps} steps skipped ({why})")
        if self.validation is not None:
            parts.append(f"the validation loss after step {self.validation} is not finite")
        return "; ".join(parts)


@dataclass
class Skips:
    """Count of skipped steps while a run trains, including those of earlier attempts (`state`, in the checkpoint)."""

    causes: Counter[str] = field(default_factory=Counter)
    step: int = 0
    in_a_row: int = 0
    cause: str = ""
    """Why the last step was skipped; empty if it was not."""
    validation: int | None = None
    """The step after which the validation loss was not finite, with no good step since."""

    def resume(self, step: int, trainer: Mapping[str, int]) -> None:
        """Continue after `step` with the counts in its checkpoint."""
        self.step, self.in_a_row = step, trainer.get("skipped", 0)
        self.causes = Counter({cause: trainer[key] for key, cause in KEYS.items() if trainer.get(key)})

    def state(self) -> dict[str, int]:
        """Return the counts for a checkpoint: the steps skipped in a row, and those skipped by cause."""
        by_cause = {key: self.causes[cause] for key, cause in KEYS.items() if self.causes[cause]}
        return {"skipped": self.in_a_row, **by_cause}

    def count(self, step: int, loss: float, norm: float, scale: float | None) -> bool:
        """Count a step. Return whether it was skipped."""
        self.step, self.cause, self.validation = step, cause_of(loss, norm, scale), None
        self.in_a_row = self.in_a_row + 1 if self.cause else 0
        self.causes.update([self.cause] if self.cause else [])
        return bool(self.cause)

    def validated(self, step: int, loss: float) -> None:
        """Record the validation loss after `step`."""
        self.validation = None if math.isfinite(loss) else step

    @property
    def sound(self) -> bool:
        """True if the weights are worth a checkpoint. An fp16 overflow is ordinary and leaves them good."""
        return self.cause in ("", SCALE) and self.validation is None

    @property
    def so_far(self) -> Skipped:
        """Counts up to the current step, earlier attempts included."""
        return Skipped(self.step, self.causes, self.cause, self.validation)

    def failure(self) -> DivergedError | None:
        """Return the error of a run that fails if it ends now; None if it succeeds."""
        found = self.so_far
        return DivergedError(f"{found.text()}. {found.change}", found.change) if found.failed else None
