"""Reading a run directory: whole as it was written, damaged as far as it goes, with what is missing told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_gpt.events import CALL, CALL_COLUMNS, OPS, SCHEMA, SPAN_COLUMNS
from dist_gpt.report.analysis.clocks import align
from dist_gpt.report.analysis.match import match
from dist_gpt.report.read import event_file as lines_module
from dist_gpt.report.read.load import Run, RunError, load, ranges
from tests.unit.synthetic import Clock, edit, places, small, write

MIXED = ("parallel.tp=2", "parallel.dp=2", "parallel.pp=2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    write(folder, small(*MIXED))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A run directory to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def column(run: Run, rank: int, name: str) -> np.ndarray:
    return run.ranks[rank].calls[:, CALL_COLUMNS.index(name)]


def only(run: Run) -> str:
    """The one problem of a run."""
    (problem,) = run.problems
    return problem


def steps_of(run: Run, rank: int) -> list[int]:
    log = run.ranks[rank]
    return sorted({*log.calls[:, 0].tolist(), *log.spans[:, 0].tolist()})


# --- a whole run ----------------------------------------------------------------------------------------------------


def test_everything_is_read_as_it_was_written(tmp_path: Path) -> None:
    truth = write(tmp_path, small(*MIXED))
    run = load(tmp_path)
    assert run.problems == [] and list(run.ranks) == list(range(8))
    assert run.config == truth.config and (run.layout.pp, run.layout.dp, run.layout.tp) == (2, 2, 2)
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4, 5, 6]
    assert run.plan["total"]["parameters"] > 0
    for rank, log in run.ranks.items():
        since = log.header["base_ns"]
        calls, spans = truth.calls[rank].copy(), truth.spans[rank].copy()
        calls[:, CALL_COLUMNS.index("issue")] -= since
        spans[:, SPAN_COLUMNS.index("start")] -= since
        assert log.calls.dtype == log.spans.dtype == np.int64
        assert np.array_equal(log.calls, calls) and np.array_equal(log.spans, spans)
        assert (log.rank, log.attempts, log.header["host"], log.header["window"]) == (rank, 1, "n0", [2, 4])
        assert [step["step"] for step in log.steps] == [1, 2, 3, 4, 5, 6]
        assert len(log.clocks) == 2 and len(log.kernels) == 1 and log.end is not None and log.end["dropped"] == 0
        assert log.memory is not None and set(log.memory["parts"]) >= {"parameters", "activations"}
        assert log.ceiling is not None and log.samples == log.torch_traces == log.differences == []


def test_rows_are_what_the_step_list_declares(whole: Path) -> None:
    """The generator tells the truth: every entry's calls are those that the plan declares."""
    run = load(whole)
    for rank, log in run.ranks.items():
        plan = run.plan_of(rank)
        axes = [channel["axis"] for channel in log.header["channels"]]
        for step in (2, 3, 4):
            found: dict[int, list[tuple[str, str, int]]] = {}
            for row in log.calls[log.calls[:, 0] == step].tolist():
                found.setdefault(row[1], []).append((axes[row[2]], OPS[row[3]], row[4]))
            for index, entry in enumerate(plan.steps):
                declared = [(c.axis, c.op, c.payload) for c in plan.declare(entry).comm for _ in range(c.calls)]
                assert found.get(index, []) == declared
        assert set(log.spans[:, SPAN_COLUMNS.index("index")].tolist()) == set(range(-1, len(plan.steps)))


def test_equal_seeds_write_equal_files(tmp_path: Path) -> None:
    from tests.unit.synthetic import Times

    for name in ("a", "b"):
        write(tmp_path / name, small("parallel.dp=2"), Times(jitter=0.2), seed=7)
    texts = [(tmp_path / name / "events.rank1.jsonl").read_text() for name in ("a", "b")]
    assert texts[0] == texts[1]


def test_one_process_has_spans_and_no_calls(tmp_path: Path) -> None:
    write(tmp_path, small())
    run = load(tmp_path)
    assert run.problems == [] and run.ranks[0].calls.shape == (0, 12) and len(run.ranks[0].spans) > 0


def test_a_run_that_was_not_profiled(tmp_path: Path) -> None:
    write(tmp_path, small("parallel.dp=2", window=None))
    run = load(tmp_path)
    assert run.problems == [] and len(run.ranks[1].calls) == len(run.ranks[1].spans) == 0
    assert len(run.ranks[1].steps) == 6 and run.ranks[1].header["window"] is None


def test_blocks_may_end_anywhere(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = load(whole)
    monkeypatch.setattr(lines_module, "BLOCK_BYTES", 500)
    in_pieces = load(whole)
    assert in_pieces.problems == []
    for rank, log in at_once.ranks.items():
        assert np.array_equal(in_pieces.ranks[rank].calls, log.calls)
        assert in_pieces.ranks[rank].steps == log.steps


def test_steps_that_communicate_the_same_share_one_object(whole: Path) -> None:
    steps = load(whole).ranks[0].steps
    assert all(step["comm"] is steps[0]["comm"] for step in steps)


# --- nothing to show ------------------------------------------------------------------------------------------------

NOTHING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no such folder": (shutil.rmtree, "no such folder"),
    "empty folder": (lambda f: [path.unlink() for path in f.iterdir()], "config.yaml: no such file"),
    "no config": (lambda f: (f / "config.yaml").unlink(), "config.yaml: no such file"),
    "empty config": (lambda f: (f / "config.yaml").write_text(""), "config.yaml"),
    "wrong config": (lambda f: (f / "config.yaml").write_text("model: 3"), "config.yaml"),
    "no plan": (lambda f: (f / "plan.json").unlink(), "plan.json: no such file"),
    "cut plan": (lambda f: (f / "plan.json").write_text('{"layout":'), "plan.json: cannot be read"),
    "plan of another kind": (lambda f: (f / "plan.json").write_text("[]"), "plan.json: not a plan"),
    "no events": (lambda f: [path.unlink() for path in f.glob("events*")], "no events.rank"),
    "empty event files": (lambda f: [path.write_text("") for path in f.glob("events*")], "ranks 0-7: the event file"),
    "no headers": (lambda f: [path.write_text("[1,2]\n") for path in f.glob("events*")], "no readable header"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_show_is_an_error(name: str, folder: Path) -> None:
    damage, said = NOTHING[name]
    damage(folder)
    with pytest.raises(RunError) as raised:
        load(folder)
    assert said in str(raised.value) and raised.value.problems


@pytest.mark.parametrize(("schema", "said"), [(SCHEMA + 1, "a newer dist_gpt; update"), (1, "an older dist_gpt")])
def test_another_schema_is_an_error(schema: int, said: str, folder: Path) -> None:
    edit(folder, 3, lambda lines: [lines[0].replace(f'"schema":{SCHEMA}', f'"schema":{schema}'), *lines[1:]])
    with pytest.raises(RunError, match=said) as raised:
        load(folder)
    assert f"schema {schema}, expected {SCHEMA}" in str(raised.value) and "events.rank3" in str(raised.value)


def test_a_header_of_schema_1_without_the_new_keys_is_an_old_run(folder: Path) -> None:
    for path in folder.glob("events*"):
        path.write_text('{"schema":1,"rank":0,"coords":{"pp":0,"dp":0,"cp":0,"tp":0},"attempt":0}\n')
    with pytest.raises(RunError, match="older"):
        load(folder)


# --- what there is, and what is missing -----------------------------------------------------------------------------


def test_a_missing_rank(folder: Path) -> None:
    (folder / "events.rank5.jsonl").unlink()
    run = load(folder)
    assert only(run) == "rank 5: no event file" and list(run.ranks) == [0, 1, 2, 3, 4, 6, 7]


def test_many_missing_ranks_are_one_sentence(folder: Path) -> None:
    for rank in (1, 2, 3, 5):
        (folder / f"events.rank{rank}.jsonl").unlink()
    assert only(load(folder)) == "ranks 1-3, 5: no event file"


def test_a_rank_outside_the_plan(folder: Path) -> None:
    shutil.copy(folder / "events.rank0.jsonl", folder / "events.rank8.jsonl")
    for name in ("events.rank07.jsonl", "events.rank.jsonl", "events.rank1.jsonl.part"):
        (folder / name).write_text("not mine")
    run = load(folder)
    assert "rank 8: not in the plan of 8 ranks" in only(run) and len(run.ranks) == 8


def test_a_cut_off_last_line_and_no_end(folder: Path) -> None:
    before = load(folder).ranks[2]
    edit(folder, 2, lambda lines: [*(kept := lines[: places(lines, CALL, 4)[3] + 1])[:-1], kept[-1][:20]])
    run = load(folder)
    assert [p for p in run.problems if "cut off" in p] == ["rank 2: the last line of the event file is cut off"]
    assert [p for p in run.problems if "no end" in p] and len(run.problems) == 2
    log = run.ranks[2]
    assert np.array_equal(log.calls, before.calls[: len(log.calls)])
    assert (log.calls[:, 0] == 4).sum() == 3 and log.end is None and len(log.clocks) == 1


def test_without_an_end_the_run_goes_on_or_the_rank_died(folder: Path) -> None:
    for rank in range(8):
        edit(folder, rank, lambda lines: lines[:-2] + [""])
    assert only(load(folder)).startswith("ranks 0-7: the event file has no end")


HEADERS = {
    "rank": ('"rank":1', '"rank":2', "belongs to another rank"),
    "coords": ('"tp":1', '"tp":0', "belongs to another rank"),
    "world": ('"world":8', '"world":4', "belongs to another rank"),
    "axis": ('"axis":"tp"', '"axis":"ep"', "groups that this layout does not have"),
    "pair": ('"ranks":[1,5]', '"ranks":[1,99]', "groups that this layout does not have"),
    "pair of others": ('"ranks":[1,5]', '"ranks":[0,4]', "groups that this layout does not have"),
    "base": ('"base_ns":', '"base":', "no readable header"),
    "channels": ('"channels":[', '"channels":[7,', "no readable header"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_does_not_fit(name: str, folder: Path) -> None:
    old, new, said = HEADERS[name]
    edit(folder, 1, lambda lines: [lines[0].replace(old, new), *lines[1:]])
    run = load(folder)
    assert said in only(run) and only(run).startswith("rank 1: ") and 1 not in run.ranks and len(run.ranks) == 7


def test_a_short_header_is_enough(folder: Path) -> None:
    def shorten(lines: list[str]) -> list[str]:
        kept = {key: json.loads(lines[0])[key] for key in ("schema", "rank", "attempt", "base_ns", "channels")}
        return [json.dumps(kept), *lines[1:]]

    edit(folder, 1, shorten)
    run = load(folder)
    assert run.problems == [] and run.ranks[1].header["versions"] == {} and run.ranks[1].header["host"] is None
    match(run, align(run))


def test_plan_and_configuration_of_different_layouts(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    plan["layout"]["tp"] = 4
    (folder / "plan.json").write_text(json.dumps(plan))
    assert "plan.json and config.yaml have different layouts" in only(load(folder))


# --- attempts -------------------------------------------------------------------------------------------------------


def resumed(lines: list[str], cut: str = "\n") -> list[str]:
    """A first attempt that died in step 3, then the whole file as attempt 1."""
    first = "\n".join(lines[: places(lines, CALL, 3)[5]]) + cut
    second = [lines[0].replace('"attempt":0', '"attempt":1'), *lines[1:]]
    return [first + second[0], *second[1:]]


@pytest.mark.parametrize("cut", ["\n", "\n[1,3,5,0", '\n{"step":3,"pha', "\n\n"])
def test_a_resumed_run_is_its_last_attempt(cut: str, folder: Path) -> None:
    before = load(folder)
    for rank in range(8):
        edit(folder, rank, lambda lines: resumed(lines, cut))
    run = load(folder)
    assert run.problems == []
    for rank, log in run.ranks.items():
        assert (log.attempts, log.header["attempt"], len(log.clocks), len(log.steps)) == (2, 1, 2, 6)
        assert np.array_equal(log.calls, before.ranks[rank].calls)


def test_what_was_broken_in_an_earlier_attempt_is_forgotten(folder: Path) -> None:
    for rank in range(8):
        edit(folder, rank, lambda lines: [*(r := resumed(lines))[:0], r[0].replace("[1,2,", "[1,x,"), *r[1:]])
    assert load(folder).problems == []


def test_a_rank_that_was_not_resumed_is_left_out(folder: Path) -> None:
    for rank in set(range(8)) - {6}:
        edit(folder, rank, resumed)
    run = load(folder)
    assert only(run) == "rank 6: no records of attempt 1; those of earlier attempts are left out"
    assert 6 not in run.ranks


# --- other files, other tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ended", "failed"),
    [
        ('{"code": 1, "why": "rank 3 died"}', "rank 3 died"),
        ('{"code": 2, "why": null}', "exit code 2"),
        ('{"code": 75, "why": "SIGUSR1 received"}', ""),
        ('{"code": 0, "why": null}', ""),
        ("[1]", ""),
        ("{", ""),
    ],
)
def test_why_it_failed_is_read_from_exit_json(ended: str, failed: str, folder: Path) -> None:
    (folder / "exit.json").write_text(ended)
    run = load(folder)
    assert run.failed == failed
    assert [p for p in run.problems if "the run failed" in p] == ([f"the run failed: {failed}"] if failed else [])


def test_a_run_that_was_stopped_says_that_it_is_not_finished(folder: Path) -> None:
    (folder / "exit.json").write_text('{"code": 75, "why": "SIGTERM received", "step": 4}')
    run = load(folder)
    steps = run.config.train.steps
    assert only(run) == f"not finished: stopped after step 4 of {steps}: SIGTERM received; saved"


def test_metrics(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step":\n[3]\n')
    run = load(folder)
    assert only(run) == "metrics.jsonl: 2 of 8 lines cannot be read" and len(run.metrics) == 6
    path.unlink()
    assert "no such file" in only(load(folder))


def test_a_configuration_that_this_version_would_not_run(folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("recompute: none", "recompute: full"))
    assert load(folder).config.train.recompute == "full"


def test_an_event_file_that_cannot_be_read(folder: Path) -> None:
    (folder / "events.rank3.jsonl").unlink()
    (folder / "events.rank3.jsonl").mkdir()
    assert "rank 3: the event file is not a regular file" in only(load(folder))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8"), (range(0, 26, 2), None)],
)
def test_ranges(numbers: list[int], text: str | None) -> None:
    assert ranges(numbers) == (text if text is not None else "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, ... (3 more)")


def test_the_generator_plants_clocks(tmp_path: Path) -> None:
    truth = write(tmp_path, small("parallel.dp=2"), clocks={1: Clock(5_000, 10.0)})
    log = load(tmp_path).ranks[1]
    raw = log.header["base_ns"] + column(load(tmp_path), 1, "issue")
    assert np.array_equal(raw, truth.clocks[1].raw(truth.calls[1][:, CALL_COLUMNS.index("issue")]))
