"""Run the tests in tests/gpu, with pytest if it is installed, else by calling the test functions."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from benchmarks.gpu_check.section import Context

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "gpu"
PYTEST = ("-c", "/dev/null", "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q", "-ra")
"""Options that bypass the project's settings, which name plugins that a bare pytest lacks."""


def run(context: Context) -> None:
    """Run the tests. On a stand-in they are only collected."""
    if importlib.util.find_spec("pytest") is not None and not context.small:
        with_pytest(context, FOLDER)
    else:
        by_hand(context, modules(FOLDER), call=context.device_kind == "cuda")


def with_pytest(context: Context, folder: Path) -> None:
    """Report pytest's exit code and the end of its output. Exit code 5 (no tests) is a failure as well."""
    command = [sys.executable, "-m", "pytest", *PYTEST, str(folder)]
    left = max(5.0, context.left_s() - 2)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left, check=False)
    context.put("pytest", {"exit_code": done.returncode, "output": done.stdout.strip().splitlines()[-15:]})
    context.check(done.returncode == 0, f"pytest ended with exit code {done.returncode}")


def modules(folder: Path) -> Iterator[ModuleType]:
    """Yield the test modules of `folder`, a package below the repository's root."""
    package = ".".join(folder.relative_to(ROOT).parts)
    for path in sorted(folder.glob("test_*.py")):
        yield importlib.import_module(f"{package}.{path.stem}")


def by_hand(context: Context, found: Iterator[ModuleType], call: bool) -> None:
    """Call every function test_* of the modules and report the outcomes; only list them unless `call`."""
    results: dict[str, str] = {}
    for module in found:
        for name, function in sorted(vars(module).items()):
            if name.startswith("test_") and callable(function):
                results[f"{module.__name__}.{name}"] = outcome(function) if call else "collected"
    context.put("tests", results)
    for name, result in results.items():
        context.check(result in ("passed", "collected"), f"{name}: {result}")
    context.check(bool(results), "no tests were found in tests/gpu")


def outcome(function: Callable[[], object]) -> str:
    """Return "passed", or the exception on one line."""
    started = time.monotonic()
    try:
        function()
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__} after {time.monotonic() - started:.1f} s: {error}"[:400]
    return "passed"
