"""`python -m benchmarks [NAME ...]`: measure on this machine what the README compares, and check the targets.

Exit codes: 0 every target is met, 1 a target is missed or a worker failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence

from benchmarks.processes import WorkerError
from benchmarks.result import Result, table, write
from benchmarks.settings import FAMILIES, Settings
from dist_gpt.config.errors import ConfigError

NAMES = {
    "start": "start",
    "groups": "groups",
    "bubble": "bubble",
    "epochs": "epochs",
    "one-process": "one_process",
    "layouts": "layouts",
    "ledger": "ledger",
    "report-scale": "report_scale",
    "launcher": "launcher",
    "sharding": "sharding",
    "precision": "precision",
}
"""Name -> module with `run(settings, say)`, the quick ones first."""
BY_NAME_ONLY = {"sharding"}
"""Benchmarks that run only if named: they take an hour."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    default = Settings()
    p = argparse.ArgumentParser(prog="python -m benchmarks", description="Run the benchmarks that the README cites.")
    p.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"any of {', '.join(NAMES)}; default: all but {', '.join(sorted(BY_NAME_ONLY))}",
    )
    p.add_argument("--pairs", type=_positive, help="alternating pairs, or runs (default: the benchmark's own)")
    p.add_argument("--warm-up", type=_positive, default=default.warm_up, help="steps of each side before the pairs")
    p.add_argument("--threads", type=_positive, help="threads of each dist_gpt process (default 1)")
    p.add_argument("--family", choices=sorted(FAMILIES), default=default.family, help="model family")
    for name in ("hidden", "layers", "heads", "seq", "vocab", "micro-batch"):
        value = getattr(default, name.replace("-", "_"))
        p.add_argument(f"--{name}", type=_positive, default=value, help=f"(default {value})")
    p.add_argument("--micro-batches", type=_positive, help="per step, over all data ranks (one-process 2, layouts 8)")
    p.add_argument(
        "--only", action="append", default=[], metavar="AXIS", help="layouts, sharding: run only this case; repeatable"
    )
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any configuration key; repeatable")
    p.add_argument("--stamp", default=None, help="date in the results (default now)")
    p.add_argument("--json", action="store_true", help="one JSON document on stdout instead of tables")
    return p


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; expected a number of at least 1")
    return value


def settings_of(given: argparse.Namespace) -> Settings:
    """Return the options in the form that benchmarks take."""
    return Settings(
        pairs=given.pairs, threads=given.threads, family=given.family, hidden=given.hidden, layers=given.layers,
        heads=given.heads, seq=given.seq, vocab=given.vocab, micro_batch=given.micro_batch,
        micro_batches=given.micro_batches, warm_up=given.warm_up, overrides=tuple(given.set), only=tuple(given.only),
    )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the named benchmarks and return the exit code. A missed target does not stop the next benchmark."""
    given = parser().parse_args(argv)
    if unknown := [name for name in given.names if name not in NAMES]:
        _say(f"unknown benchmark: {', '.join(unknown)}; choose from {', '.join(NAMES)}")
        return 2
    stamp = given.stamp or time.strftime("%Y-%m-%dT%H:%M:%S%z")
    results: list[Result] = []
    for name in given.names or [name for name in NAMES if name not in BY_NAME_ONLY]:
        module = importlib.import_module(f"benchmarks.{NAMES[name]}")
        try:
            result: Result = module.run(settings_of(given), lambda text, name=name: _say(f"{name}: {text}"))
        except ConfigError as error:
            _say("\n".join(error.problems))
            return 2
        except WorkerError as error:
            _say(f"{name}: {error}")
            return 1
        results.append(result)
        write([result], stamp)
        if not given.json:
            print(table(result), flush=True)
    if given.json:
        print(json.dumps({"met": all(r.met for r in results), "benchmarks": [r.document(stamp) for r in results]}))
    return 0 if all(result.met for result in results) else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
