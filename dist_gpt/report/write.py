"""Write the report of a run directory into it (`dist-gpt report`).

report.html   everything, one file, no network        report.json   the document behind it
report.md     the same for a terminal or an email     figures/*.svg
trace.json.gz   for Perfetto and chrome://tracing
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_gpt.config.errors import ConfigError
from dist_gpt.report.analysis.analyze import Profile, analyze, profile
from dist_gpt.report.read.load import Run, load

Say = Callable[[str], None]


def report(run_dir: str | Path, other: str | Path | None = None, say: Say = lambda text: None) -> dict[str, Any]:
    """Write the report of `run_dir`, compared with the run at `other` if given; return the document.

    Raises ConfigError (bad input) if nothing of a run can be shown or its directory cannot be written.
    """
    from dist_gpt.report.analysis.compare import compare

    run = load(run_dir)
    say(f"{run.folder}: {len(run.ranks)} of {run.layout.world} ranks read")
    found = profile(run)
    document = analyze(run, found)
    if other is not None:
        document["compare"] = compare(document, analyze(load(other)))
    write_files(run, found, document)
    return document


def write_files(run: Run, found: Profile, document: dict[str, Any]) -> None:
    """Write all files of a report into the run's folder. Raises ConfigError if it cannot be written."""
    from dist_gpt.report.render.bars import figures
    from dist_gpt.report.render.page import render
    from dist_gpt.report.render.text import markdown

    folder, compared = run.folder, document.get("compare")
    lanes = _torch_lanes(found, document)
    try:
        _put(folder / "report.json", json.dumps(document, indent=1) + "\n")
        if (folder / "figures").is_symlink():
            raise ConfigError([f"{folder / 'figures'}: is a link, and files are not written through links; remove it"])
        (folder / "figures").mkdir(exist_ok=True)
        drawn = figures(document)
        for name, svg in drawn.items():
            _put(folder / "figures" / f"{name}.svg", svg)
        _put(folder / "report.html", render(document, compared, drawn))
        _put(folder / "report.md", markdown(document, compared))
        if found.budget.steps:
            _trace(folder / "trace.json.gz", found, lanes)
    except OSError as error:
        where = error.filename or folder
        raise ConfigError([f"{folder}: the report cannot be written ({error.strerror}: {where})"]) from None


def report_text(document: dict[str, Any]) -> str:
    """Return the document as text for a terminal, and where its files are."""
    from dist_gpt.report.render.text import terminal

    compared = document.get("compare")
    told = f"\n\nCompared with {compared['other']['run_dir']}: {compared['verdict']}" if compared else ""
    files = "report.html, report.md, report.json, trace.json.gz, figures/"
    return f"{terminal(document).rstrip()}{told}\n\nwritten to {document['run_dir']}: {files}"


def read_document(run_dir: str | Path) -> dict[str, Any]:
    """Return the document without writing anything, for the verdict at the end of a run."""
    return analyze(load(run_dir))


def _torch_lanes(found: Profile, document: dict[str, Any]) -> list[dict[str, Any]]:
    """Add the operators of torch.profiler to the document; return their events, on the common clock, for the trace."""
    from dist_gpt.report.read import kineto

    if not any(log.torch_traces for log in found.run.ranks.values()):
        return []
    profiled = kineto.read(found.run, found.clocks)
    document["torch_kernels"] = profiled.kernels
    document["problems"] = [*document["problems"], *profiled.problems]
    return profiled.lanes


def _trace(path: Path, found: Profile, lanes: list[dict[str, Any]]) -> None:
    from dist_gpt.report.trace import write_trace

    with _in_place(path) as aside:
        write_trace(aside, found.run, found.clocks, found.calls, found.meetings, lanes)


def _put(path: Path, text: str) -> None:
    """Write `text` to a file aside and move it into place, so that a reader never sees half a file."""
    with _in_place(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def _in_place(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path`, under an unpredictable name; it replaces `path` at the end."""
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(number)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o644)  # mkstemp gives 0o600
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
