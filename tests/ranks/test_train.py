"""The product as users run it: whole runs through the command line, and what they leave."""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from dist_gpt.comm.mesh import FakeBackends, Mesh
from dist_gpt.comm.rendezvous import RankEnv, RendezvousError
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.load import load
from dist_gpt.cpu import allowed, share
from dist_gpt.data.loader import Batches
from dist_gpt.data.tokens import prepare
from dist_gpt.plan.api import plan_document
from dist_gpt.profile.recorder import Recorder
from dist_gpt.replica import Rank
from dist_gpt.train.metrics import Tracker
from dist_gpt.train.trainer import Trainer, main, settle
from tests.ranks.runs import EVAL_EVERY, STEPS, Killed, Place, Run, rows, tree
from tests.ranks.threads import in_threads

Comm = dict[str, dict[str, dict[str, int]]]


MAX_SKIPPED = 4
READS = "ranks of a node read each other's memory (launch.single_copy)"


def where(rank: int, ranks: int) -> str:
    """What `rank` of as many on this machine says of its device."""
    free = len(allowed()) == os.cpu_count()
    own = share(allowed(), rank, ranks, 1) if free else []
    cpus = f"CPU {own[0]}" if len(own) == 1 else f"CPUs {own[0]} to {own[-1]}" if own else ""
    return f"CPU, gloo{f'; pinned to {cpus} (launch.bind)' if own else ''}; {READS}"


def add_up(parts: list[Comm], times: int = 1) -> Comm:
    """Sum of {axis: {op: {calls, payload_bytes, wire_bytes}}}."""
    result: Comm = {}
    for part in parts:
        for axis, ops in part.items():
            for op, tally in ops.items():
                into = result.setdefault(axis, {}).setdefault(op, dict.fromkeys(tally, 0))
                for key, value in tally.items():
                    into[key] += times * value
    return result


class TestEightRanks:
    def test_ends_well(self, eight: Run) -> None:
        assert eight.code == 0, eight.err
        assert eight.lines[0] == "tiny: 8 ranks on this machine. no GPU found: gloo on CPU"
        assert eight.lines[-1] == f"run_dir: {eight.run_dir}"
        assert "accounting: exact" in eight.lines
        assert eight.err == ""

    def test_shows_its_progress(self, eight: Run) -> None:
        assert eight.code == 0, eight.err
        steps = [line for line in eight.lines if line.startswith("step ") and " eta " in line]
        assert len(steps) == STEPS
        for number, line in enumerate(steps, 1):
            assert line.startswith(f"step {number}/{STEPS}  loss ")
            assert all(word in line for word in ("norm ", "lr ", "tokens/s"))

    def test_learns(self, eight: Run) -> None:
        found = [row["val_loss"] for row in eight.metrics() if "val_loss" in row]
        assert len(found) == 1 + STEPS // EVAL_EVERY
        assert all(later < earlier for earlier, later in zip(found, found[1:], strict=False))
        assert found[0] == pytest.approx(math.log(256), rel=0.02), "untrained: as good as guessing a byte"
        assert f"validation loss  {found[0]:.4f} -> {found[-1]:.4f}" in eight.out

    def test_run_directory(self, eight: Run) -> None:
        ranks = range(8)
        expected = {"config.yaml", "plan.json", "metrics.jsonl", "exit.json", "logs"}
        expected |= {f"events.rank{r}.jsonl" for r in ranks}
        expected |= {f"logs/rank{r}.log" for r in ranks}
        assert set(tree(eight.run_dir)) == expected

    def test_config_is_read_back(self, eight: Run) -> None:
        config = load(str(eight.run_dir / "config.yaml"))
        assert (config.parallel.dp, config.parallel.tp, config.parallel.pp) == (2, 2, 2)
        assert (config.model.vocab_size, config.model.ffn_size, config.model.num_kv_heads) == (256, 128, 4)
        assert config.run_dir == str(eight.run_dir)

    def test_plan(self, eight: Run) -> None:
        config = load(str(eight.run_dir / "config.yaml"))
        written = json.loads((eight.run_dir / "plan.json").read_text())
        assert written == json.loads(json.dumps(plan_document(config, 0)))
        layers, hidden, vocabulary, tokens = 2, 32, 256, 32
        counted = 12 * layers * hidden**2 + 13 * layers * hidden + (vocabulary + tokens + 2) * hidden
        assert written["total"]["parameters"] == counted

    def test_metrics(self, eight: Run) -> None:
        before, *steps = eight.metrics()
        assert set(before) == {"step", "val_loss"} and before["step"] == 0
        assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
        needed = {"step", "loss", "grad_norm", "lr", "tokens_per_s", "step_s", "epoch"}
        for row in steps:
            assert set(row) == needed | ({"val_loss"} if row["step"] % EVAL_EVERY == 0 else set())
            assert all(math.isfinite(row[key]) and row[key] > 0 for key in needed)
            assert row["tokens_per_s"] * row["step_s"] == pytest.approx(8 * 32)
        assert steps[2]["lr"] == 0.01, "warm-up is over"

    @pytest.mark.parametrize("rank", range(8))
    def test_events(self, eight: Run, rank: int) -> None:
        header, *events = eight.events(rank)
        pp, dp, tp = rank // 4, rank // 2 % 2, rank % 2
        identity = {"schema": 2, "rank": rank, "coords": {"pp": pp, "dp": dp, "cp": 0, "tp": tp}, "attempt": 0}
        assert {key: header[key] for key in identity} == identity
        assert (header["world"], header["backend"], header["device"]) == (8, "gloo", "cpu")
        axes = [channel["axis"] for channel in header["channels"]]
        assert axes == ["world", "data", "embed", "tp", "pp", "pp"]
        first, last, end = events[0], events[-2], events[-1]
        assert set(first["clock"]) == set(last["clock"]) == {"at_ns", "offset_ns", "error_ns"}
        assert abs(first["clock"]["offset_ns"]) <= first["clock"]["error_ns"], "one machine has one clock"
        assert end["end"]["differences"] == [] and end["end"]["record_ns"] > 0
        events = [e for e in events if "phase" in e]
        assert [(e["step"], e["phase"]) for e in events] == [
            (0, "eval"), (1, "train"), (2, "train"), (3, "train"), (3, "eval"),
            (4, "train"), (5, "train"), (6, "train"), (6, "eval"),
        ]  # fmt: skip
        assert all(e["step_s"] > 0 for e in events)
        for e in events:
            if e["phase"] == "train":
                assert set(e["blocked_s"]) >= {"tp", "pp", "data", "world"} and e["data_s"] >= 0
                assert sum(e["blocked_s"].values()) + e["data_s"] <= e["step_s"]
        plan = plan_document(load(str(eight.run_dir / "config.yaml")), rank)["comm"]
        assert all(e["comm"] == plan for e in events if e["phase"] == "train")

    def test_events_add_up_to_the_plan(self, eight: Run) -> None:
        """The files alone: rank 0's rows against `comm`, everybody's against `total`, as integers."""
        plan = json.loads((eight.run_dir / "plan.json").read_text())
        issued = [[e["comm"] for e in eight.events(rank) if e.get("phase") == "train"] for rank in range(8)]
        assert add_up(issued[0]) == add_up([plan["comm"]], STEPS)
        assert add_up([comm for rank in issued for comm in rank]) == add_up([plan["total"]["comm"]], STEPS)
        assert {"data", "tp", "pp", "embed", "world"} == set(plan["total"]["comm"])

    def test_logs(self, eight: Run) -> None:
        for rank in range(8):
            place = f"(pp {rank // 4}, dp {rank // 2 % 2}, cp 0, tp {rank % 2}) on {where(rank, 8)}"
            log = (eight.run_dir / "logs" / f"rank{rank}.log").read_text()
            assert f"rank {rank}/8 local {rank}/8 {place}\n" in log
            assert "Traceback" not in log and "Error" not in log


class TestOtherLayouts:
    def test_one_process_learns_exactly_the_same(self, eight: Run, alone: Run, by_torchrun: Run) -> None:
        reference = alone.metrics()
        for run in (eight, by_torchrun):
            for row, expected in zip(run.metrics(), reference, strict=True):
                for key in {"loss", "val_loss", "grad_norm"} & set(expected):
                    assert abs(row[key] - expected[key]) <= 1e-12 * abs(expected[key]), (run.run_dir.name, key, row)

    def test_json(self, alone: Run) -> None:
        """Standard output is one document; progress is on standard error."""
        assert alone.code == 0, alone.err
        document = json.loads(alone.out)
        metrics = alone.metrics()
        assert document["exit_code"] == 0 and document["run_dir"] == str(alone.run_dir)
        assert document["steps"] == STEPS
        assert document["loss"] == [metrics[1]["loss"], metrics[-1]["loss"]]
        assert "accounting: exact" in alone.err and f"step {STEPS}/{STEPS}  loss" in alone.err

    def test_one_process_communicates_nothing(self, alone: Run) -> None:
        assert all(row["comm"] == {} for row in alone.events(0) if "comm" in row)

    def test_wandb_offline_writes_into_the_run_directory(self, alone: Run) -> None:
        files = list((alone.run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
        assert len(files) == 1 and files[0].stat().st_size > 1000

    def test_torchrun(self, by_torchrun: Run) -> None:
        """No launcher of ours: rank 0 makes the run directory."""
        assert by_torchrun.code == 0, by_torchrun.err
        assert "accounting: exact" in by_torchrun.lines
        assert f"(pp 0, dp 0, cp 0, tp 0) on CPU, gloo; {READS}" in by_torchrun.out + by_torchrun.err
        found = set(tree(by_torchrun.run_dir))
        assert found == {
            "config.yaml", "plan.json", "metrics.jsonl", "exit.json", "logs", "events.rank0.jsonl", "events.rank1.jsonl"
        }  # fmt: skip
        assert load(str(by_torchrun.run_dir / "config.yaml")).parallel.dp == 2


class TestExistingRunDirectory:
    @pytest.mark.parametrize("verb", ["launch", "train"])
    def test_refused(self, verb: str, alone: Run, place: Place) -> None:
        before = tree(alone.run_dir)
        again = place.run(place.argv(verb, "alone"), "alone")
        assert again.code == 2
        assert again.err == (
            f"dist-gpt: run_dir: {alone.run_dir} already exists and is never overwritten; choose another, "
            f"for example --set run_dir={alone.run_dir}-2, or remove it; --resume auto continues the run in it\n"
        )
        assert again.out == "" and tree(alone.run_dir) == before

    def test_refused_under_torchrun(self, by_torchrun: Run, place: Place) -> None:
        """torchrun itself always ends with 1 and reports the code of the rank that failed first."""
        before = tree(by_torchrun.run_dir)
        again = place.torchrun(place.argv("train", "by_torchrun"), "by_torchrun", ranks=2)
        assert again.code != 0 and "already exists and is never overwritten" in again.err
        cause = again.err[again.err.index("Root Cause") :]
        assert "rank      : 0 " in cause and "exitcode  : 2 " in cause
        assert tree(by_torchrun.run_dir) == before


class TestKilledRank:
    def test_is_named_with_the_end_of_its_log(self, killed: Killed) -> None:
        assert killed.code == 1
        log = killed.run_dir / "logs" / "rank1.log"
        lines = killed.err.splitlines()
        assert lines[0].startswith("rank 1 (pp 1, dp 0, cp 0, tp 0) on ")
        assert lines[0].endswith("died: killed by SIGKILL")
        assert re.match(r"  (in step \d+, (train|control)|before the first step)", lines[1]), lines[1]
        assert f"end of {log}:" in lines
        assert [f"  | {line}" for line in log.read_text().splitlines()][-20:] == [
            line for line in lines if line.startswith("  | ")
        ]
        assert f"  | rank 1/2 local 1/2 (pp 1, dp 0, cp 0, tp 0) on {where(1, 2)}" in lines

    def test_leaves_no_process(self, killed: Killed) -> None:
        assert killed.left == []

    def test_leaves_what_was_measured(self, killed: Killed) -> None:
        steps = [row["step"] for row in killed.metrics()]
        assert len(steps) >= 2 and steps == list(range(1, len(steps) + 1))
        for rank in range(2):
            header, *events = rows(killed.run_dir / f"events.rank{rank}.jsonl")
            events = [e for e in events if "step" in e]
            assert header["rank"] == rank and [e["step"] for e in events] == list(range(1, len(events) + 1))
        assert killed.lines[-1] == f"run_dir: {killed.run_dir}"


def test_verify(place: Place) -> None:
    """The certificate of a layout of two ranks, with the keys that scripts read."""
    done = place.run(place.argv("verify", "never", "--json", sets={"parallel.tp": 2}), "never")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    measures = {"loss", "gradient", "gradient_norm", "weight"}
    assert (document["verdict"], document["accounting"]) == ("pass", "exact")
    assert set(document["worst"]) == measures == set(document["where"])
    assert all(0 <= error <= 1e-10 for error in document["worst"].values())
    assert document["worst"]["gradient"] > 0, "two layouts round differently; no difference at all compares nothing"
    assert document["verified_config"]["parallel"]["tp"] == 2
    assert document["verified_config"]["train"]["dtype"] == "fp64"
    assert not done.run_dir.exists()


class TestTrainer:
    """Single parts in this process."""

    def train(self, place: Place, folder: Path, spoil: Any, **sets: object) -> list[dict[str, Any]]:
        """Metrics of a run on one rank; `spoil(optimizer, gradients)` is called before each clipping."""
        torch.set_num_threads(1)
        pairs = {"model.dropout": 0.0, "train.global_batch": 2, "train.eval_batches": 0, "train.eval_every": 0, **sets}
        config = load(str(place.config), [f"{key}={value}" for key, value in pairs.items()])
        rank = Rank(config, 0, FakeBackends(), torch.device("cpu"))
        rank.initialise()
        rank.optimizer.before_clip = lambda: spoil(rank)
        recorder = Recorder(config, rank, RankEnv(0, 1, 0, 1, "127.0.0.1", 0, 0, math.inf), folder)
        with Tracker(config, folder) as tracker, closing(recorder):
            Trainer(config, rank, Batches(prepare(config), config), tracker, recorder).run()
        return rows(folder / "metrics.jsonl")

    def test_gives_up_after_steps_that_are_not_finite(self, place: Place, tmp_path: Path) -> None:
        def always(rank: Rank) -> None:
            rank.buffers.buckets[0].gradient_shard[0] = math.nan

        with pytest.raises(RuntimeError, match=rf"{MAX_SKIPPED} steps in a row, up to step {MAX_SKIPPED}.*optim\.lr"):
            self.train(place, tmp_path, always, **{"train.steps": 50, "train.max_skipped": MAX_SKIPPED})
        metrics = rows(tmp_path / "metrics.jsonl")
        assert len(metrics) == MAX_SKIPPED and all(row["grad_norm"] is None and row["skipped"] for row in metrics)

    def test_gives_up_at_once_where_as_many_were_skipped_before(self, place: Place) -> None:
        """A resumed run may allow less than the one that saved."""
        rank = SimpleNamespace(optimizer=SimpleNamespace(scale=None))
        trainer = Trainer(load(str(place.config), ["train.max_skipped=3"]), rank, Mock(), Mock(), Mock())  # type: ignore[arg-type]
        trainer.skips.in_a_row = 5
        with pytest.raises(RuntimeError, match="6 steps in a row, up to step 8"):
            trainer.record(8, math.nan, 1.0, 0.1)

    def test_overflow_at_every_step_names_the_scale(self, place: Place, tmp_path: Path) -> None:
        def always(rank: Rank) -> None:
            rank.buffers.buckets[0].gradient_shard[0] = math.inf

        sets = {"train.dtype": "fp16", "train.loss_scale": 64.0, "train.max_skipped": 3, "train.steps": 50}
        said = r"3 steps in a row.*dropped to 8 and may have to drop further"
        with pytest.raises(RuntimeError, match=said):
            self.train(place, tmp_path, always, **sets)
        assert [row["loss_scale"] for row in rows(tmp_path / "metrics.jsonl")] == [32, 16, 8]

    def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale(
        self, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def always(rank: Rank) -> None:
            rank.buffers.buckets[0].gradient_shard[0] = math.inf

        record = Trainer.record
        monkeypatch.setattr(
            Trainer, "record", lambda self, step, loss, norm, taken: record(self, step, math.nan, norm, taken)
        )
        sets = {"train.dtype": "fp16", "train.loss_scale": 64.0, "train.max_skipped": 3, "train.steps": 50}
        with pytest.raises(RuntimeError, match=r"loss \(nan\).*Lower optim\.lr") as error:
            self.train(place, tmp_path, always, **sets)
        assert "loss_scale" not in str(error.value)

    def test_overflow_at_scale_1_is_of_the_gradients(self, place: Place, tmp_path: Path) -> None:
        def always(rank: Rank) -> None:
            rank.buffers.buckets[0].gradient_shard[0] = math.inf

        sets = {"train.dtype": "fp16", "train.loss_scale": 2.0, "train.max_skipped": 3, "train.steps": 50}
        with pytest.raises(RuntimeError, match=r"dropped to 1: .*themselves overflow.*train in bf16"):
            self.train(place, tmp_path, always, **sets)

    def test_goes_on_when_some_steps_are_not_finite(self, place: Place, tmp_path: Path) -> None:
        steps = 2 * MAX_SKIPPED
        calls: list[int] = []

        def mostly(rank: Rank) -> None:
            calls.append(1)
            if len(calls) % MAX_SKIPPED:
                rank.buffers.buckets[0].gradient_shard[0] = math.inf

        metrics = self.train(place, tmp_path, mostly, **{"train.steps": steps, "train.max_skipped": MAX_SKIPPED})
        assert [row["step"] for row in metrics if row["grad_norm"] is not None] == [MAX_SKIPPED, steps]
        assert [row["step"] for row in metrics if "skipped" not in row] == [MAX_SKIPPED, steps]
        assert all(math.isfinite(row["loss"]) for row in metrics)

    def test_the_world_must_fit_the_layout(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "3",
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RendezvousError, match=r"the world size is 3, but the layout pp 1 x dp 1 x cp 1 x tp 2"):
            main(load(str(place.config), ["parallel.tp=2"]))

    def test_nodes_that_share_state_must_be_those_that_were_started(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """torchrun alone knows how many there are."""
        place_of_rank = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        for name, value in {**place_of_rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        sets = ["parallel.dp=4", "optim.sharding=zero2", "optim.shard_group=node"]
        with pytest.raises(ConfigError, match=r"launch.nodes 1 .*this node runs 2 of the 4 ranks; set launch.nodes: 2"):
            main(load(str(place.config), sets))

    def test_a_rank_that_cannot_be_built_gives_its_groups_back(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        close = Mock()
        monkeypatch.setattr(Mesh, "close", close)
        monkeypatch.setattr("dist_gpt.replica.Optimizer", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            Rank(load(str(place.config)), 0, FakeBackends(), torch.device("cpu"))
        close.assert_called_once_with()

    @pytest.mark.parametrize(("found", "code"), [([], 0), (["train: tp all_reduce: issued 3 calls"], 1)])
    def test_accounting_of_all_ranks(
        self, found: list[str], code: int, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What rank 1 found is told by rank 0, and every rank leaves with the code."""
        config, store = load(str(place.config)), dist.HashStore()

        def body(rank: int) -> int:
            env = RankEnv(rank, 2, rank, 2, "127.0.0.1", 0, 0, math.inf)
            with Tracker(config, tmp_path, rank) as tracker:
                return settle(store, env, found if rank == 1 else [], tracker)

        assert in_threads(2, body) == [code, code]
        said = capsys.readouterr().out.splitlines()
        assert said == (["accounting: differs", f"  rank 1: {found[0]}"] if found else ["accounting: exact"])
