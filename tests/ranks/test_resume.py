"""A run that is stopped, or dies, and resumes: to the last bit what an uninterrupted one is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_gpt import cli
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.load import load
from tests.ranks.preloaded import Started
from tests.ranks.resuming import STEPS, config_of, curve, same, train
from tests.ranks.runs import PATIENCE_S, Place, attempts, environment, finish, ranks_below, rows, wait_until
from tests.ranks.threads import RankFailed

DP_TP = {"dp": 2, "tp": 2, "sequence_parallel": True}
DP_PP = {"dp": 2, "pp": 2}
CASES = [
    ({}, "fp64", {"sharding": "none"}),
    ({}, "fp32", {"sharding": "none", "name": "sgd", "momentum": 0.9}),
    ({}, "fp64", {"sharding": "none", "name": "sgd", "momentum": 0.0}),
    (DP_TP, "fp64", {"sharding": "zero1"}),
    (DP_TP, "fp32", {"sharding": "none"}),
    (DP_PP, "fp32", {"sharding": "zero1", "bucket_mb": 0.001}),
    (DP_PP, "fp64", {"sharding": "zero1", "name": "sgd", "momentum": 0.9}),
    (DP_PP, "bf16", {"sharding": "zero3", "state_dtype": "bf16"}),
    (DP_TP, "fp16", {"sharding": "zero2", "offload": True}),
    (DP_TP, "fp32", {"sharding": "zero3", "offload": True, "reshard": "step"}),
    ({"dp": 2}, "bf16", {"sharding": "none", "grad_dtype": "bf16"}),
]


@pytest.mark.parametrize(("parallel", "dtype", "optim"), CASES)
def test_stopped_and_resumed_is_uninterrupted(
    parallel: dict[str, Any], dtype: str, optim: dict[str, Any], tmp_path: Path
) -> None:
    """Stopped after step 3, between two regular checkpoints, by the wish of the last rank."""
    sections = {"parallel": parallel, "train": {"dtype": dtype}, "optim": optim}
    config = config_of(tmp_path, **sections)
    whole = train(config, tmp_path / "whole")
    first = train(config, tmp_path / "twice", stop=(config.world_size - 1, 3))
    second = train(config, tmp_path / "twice", resume="auto")
    assert [part.step for part in first] == [3] * config.world_size and not any(part.finished for part in first)
    assert all(part.finished for part in second)
    assert [part.accounting for part in [*whole, *first, *second]] == [[]] * 3 * config.world_size
    assert same(whole, second) and not same(first, second)
    assert curve(tmp_path / "twice") == curve(tmp_path / "whole")
    checkpoints = sorted(p.name for p in (tmp_path / "twice" / "checkpoints").iterdir())
    assert checkpoints == ["step_00000004", "step_00000006"], "two are kept"


class TestAttempts:
    """One rank; the parts that do not depend on how many there are."""

    def test_metrics_are_cut_back_and_events_have_a_second_header(self, tmp_path: Path) -> None:
        """It died after step 5, the checkpoint is of step 4: that step's validation stays, step 5 is done again."""
        config, run_dir = config_of(tmp_path), tmp_path / "run"
        whole = train(config, tmp_path / "whole")
        train(config, run_dir, stop=(0, 5))
        shutil.rmtree(run_dir / "checkpoints" / "step_00000005")
        with (run_dir / "events.rank0.jsonl").open("a") as file:
            file.write('{"step": 6, "pha')  # it was writing
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "lo')
        again = train(config, run_dir, resume="auto")
        assert same(whole, again) and curve(run_dir) == curve(tmp_path / "whole")
        text = (run_dir / "events.rank0.jsonl").read_text()
        headers = [json.loads('{"schema":' + part.splitlines()[0]) for part in text.split('{"schema":')[1:]]
        assert [header["attempt"] for header in headers] == [0, 1]
        second = [json.loads(line) for line in text[text.rindex('{"schema":') :].splitlines()]
        assert [(e["step"], e["phase"]) for e in second if "phase" in e] == [
            (5, "train"), (6, "train"), (6, "eval"), (6, "save"),
        ]  # fmt: skip

    def test_a_stop_in_the_last_step_is_an_end(self, tmp_path: Path) -> None:
        config = config_of(tmp_path, checkpoint={"every": 0})
        [part] = train(config, tmp_path / "run", stop=(0, STEPS))
        assert part.finished and not (tmp_path / "run" / "checkpoints").exists(), "and nothing is saved unasked"

    def test_a_stop_saves_also_where_nothing_is_saved_regularly(self, tmp_path: Path) -> None:
        config = config_of(tmp_path, checkpoint={"every": 0})
        whole = train(config, tmp_path / "whole")
        train(config, tmp_path / "run", stop=(0, 1))
        assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]
        assert same(whole, train(config, tmp_path / "run", resume="auto"))

    def test_nothing_to_resume(self, tmp_path: Path) -> None:
        """It died before its first checkpoint: everything is done again, also the validation before training."""
        config, run_dir = config_of(tmp_path), tmp_path / "run"
        whole = train(config, tmp_path / "whole")
        train(config, run_dir, stop=(0, 1))
        shutil.rmtree(run_dir / "checkpoints")
        [part] = train(config, run_dir, resume="auto")
        assert part.lines == (f"no checkpoint in {run_dir / 'checkpoints'} yet: training starts from the beginning",)
        assert same(whole, [part]) and curve(run_dir) == curve(tmp_path / "whole")

    def test_a_finished_run_has_nothing_left_to_do(self, tmp_path: Path) -> None:
        config = config_of(tmp_path)
        whole = train(config, tmp_path / "run")
        before = curve(tmp_path / "run")
        again = train(config, tmp_path / "run", resume="auto")
        assert again[0].accounting == [] and same(whole, again) and curve(tmp_path / "run") == before

    def test_another_run_goes_on_from_a_path(self, tmp_path: Path) -> None:
        """A checkpoint of another run directory; and going back in one's own puts later ones aside."""
        config, run_dir = config_of(tmp_path), tmp_path / "run"
        whole = train(config, run_dir)
        path = run_dir / "checkpoints" / "step_00000004"
        branch = train(config, tmp_path / "branch", resume=str(path))
        assert same(whole, branch) and [row["step"] for row in curve(tmp_path / "branch")] == [5, 6]
        [part] = train(config, run_dir, resume=str(path))
        assert same(whole, [part]) and "is of a later step: moved to aside-step_00000006-" in part.lines[0]
        assert part.lines[-1] == f"resumed at step 4 from {path}"

    def test_another_layout_is_refused(self, tmp_path: Path) -> None:
        config, run_dir = config_of(tmp_path), tmp_path / "run"
        train(config, run_dir, stop=(0, 3))
        other = config_of(tmp_path, parallel={"tp": 2}, train={"dtype": "fp32"})
        with pytest.raises(RankFailed) as caught:
            train(other, run_dir, resume="auto")
        cause = caught.value.__cause__
        assert isinstance(cause, ConfigError)
        where = run_dir / "checkpoints" / "step_00000003"
        assert cause.problems == [
            f"{key}: the checkpoint {where} has {theirs}, this run has {ours}; resume with the same value, or start "
            "another run"
            for key, theirs, ours in (("parallel.tp", "1", "2"), ("train.dtype", '"fp64"', '"fp32"'))
        ]

    def test_it_may_train_longer(self, tmp_path: Path) -> None:
        config = config_of(tmp_path, optim={"decay": "none"})
        longer = config_of(tmp_path, optim={"decay": "none"}, train={"steps": STEPS + 2})
        whole = train(longer, tmp_path / "whole")
        train(config, tmp_path / "run")
        assert same(whole, train(longer, tmp_path / "run", resume="auto"))


class Processes:
    """Ranks of `dist-gpt train` as processes of their own, without a launcher."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.started: list[Started] = []

    def start(self, ranks: int, *options: str, run_dir: str, sets: dict[str, object]) -> list[Started]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        words = self.place.argv("train", run_dir, *options, sets=sets)
        place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        now = [
            Started("dist_gpt", words, self.place.folder,
                    {**environment(), **place, "RANK": str(r), "LOCAL_RANK": str(r), "MASTER_PORT": str(port)})
            for r in range(ranks)
        ]  # fmt: skip
        for process in now:
            process.read_along()
        self.started += now
        return now


@pytest.fixture
def processes(place: Place) -> Iterator[Processes]:
    found = Processes(place)
    yield found
    for process in found.started:
        process.kill()
        process.wait(PATIENCE_S)


def test_one_rank_is_told_and_all_leave_with_75(place: Place, processes: Processes) -> None:
    """Real processes, real signals: SIGUSR1 to rank 1 alone, twice. Dropout inside attention too."""
    sets: dict[str, object] = {
        "parallel.dp": 2, "train.steps": 60, "train.eval_every": 0, "model.attention_dropout": 0.1,
        "train.global_batch": 4, "train.dtype": "fp32",
    }  # fmt: skip
    run_dir = place.folder / "told"
    ranks = processes.start(2, run_dir="told", sets=sets)
    wait_until(lambda: len(rows(run_dir / "metrics.jsonl")) >= 3, ranks[0])
    for _ in range(2):
        ranks[1].send_signal(signal.SIGUSR1)
    said = [finish(process) for process in ranks]
    assert [process.returncode for process in ranks] == [75, 75], said
    ended = json.loads((run_dir / "exit.json").read_text())
    step = ended["step"]
    assert ended["code"] == 75 and ended["why"] == "another rank was asked to stop" and 3 <= step < 60
    for rank in range(2):
        events = rows(run_dir / f"events.rank{rank}.jsonl")
        assert [e["step"] for e in events if e.get("phase") == "train"] == list(range(1, step + 1))
        assert [e["step"] for e in events if e.get("phase") == "save"] == [step]
    assert "accounting: exact" in said[0][0].splitlines()
    again = processes.start(2, "--resume", "auto", run_dir="told", sets=sets)
    said = [finish(process) for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    assert f"resumed at step {step} from {run_dir}/checkpoints/step_{step:08d}" in said[0][0].splitlines()
    whole = processes.start(2, run_dir="untold", sets=sets)
    assert [finish(process) and process.returncode for process in whole] == [0, 0]
    assert curve(run_dir) == curve(place.folder / "untold")
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0


def test_torchrun_starts_again_from_the_newest(place: Place) -> None:
    """Rank 1 is killed; torchrun starts both again, and nobody says that they shall resume."""
    sets: dict[str, object] = {
        "parallel.dp": 2, "train.steps": 40, "train.eval_every": 0, "train.global_batch": 4, "checkpoint.every": 5,
    }  # fmt: skip
    run_dir = place.folder / "restarted"
    started = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "dist_gpt"]
    process = place.start([*started, *place.argv("train", "restarted", sets=sets)], "torch.distributed.run")
    try:
        wait_until(lambda: len(rows(run_dir / "metrics.jsonl")) >= 7, process)
        ranks_below(process.pid)[1].kill()
        out, err = finish(process)
    finally:
        process.kill()
    assert process.returncode == 0, err
    [resumed] = [line for line in out.splitlines() if line.startswith("resumed at step ")]
    assert int(resumed.split()[3]) >= 5 and "accounting: exact" in out.splitlines()
    assert [row["step"] for row in curve(run_dir)] == list(range(41))
    assert attempts(run_dir / "events.rank0.jsonl") == [0, 1]
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0


@pytest.mark.parametrize(("resume", "told"), [("nowhere", "neither a checkpoint"), ("other", "parallel.tp: the check")])
def test_a_bad_path_is_refused_before_anything_is_made(
    resume: str, told: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DIST_GPT_RUN_DIR", raising=False)
    other = place.folder / "other"
    if resume == "other":
        train(load(str(place.config), ["parallel.tp=2", "train.steps=2", f"run_dir={other}"]), other, stop=(0, 1))
    with pytest.raises(SystemExit) as left:
        cli.main(place.argv("train", "refused", "--resume", str(place.folder / resume)))
    assert left.value.code == 2 and told in capsys.readouterr().err
    assert not (place.folder / "refused").exists()


def test_a_failure_is_recorded(place: Place, processes: Processes) -> None:
    """Checkpoints cannot be written: a file is in the way. The run ends with 1, and says what and where."""
    run_dir = place.folder / "in_the_way"
    [process] = processes.start(1, run_dir="in_the_way", sets={"train.steps": 2, "checkpoint.every": 1})
    wait_until(run_dir.is_dir, process)
    (run_dir / "checkpoints").write_text("")
    _, err = finish(process)
    assert process.returncode == 1
    told = f"checkpoint of step 1: rank 0 on {socket.gethostname()}, {run_dir / 'checkpoints'}: File exists (errno 17)"
    assert told in err
    ended = json.loads((run_dir / "exit.json").read_text())
    assert (ended["code"], ended["step"]) == (1, 1) and told in ended["why"]
    assert os.listdir(run_dir / "logs") == []
