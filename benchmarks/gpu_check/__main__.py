"""`python3 -m benchmarks.gpu_check`: check dist_gpt on one GPU, in one run of at most ten minutes.

It needs Python and torch but neither a network nor an installation, and names other packages that are missing. Every
section runs in its own process with a time limit. Exit codes: 0 all sections ran and passed (without a GPU: those that
need none), 1 a check failed or a section did not run, 2 bad options.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import packages, results
from benchmarks.gpu_check.results import ERROR, FAILED, PASSED, SKIPPED, TIMEOUT, Outcome
from benchmarks.gpu_check.section import BY_NAME, SECTIONS, Section

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 570.0
LONGEST_S = 3600.0
GPU_QUESTION = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
WITHOUT_GPU = ("environment", "pretended")
NEEDS_TORCH_ALONE = ("environment", "ceiling")


@dataclass(frozen=True)
class Plan:
    """Sections to run and their device: cuda, or cpu for a stand-in (with `small` sizes)."""

    sections: list[Section]
    device: str
    small: bool
    out: Path
    budget_s: float
    environment: dict[str, str]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    names = ", ".join(section.name for section in SECTIONS)
    p = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_check", description="Check dist_gpt on one GPU, within ten minutes."
    )
    p.add_argument("--out", type=Path, help="folder for the results (default benchmarks/results/gpu-check-DATE)")
    only = f"run only this section, one of {names}; repeatable"
    p.add_argument("--only", action="append", default=[], metavar="SECTION", help=only)
    budget = f"seconds for all sections together (default {BUDGET_S:.0f})"
    p.add_argument("--budget-s", type=float, default=BUDGET_S, help=budget)
    p.add_argument("--wheels", metavar="FOLDER", help="folder with wheels of missing packages (default vendor/)")
    p.add_argument("--json", action="store_true", help="print results.json on stdout and progress on stderr")
    p.add_argument("--stand-in", action="store_true", help="use tiny sizes on the CPU, to test this check itself")
    return p


def bad_options(given: argparse.Namespace) -> list[str]:
    """Return a sentence for each invalid option."""
    wrong = []
    if unknown := [name for name in given.only if name not in BY_NAME]:
        wrong.append(f"--only {', '.join(unknown)}: there is no such section; choose from {', '.join(BY_NAME)}")
    if not 0 < given.budget_s <= LONGEST_S:
        wrong.append(f"--budget-s {given.budget_s:g}: give a number of seconds above 0 and up to {LONGEST_S:.0f}")
    if given.out is not None and given.out.exists() and not given.out.is_dir():
        wrong.append(f"--out {given.out}: this is a file; give a folder, which need not exist")
    return wrong


def main(argv: Sequence[str]) -> int:
    """Run the sections, write their results and return the exit code."""
    given = parser().parse_args(argv)
    wrong = bad_options(given)
    try:
        wheels = packages.wheel_folder(given.wheels)
    except ValueError as error:
        wrong.append(str(error))
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 2
    started, log = time.monotonic(), sys.stderr if given.json else sys.stdout
    out = (given.out or default_folder()).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out {out}: the folder cannot be made: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="dist-gpt-wheels-") as unpacked:
        environment = with_wheels(wheels, Path(unpacked), log)
        for line in packages.advice(packages.missing(), constraints()):
            print(line, file=log)
        has_gpu, torch_words = ask_for_gpu(environment)
        head = head_of(torch_words, given.stand_in)
        if not has_gpu and not given.stand_in:
            print(f"No GPU: {torch_words}. Checks that need one are skipped; a pretended device is checked.", file=log)
        sections = chosen(given.only, has_gpu or given.stand_in)
        device = "cuda" if has_gpu and not given.stand_in else "cpu"
        plan = Plan(sections, device, given.stand_in, out, given.budget_s, environment)
        outcomes = run_all(plan, head, started, log)
    print((out / "results.md").read_text(), file=log)
    print(f"Results: {out}", file=log)
    if given.json:
        print((out / "results.json").read_text())
    return exit_code(outcomes, has_gpu)


def exit_code(outcomes: Sequence[Outcome], has_gpu: bool) -> int:
    """Return 0 if everything passed, else 1; without a GPU, skipped sections do not count."""
    accepted = (PASSED,) if has_gpu else (PASSED, SKIPPED)
    return 0 if all(outcome.status in accepted for outcome in outcomes) else 1


def default_folder() -> Path:
    """Return a new folder's name, by date and time."""
    return ROOT / "benchmarks" / "results" / time.strftime("gpu-check-%Y%m%d-%H%M%S")


def constraints() -> str:
    """Return the text of constraints.txt; empty if the file is not there."""
    try:
        return (ROOT / "constraints.txt").read_text()
    except OSError:
        return ""


def with_wheels(folder: Path | None, unpacked: Path, log: Any) -> dict[str, str]:
    """Unpack the wheels and return the environment for the sections; this process can import the packages as well.

    Packages of the folder take precedence over installed ones, since they were chosen to fit each other.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    brought: list[str] = []
    if folder is not None:
        for line in packages.unpack(folder, unpacked):
            print(line, file=log)
        brought = [str(unpacked), str(folder)]
        sys.path[:0] = brought
        importlib.invalidate_caches()
    paths = [str(ROOT), *brought, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def ask_for_gpu(environment: dict[str, str]) -> tuple[bool, str]:
    """Return whether torch sees a GPU, and its versions in words. Use another process, since CUDA stays open."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", GPU_QUESTION], env=environment, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False, "torch did not answer within 120 s"
    if done.returncode:
        return False, f"torch cannot be imported: {done.stderr.strip().rpartition(chr(10))[2]}"
    version, cuda, available = done.stdout.split()[-3:]
    return available == "True", f"torch {version}, CUDA {cuda}" + ("" if available == "True" else ", finds no GPU")


def head_of(torch_words: str, stand_in: bool) -> dict[str, Any]:
    """Return the head of the results."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": results.commit_of(ROOT),
        "python": platform.python_version(),
        "torch": torch_words,
        "machine": platform.platform(terse=True),
        "stand_in": stand_in,
        "command": "python3 -m benchmarks.gpu_check " + " ".join(sys.argv[1:]),
    }


def chosen(only: Sequence[str], has_gpu: bool) -> list[Section]:
    """Return the sections to run, in order; by default those for this machine (`pretended` only without a GPU)."""
    if only:
        return [section for section in SECTIONS if section.name in only]
    if has_gpu:
        return [section for section in SECTIONS if section.name != "pretended"]
    return [section for section in SECTIONS if section.name in WITHOUT_GPU]


def run_all(plan: Plan, head: dict[str, Any], started: float, log: Any) -> list[Outcome]:
    """Run the sections in turn; write the results so far after each."""
    outcomes: list[Outcome] = []
    lacking = [p.name for p in packages.missing() if p.check]
    for section in plan.sections:
        left = plan.budget_s - (time.monotonic() - started)
        why = skipped(section, plan, lacking, left)
        if why:
            outcomes.append(Outcome(section.name, SKIPPED, error=why))
        else:
            print(f"{section.name}: {section.what}", file=log, flush=True)
            outcomes.append(run_section(section, plan, min(section.budget_s, left), log))
        last = outcomes[-1]
        print(f"{section.name}: {last.status} after {last.seconds:.1f} s{': ' * bool(why)}{why}", file=log, flush=True)
        results.write(plan.out, head, outcomes)
    return outcomes


def skipped(section: Section, plan: Plan, lacking: list[str], left_s: float) -> str:
    """Return why a section is skipped, or an empty string."""
    if plan.device == "cpu" and not plan.small and section.name not in WITHOUT_GPU:
        return "there is no GPU"
    needs = lacking if section.name not in NEEDS_TORCH_ALONE else [name for name in lacking if name == "torch"]
    if needs:
        return f"missing packages: {', '.join(needs)}"
    return f"{max(0.0, left_s):.0f} s left, but it needs {section.least_s:.0f} s" if left_s < section.least_s else ""


def run_section(section: Section, plan: Plan, budget_s: float, log: Any) -> Outcome:
    """Run one section in its own process group, which is killed when its time is up."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.section", section.name, "--out", str(plan.out)]
    command += ["--device", plan.device, "--budget-s", str(budget_s), *(["--small"] if plan.small else [])]
    (plan.out / f"{section.name}.json").unlink(missing_ok=True)
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=plan.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    try:
        code: int | None = process.wait(budget_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end_group(process)
    return outcome_of(section.name, code, time.monotonic() - began, plan.out, budget_s)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a section's process and any ranks that it left running."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcome_of(name: str, code: int | None, seconds: float, out: Path, budget_s: float) -> Outcome:
    """Return the outcome of a section from its exit code (None: time limit reached) and the results that it wrote."""
    try:
        found = json.loads((out / f"{name}.json").read_text())
    except (OSError, ValueError):
        found = {"figures": {}, "failed": []}
    status = {0: PASSED, 1: FAILED, None: TIMEOUT}.get(code, ERROR)
    if status in (PASSED, FAILED) and not found.get("ended"):  # for example Python's own exit code 1
        status = ERROR
    error = found.get("error", "")
    if status == TIMEOUT:
        error = f"stopped at its time limit of {budget_s:.0f} s"
    elif status == ERROR and not error:
        error = f"its process ended with exit code {code}"
    return Outcome(name, status, round(seconds, 2), found["figures"], found["failed"], error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
