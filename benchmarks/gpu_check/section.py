"""Run one section in this process: `python3 -m benchmarks.gpu_check.section NAME --out DIR`.

Each section has its own process, so one that fails, hangs or breaks the GPU's context does not affect the others. The
results are written to DIR/NAME.json after every figure, so those of a killed section are kept.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu_check.device import Device


@dataclass(frozen=True)
class Section:
    """Section whose `module` of this package has `run(context)`. It is skipped with less than `least_s` s left."""

    name: str
    module: str
    budget_s: float
    least_s: float
    what: str


SECTIONS = (
    Section("environment", "environment", 60, 5, "GPU, driver, versions, MIG, memory"),
    Section("one-process", "one_process", 90, 10, "one process vs. the CPU, in float64 and bf16"),
    Section("ranks", "ranks", 150, 20, "2 to 4 ranks vs. one process, in float64"),
    Section("ceiling", "ceiling", 45, 10, "matmul TFLOP/s and copy bandwidth"),
    Section("speed", "speed", 170, 20, "step time, MFU, memory vs. the plan, host waits"),
    Section("window", "window", 60, 15, "the recorder's window and torch.profiler's top kernels"),
    Section("tests", "tests_part", 60, 10, "tests/gpu"),
    Section("pretended", "pretended_part", 120, 5, "a training step on a pretended device"),
)
BY_NAME = {section.name: section for section in SECTIONS}


@dataclass
class Context:
    """Settings and results of a section. `small`: use sizes for a stand-in on the CPU."""

    name: str
    out: Path
    device_kind: str
    small: bool
    budget_s: float
    figures: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @cached_property
    def device(self) -> Device:
        """Device of the section, opened on first use."""
        from benchmarks.gpu_check.device import Cuda, StandIn

        return Cuda() if self.device_kind == "cuda" else StandIn()

    def left_s(self) -> float:
        """Return the seconds left of the budget."""
        return self.budget_s - (time.monotonic() - self.started)

    def put(self, name: str, value: Any) -> None:
        """Keep a figure, print it, and write all figures so far."""
        self.figures[name] = value
        shown = json.dumps(value, default=str)
        print(f"  {self.name}: {name} = {shown if len(shown) <= 160 else shown[:157] + '...'}", flush=True)
        self.write()

    def check(self, holds: bool, sentence: str) -> None:
        """Record `sentence` as a failed check unless it `holds`."""
        if not holds:
            self.failed.append(sentence)
            print(f"  {self.name}: FAILED: {sentence}", flush=True)
            self.write()

    def attempt(self, name: str, part: Any, *arguments: Any) -> None:
        """Call `part`; record an exception as a failed check, and continue."""
        try:
            part(*arguments)
        except Exception as error:
            traceback.print_exc()
            self.check(False, f"{name}: {type(error).__name__}: {error}"[:600])

    def write(self, **more: Any) -> None:
        """Write figures and failed checks to the folder."""
        path = self.out / f"{self.name}.json"
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps({"figures": self.figures, "failed": self.failed, **more}, default=str))
        aside.replace(path)


def run(context: Context) -> int:
    """Run the section. Return exit code 0 if every check held, 1 if not, 3 on an exception."""
    context.write()
    try:
        importlib.import_module(f"benchmarks.gpu_check.{BY_NAME[context.name].module}").run(context)
    except Exception as error:
        traceback.print_exc()
        context.write(error=f"{type(error).__name__}: {error}"[:2000])
        return 3
    context.write(ended=True)
    return 1 if context.failed else 0


def main(argv: Sequence[str]) -> int:
    """Run the section that the options name."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu_check.section", description=__doc__)
    parser.add_argument("name", choices=sorted(BY_NAME))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--budget-s", type=float, default=60.0)
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    return run(Context(given.name, given.out, given.device, given.small, given.budget_s))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
