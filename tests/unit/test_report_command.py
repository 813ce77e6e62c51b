"""`dist-gpt report` as a person calls it: files, output, exit codes, bad input."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_gpt import cli
from dist_gpt.report.render import bars
from tests.unit.synthetic import edit, small, write

CUBE = ("parallel.dp=2", "parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true")
WRITTEN = {"report.html", "report.md", "report.json", "trace.json.gz", "figures"}


def report(*argv: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(["report", *argv])
    return int(left.value.code or 0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write(tmp_path / "run", small(*CUBE))
    return tmp_path / "run"


def undrawn_figures(document: dict[str, Any]) -> dict[str, str]:
    return {"budget": "<svg/>"}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw one figure only: drawing takes most of the time, and here it does not matter what is drawn."""
    monkeypatch.setattr(bars, "figures", undrawn_figures)


def test_writes_everything(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert report(str(run)) == 0
    out = capsys.readouterr().out
    assert (
        "bound by" in out
        and out.splitlines()[-1] == f"written to {run}: report.html, report.md, report.json, trace.json.gz, figures/"
    )
    assert max(map(len, out.splitlines()[:-1])) <= 110
    assert {path.name for path in run.iterdir()} - set(before) == WRITTEN
    assert all((run / name).read_bytes() == content for name, content in before.items()), "a run's files are kept"
    document = json.loads((run / "report.json").read_text())
    assert document["verdict"]["line"] and document["problems"] == []
    assert document["verdict"]["line"][8:] in (run / "report.md").read_text()
    trace = json.loads(gzip.decompress((run / "trace.json.gz").read_bytes()))
    assert {event["pid"] for event in trace["traceEvents"]} >= set(range(8))
    assert list((run / "figures").glob("*.svg")) and not [
        path for path in run.rglob("*") if path.name.endswith(".part")
    ]
    monkeypatch.setattr(bars, "figures", undrawn_figures)
    assert report(str(run)) == 0, "and again, over the first one"


@pytest.mark.usefixtures("undrawn")
def test_json_is_one_document(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(str(run), "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run / "report.json").read_text())


@pytest.mark.usefixtures("undrawn")
def test_two_runs_of_one_config_show_no_regression(run: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", small(*CUBE), seed=7)
    assert report(str(run), "--compare", str(tmp_path / "other")) == 0
    document = json.loads((run / "report.json").read_text())
    assert {row["verdict"] for row in document["compare"]["rows"]} <= {"same", "unknown"}
    assert str(tmp_path / "other") in (run / "report.html").read_text()
    assert not (tmp_path / "other" / "report.html").exists()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _without(run: Path, pattern: str) -> Path:
    for path in run.glob(pattern):
        path.unlink()
    return run


def _newer(run: Path) -> Path:
    edit(run, 0, lambda lines: [lines[0].replace('"schema":2', '"schema":99'), *lines[1:]])
    return run


BAD = {
    "no such folder": (lambda run: run / "nowhere", "no such folder"),
    "an empty folder": (lambda run: _made(run.parent / "empty"), "config.yaml"),
    "a file": (lambda run: run / "plan.json", "no such folder; expected a run directory"),
    "no event files": (lambda run: _without(run, "events.*"), "no events.rank*.jsonl"),
    "no plan": (lambda run: _without(run, "plan.json"), "plan.json: no such file"),
    "a newer schema": (_newer, "newer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_code_2_and_one_message(case: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = BAD[case]
    folder = make(run)
    assert report(str(folder)) == 2
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err and captured.out == ""


@pytest.mark.usefixtures("undrawn")
def test_damage_is_told_and_the_rest_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "events.rank6.jsonl").unlink()
    edit(run, 2, lambda lines: [*lines[:-2], lines[-2][: len(lines[-2]) // 2]])
    assert report(str(run)) == 0
    assert "rank 6" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "no event file" in page and "cut off" in page


@pytest.mark.usefixtures("undrawn")
def test_a_folder_that_cannot_be_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.json").mkdir()  # what permissions would do, also for root
    assert report(str(run)) == 2
    assert "the report cannot be written" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_nothing_is_written_through_links(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    victim = elsewhere / "victim"
    victim.write_text("precious")
    for name in ("report.json", "report.json.part", "report.html.part"):
        (run / name).symlink_to(victim)
    assert report(str(run)) == 0
    assert victim.read_text() == "precious" and not (run / "report.json").is_symlink()
    for svg in (run / "figures").iterdir():
        svg.unlink()
    (run / "figures").rmdir()
    (run / "figures").symlink_to(elsewhere)
    assert report(str(run)) == 2 and "is a link" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == [victim]


@pytest.mark.usefixtures("undrawn")
def test_a_pipe_is_no_event_file(run: Path) -> None:
    (run / "events.rank7.jsonl").unlink()
    os.mkfifo(run / "events.rank7.jsonl")  # opening it would wait for ever
    assert report(str(run)) == 0
    assert "not a regular file" in (run / "report.md").read_text()


def test_names_of_a_run_are_text(tmp_path: Path) -> None:
    hostile = tmp_path / "<img src=x onerror=alert(1)>"
    write(hostile, small("parallel.tp=2"))
    assert report(str(hostile)) == 0
    page = (hostile / "report.html").read_text()
    assert "<img" not in page and "&lt;img" in page


def test_starts_without_torch(run: Path) -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom dist_gpt.cli import main\nmain(sys.argv[1:])"
    ran = subprocess.run([sys.executable, "-c", code, "report", str(run)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
