"""The analysis on runs with planted truths: budgets that close, causes that are found, bubbles, bytes, verdicts.

The runs are simulated (`synthetic`), so every figure is exact and the machine's mood plays no part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_gpt.events import CALL, CALL_COLUMNS, DIRECT, SPAN, SPAN_COLUMNS, wire_bytes
from dist_gpt.report.analysis import collectives, stragglers
from dist_gpt.report.analysis.analyze import Profile, analyze, profile
from dist_gpt.report.analysis.identity import _trained
from dist_gpt.report.analysis.verdict import losses
from dist_gpt.report.read.load import load
from dist_gpt.report.render.page import render
from dist_gpt.report.render.text import markdown, terminal
from dist_gpt.rundir import note_end
from dist_gpt.schedule.expand import BACKWARD, RECV, SEND
from tests.unit.synthetic import MS, SECOND, Clock, Late, Times, edit, places, small, write

CUBE = ("parallel.dp=2", "parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true")
LAYOUTS = {
    "alone": (),
    "tp": ("parallel.tp=2",),
    "dp": ("parallel.dp=4", "optim.sharding=none"),
    "pp": ("parallel.pp=4",),
    "cube": CUBE,
    "interleaved": ("parallel.pp=2", "parallel.schedule=interleaved", "parallel.virtual_stages=2"),
}
LATE_NS = 4 * MS
ISSUED, WALL, CPU = 1 + CALL_COLUMNS.index("issued"), 1 + SPAN_COLUMNS.index("wall"), 1 + SPAN_COLUMNS.index("cpu")


def of(folder: Path, *sets: str, **planted: Any) -> tuple[Profile, dict[str, Any]]:
    write(folder, small(*sets), **planted)
    found = profile(load(folder))
    return found, analyze(found.run, found)


def seconds(found: Profile, name: str, rank: int) -> float:
    return float(np.median(found.budget.parts[name][found.budget.ranks.index(rank)])) / 1e9


class TestBudget:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_closes(self, layout: str, tmp_path: Path) -> None:
        found, document = of(tmp_path, *LAYOUTS[layout], times=Times(jitter=0.2))
        parts = found.budget.parts
        assert all((part >= 0).all() for part in parts.values()), {name: part.min() for name, part in parts.items()}
        assert np.allclose(sum(parts.values()), found.budget.wall) and (found.budget.wall > 0).all()
        assert (parts["unexplained"] <= 0.02 * found.budget.wall).all()
        rows = document["budget_by_rank"]
        for row in rows:
            total = sum(value for key, value in row.items() if key not in ("rank", "wall_s"))
            assert total == pytest.approx(row["wall_s"])
        for name, mean in document["budget_s"].items():
            assert mean == pytest.approx(sum(row[name] for row in rows) / len(rows), abs=1e-12)
        assert document["waterfall"][-1]["s"] == pytest.approx(sum(row["s"] for row in document["waterfall"][:-1]))

    def test_a_single_process_only_computes(self, tmp_path: Path) -> None:
        _, document = of(tmp_path)
        assert document["verdict"]["bound_by"] == "compute"
        assert document["collectives"] == [] and document["pipeline"] is None
        assert all(value == 0 for name, value in document["budget_s"].items() if name.startswith(("wait", "transfer")))

    @pytest.mark.parametrize(("computed_ms", "charged_ms"), [(1, 3), (0, 4), (50, 0), (None, 0)])
    def test_a_rank_without_a_processor_between_two_entries_is_descheduled(
        self, computed_ms: int | None, charged_ms: int, tmp_path: Path
    ) -> None:
        """Rank 1's step lasts 4 ms longer than its entries; its thread computed for `computed_ms` of them."""
        write(tmp_path, small("parallel.tp=2", "parallel.dp=2"))
        before = profile(load(tmp_path))

        def longer(lines: list[str]) -> list[str]:
            at = next(i for i, line in enumerate(lines) if line.startswith('{"step":3,"phase":"train"'))
            fact = json.loads(lines[at])
            fact["step_s"] += 4e-3
            fact["between_cpu_s"] = None if computed_ms is None else computed_ms / 1e3
            return [*lines[:at], json.dumps(fact), *lines[at + 1 :]]

        edit(tmp_path, 1, longer)
        after = profile(load(tmp_path))
        at = before.budget.ranks.index(1), before.budget.steps.index(3)

        def grown_ms(name: str) -> float:
            return float(after.budget.parts[name][at] - before.budget.parts[name][at]) / 1e6

        had_ms = float(before.budget.parts["unexplained"][at]) / 1e6
        assert had_ms < 0.1
        assert grown_ms("descheduled") == pytest.approx(charged_ms, abs=had_ms + 1e-3)
        assert grown_ms("descheduled") + grown_ms("unexplained") == pytest.approx(4, abs=1e-3)
        assert all(grown_ms(name) == 0 for name in before.budget.parts if name not in ("descheduled", "unexplained"))
        assert (after.budget.computing == before.budget.computing).all(), "it is not slow at computing"

    def test_the_entry_of_a_message_is_descheduled_where_it_had_no_processor(self, tmp_path: Path) -> None:
        """All of its time is around the call: once the thread computed meanwhile, once it had no processor."""
        write(tmp_path, small("parallel.pp=2"))
        plan = load(tmp_path).plan_of(0)
        messages = {i for i, step in enumerate(plan.steps) if step.kind in (SEND, RECV)}

        def around(lines: list[str], computed: bool) -> list[str]:
            for kind, column in ((CALL, ISSUED), (SPAN, CPU)):
                for at in places(lines, kind, 3):
                    row = json.loads(lines[at])
                    if row[2] in messages:
                        row[column] = row[WALL] if kind == SPAN and computed else 0
                        lines[at] = json.dumps(row, separators=(",", ":"))
            return lines

        edit(tmp_path, 0, lambda lines: around(lines, computed=True))
        computed = profile(load(tmp_path))
        edit(tmp_path, 0, lambda lines: around(lines, computed=False))
        waited = profile(load(tmp_path))
        at = waited.budget.ranks.index(0), waited.budget.steps.index(3)
        moved = computed.budget.parts["unexplained"][at] - waited.budget.parts["unexplained"][at]
        assert moved > 0
        assert waited.budget.parts["descheduled"][at] - computed.budget.parts["descheduled"][at] == pytest.approx(moved)

    def test_clocks_do_not_move_time_between_categories(self, tmp_path: Path) -> None:
        shifted = {rank: Clock(ns=rank * SECOND, drift_ppm=7.0 * rank, error_ns=5_000) for rank in range(1, 8)}
        _, straight = of(tmp_path / "a", *CUBE)
        _, crooked = of(tmp_path / "b", *CUBE, clocks=shifted)
        for name, value in straight["budget_s"].items():
            assert crooked["budget_s"][name] == pytest.approx(value, abs=2e-5)

    def test_a_clock_worse_than_it_says_makes_nothing_negative(self, tmp_path: Path) -> None:
        """How long a rank stood still is read off its own clock alone."""
        wrong = {1: Clock(error_ns=20_000, wrong_ns=(5 * MS, 5 * MS))}
        found, document = of(tmp_path, "parallel.tp=2", clocks=wrong)
        assert document["problems"], "it is told"
        assert all((part >= -1e-3).all() for part in found.budget.parts.values())
        assert np.allclose(sum(found.budget.parts.values()), found.budget.wall)


class TestStragglers:
    def test_the_cause_is_named_not_the_messenger(self, tmp_path: Path) -> None:
        """Rank 2 is late; its tp partner 3 waits for it, and the other copy then waits for whichever of them."""
        found, document = of(tmp_path, "parallel.dp=2", "parallel.tp=2", late=[Late(rank=2, ns=LATE_NS)])
        worst = document["stragglers"]["culprits"][0]
        assert (worst["rank"], worst["kind"]) == (2, "persistent")
        matrix = np.array(document["stragglers"]["matrix_s"])
        # the reductions between the copies, under way meanwhile, absorb a little of it
        assert matrix[2][[0, 1, 3]] == pytest.approx(3 * [LATE_NS / 1e9], rel=0.05)
        assert matrix.sum() - matrix[2].sum() < 0.02 * LATE_NS / 1e9
        said = document["verdict"]
        assert said["culprit"] == 2 and "waiting for rank 2" in said["line"]
        assert seconds(found, "descheduled", 2) == pytest.approx(LATE_NS / 1e9, rel=0.05), "it slept"

    def test_a_straggler_that_comes_once_is_transient(self, tmp_path: Path) -> None:
        once = [Late(rank=1, ns=LATE_NS, steps=frozenset({3}))]
        _, document = of(tmp_path, "parallel.tp=4", late=once, times=Times(jitter=0.01))
        row = next(row for row in document["stragglers"]["culprits"] if row["rank"] == 1)
        assert row["kind"] == "transient" and row["caused_s"] == pytest.approx(LATE_NS / 1e9, rel=0.1)

    def test_two_causes_share_a_wait(self, tmp_path: Path) -> None:
        """In each copy one rank is late, by 4 and by 3 ms: the copies then wait for each other's difference only."""
        late = [Late(rank=0, ns=LATE_NS), Late(rank=2, ns=3 * MS)]
        _, document = of(tmp_path, "parallel.dp=2", "parallel.tp=2", late=late)
        matrix = np.array(document["stragglers"]["matrix_s"])
        assert matrix[0][1] == pytest.approx(0.004, rel=0.05) and matrix[2][3] == pytest.approx(0.003, rel=0.05)
        assert matrix[0][2] == pytest.approx(0.001, abs=0.0002) == matrix[0][3]

    def test_each_waits_for_the_other(self, tmp_path: Path) -> None:
        """In forward rank 0 is late, in backward rank 1: that is rank 1's doing, though it has waited for rank 0."""
        late = [Late(rank=0, ns=LATE_NS), Late(rank=1, ns=3 * MS, kind=BACKWARD)]
        _, document = of(tmp_path, "parallel.tp=2", late=late)
        matrix = np.array(document["stragglers"]["matrix_s"])
        assert matrix.ravel() == pytest.approx([0.0, 0.004, 0.003, 0.0], abs=0.0002)

    def test_inherited_delay_is_charged_before_own(self) -> None:
        assert stragglers._causes({7: 30.0}, {}, culprit=3, ns=40.0, victim=2) == {7: 30.0, 3: 10.0}
        assert stragglers._causes({7: 30.0}, {7: 30.0}, culprit=3, ns=40.0, victim=2) == {3: 40.0}
        assert stragglers._causes({2: 30.0}, {}, culprit=3, ns=40.0, victim=2) == {3: 40.0}, "it has lost that, too"
        assert stragglers._causes({7: 60.0, 8: 20.0}, {}, culprit=3, ns=40.0, victim=2) == {7: 30.0, 8: 10.0, 3: 0.0}


class TestCollectives:
    def test_bytes_and_calls_are_the_plans(self, tmp_path: Path) -> None:
        found, document = of(tmp_path, *CUBE)
        exact = [row for row in document["predicted"] if row["must_be_equal"] and "of all ranks" in row["what"]]
        assert exact and all(row["error"] == 0 and isinstance(row["measured"], int) for row in exact)
        per_axis: dict[tuple[str, str], float] = {}
        for row in document["collectives"]:
            key = (row["axis"], row["op"])
            users = sum(1 for rank in range(8) if found.run.layout.group(row["axis"], rank) != (rank,)) if (
                row["axis"] != "pp"
            ) else 8  # fmt: skip
            per_axis[key] = per_axis.get(key, 0.0) + row["bytes_per_step"] * users
        planned = json.loads((tmp_path / "plan.json").read_text())["total"]["comm"]
        for (axis, op), measured in per_axis.items():
            assert measured == pytest.approx(planned[axis][op]["payload_bytes"]), (axis, op)

    def test_time_starts_with_the_last_arrival(self, tmp_path: Path) -> None:
        times = Times(latency=100_000)
        _, document = of(tmp_path, "parallel.tp=4", late=[Late(rank=1, ns=LATE_NS)], times=times)
        for row in document["collectives"]:
            if row["axis"] == "tp":
                assert row["time_s_p95"] < 0.001, "a late rank is no slow network"
                factor = collectives.bus_factor(row["op"], 4)
                assert row["busbw_bytes_per_s"] == pytest.approx(row["payload_bytes"] / row["time_s_p50"] * factor)

    def test_bus_factors_are_nccl_tests(self) -> None:
        assert collectives.bus_factor("all_reduce", 4) == 1.5
        assert collectives.bus_factor("all_gather", 4) == collectives.bus_factor("reduce_scatter", 4) == 0.75
        assert collectives.bus_factor("send", 2) == 1.0

    def test_traffic_adds_up_to_the_wire_bytes(self, tmp_path: Path) -> None:
        found, document = of(tmp_path, *CUBE)
        matrix = np.array(document["traffic"]["wire_bytes"])
        assert (np.diag(matrix) == 0).all() and matrix.shape == (8, 8)
        calls, m = found.calls, found.meetings
        each = [wire_bytes(collectives.OPS[m.op[i]], int(m.payload[i]), int(m.size[i])) for i in range(len(m))]
        senders = np.where(m.op == collectives.SEND, 1, m.size)
        total = float((np.array(each) * senders).sum()) / len(found.budget.steps)
        assert len(calls) and matrix.sum() == pytest.approx(total, rel=1e-6)

    def test_what_goes_from_rank_to_rank_is_drawn_to_everybody(self, tmp_path: Path) -> None:
        """A gather that went round a ring is seen at the next rank alone; one that did not, at all others."""
        found, _ = of(tmp_path, "parallel.tp=4", "parallel.sequence_parallel=true")
        calls, ranks = found.calls, [0, 1, 2, 3]
        gathers = calls.op == collectives.OPS.index("all_gather")
        parts = collectives.parts_of(calls, found.meetings, len(found.budget.steps))
        parts.counts[:] &= gathers[parts.rows]
        ring = np.array(collectives.traffic(calls, parts, ranks)["wire_bytes"])
        calls.flags[gathers] |= DIRECT
        direct = np.array(collectives.traffic(calls, parts, ranks)["wire_bytes"])
        assert (np.count_nonzero(ring, axis=1) == 1).all() and ring[0, 1] > 0
        assert np.allclose(direct, (ring.sum() / 12) * (1 - np.eye(4)))

    def test_many_ranks_are_drawn_in_blocks(self, tmp_path: Path) -> None:
        _, document = of(tmp_path, "parallel.dp=128", "train.global_batch=128", "optim.sharding=none")
        for section, key in (("traffic", "wire_bytes"), ("stragglers", "matrix_s")):
            assert document[section]["grouped"] and np.array(document[section][key]).shape == (64, 64)
            assert document[section]["ranks"] == list(range(0, 128, 2))

    def test_sizes_count_calls(self, tmp_path: Path) -> None:
        _, document = of(tmp_path, "parallel.tp=2")
        bins = {row["axis"]: sum(b["calls"] for b in row["bins"]) for row in document["sizes"]}
        rows = {axis: sum(r["calls"] for r in document["collectives"] if r["axis"] == axis) for axis in bins}
        assert bins == pytest.approx(rows) and set(bins) == {"tp", "world"}


class TestPipeline:
    @pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 16)])
    def test_a_balanced_one_idles_as_its_schedule_says(self, p: int, m: int, tmp_path: Path) -> None:
        layers = "[" + ", ".join(["1"] * p) + "]"
        sets = (f"parallel.pp={p}", f"model.num_layers={p}", f"parallel.layers={layers}", f"train.global_batch={m}")
        _, document = of(tmp_path, *sets)
        bubble = document["pipeline"]["bubble"]
        assert bubble["structural"] == pytest.approx((p - 1) / (m + p - 1), abs=0.001)
        assert bubble["measured"] == pytest.approx(bubble["simulated"], abs=0.05)
        parts = bubble["structural"] + bubble["imbalance"] + bubble["transfer"]
        assert parts == pytest.approx(bubble["measured"])
        measured, ideal = document["pipeline"]["measured"], document["pipeline"]["ideal"]
        assert [len(row) for row in measured] == [len(row) for row in ideal] == [2 * m] * p
        assert [[a for _, _, a in row] for row in measured] == [[a for _, _, a in row] for row in ideal]

    @pytest.mark.parametrize(("p", "m", "layers"), [(2, 4, 2), (4, 8, 3)])
    def test_what_is_computed_again_is_part_of_its_backward(self, p: int, m: int, layers: int, tmp_path: Path) -> None:
        """It comes layer by layer, between those of the backward: counted apart, both would be counted twice."""
        spread = "[" + ", ".join([str(layers)] * p) + "]"
        sets = (f"parallel.pp={p}", f"model.num_layers={p * layers}", f"parallel.layers={spread}")
        _, document = of(tmp_path, *sets, f"train.global_batch={m}", "train.recompute=full")
        pipeline = document["pipeline"]
        assert pipeline["bubble"]["measured"] == pytest.approx((p - 1) / (m + p - 1), abs=0.02)
        assert pipeline["bubble"]["measured"] == pytest.approx(pipeline["bubble"]["simulated"], abs=0.02)
        assert all(0 < stage["busy"] < 1 for stage in pipeline["stages"])
        assert [[a for _, _, a in row] for row in pipeline["measured"]] == [
            [a for _, _, a in row] for row in pipeline["ideal"]
        ]

    def test_a_slow_stage_is_named(self, tmp_path: Path) -> None:
        sets = ("parallel.pp=4", "model.num_layers=4", "parallel.layers=[1, 1, 1, 1]")
        _, document = of(tmp_path, *sets, times=Times(slow={2: 2.0}))
        assert document["verdict"]["bound_by"] == "bubble"
        assert document["verdict"]["culprit"] == 2 and "stage 2 takes" in document["verdict"]["next"]
        assert document["pipeline"]["bubble"]["imbalance"] > 0.05
        stages = document["pipeline"]["stages"]
        assert stages[2]["forward_s"] == pytest.approx(2 * stages[1]["forward_s"], rel=0.05)
        assert stages[2]["busy"] == max(stage["busy"] for stage in stages)

    def test_the_drain_is_bubble(self, tmp_path: Path) -> None:
        """The last stage is done first, and then waits in the loss's all-reduce for the first one."""
        found, document = of(tmp_path, "parallel.pp=4", "model.num_layers=4", "parallel.layers=[1, 1, 1, 1]")
        assert document["budget_s"]["wait.world"] < 0.2 * document["budget_s"]["bubble"]
        assert seconds(found, "bubble", 3) > 0.1 * document["headline"]["step_s_p50"]


class TestDocument:
    def test_is_json_with_the_keys_of_the_contract(self, tmp_path: Path) -> None:
        _, document = of(tmp_path, *CUBE)
        assert json.loads(json.dumps(document, allow_nan=False)) == document
        sections = "schema verdict headline budget_s collectives stragglers pipeline memory_bytes predicted"
        assert all(document[key] for key in sections.split())
        head = {"step_s_p50", "step_s_p95", "tokens_per_s", "tflops_per_gpu", "mfu", "hfu", "goodput"}
        assert head <= set(document["headline"])
        row = {"axis", "op", "payload_bytes", "calls", "time_s_p50", "busbw_bytes_per_s", "exposed_s", "wait_s"}
        assert all(row <= set(found) for found in document["collectives"])
        assert all({"what", "predicted", "measured", "error"} <= set(found) for found in document["predicted"])
        fixed = {"forward", "backward", "weight", "recompute", "optimizer", "bubble", "data", "checkpoint",
                 "descheduled", "unexplained"}  # fmt: skip
        axes = {f"{kind}.{axis}" for kind in ("transfer", "wait") for axis in ("tp", "data", "pp", "embed", "world")}
        assert set(document["budget_s"]) == fixed | axes

    def test_replay_gives_the_measured_step(self, tmp_path: Path) -> None:
        _, document = of(tmp_path, *CUBE, times=Times(jitter=0.2))
        assert document["replay_error"] < 0.01
        path = document["critical_path"]
        assert sum(part["s"] for part in path["parts"]) == pytest.approx(path["step_s"])
        assert all(row["step_s"] <= path["step_s"] * 1.001 for row in document["free"])

    def test_one_rank_without_a_window(self, tmp_path: Path) -> None:
        write(tmp_path, small(window=None))
        assert analyze(load(tmp_path))["verdict"]["line"] == "one rank, so there is no communication"

    def test_without_a_window(self, tmp_path: Path) -> None:
        write(tmp_path, small(*CUBE, window=None))
        document = analyze(load(tmp_path))
        assert document["budget_s"] == {} and document["pipeline"] is None and document["collectives"] == []
        assert "blocks ranks" in document["verdict"]["line"] and "profile.steps" in document["verdict"]["next"]
        assert document["headline"]["step_s_p50"] > 0
        assert all(row["error"] == 0 for row in document["predicted"] if row["must_be_equal"])

    @pytest.mark.parametrize("window", [None, (2, 4)])
    @pytest.mark.parametrize(("bad", "told"), [
        ({2, 3, 4, 5, 6}, "5 of 6 steps skipped (loss not finite)"),
        ({1, 2, 3, 4, 5, 6}, "6 of 6 steps skipped (loss not finite)"),
        ({6}, "1 of 6 steps skipped (loss not finite)"),
        ({2}, ""),
    ])  # fmt: skip
    def test_skipped_steps_are_told_and_their_time_is_shown(
        self, window: tuple[int, int] | None, bad: set[int], told: str, tmp_path: Path
    ) -> None:
        write(tmp_path, small(*CUBE, window=window))
        path = tmp_path / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row |= {"loss": None, "grad_norm": None, "skipped": True} if row["step"] in bad else {}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if told:
            note_end(tmp_path, 1, f"{told}. Lower optim.lr", 6, "Lower optim.lr")
        document = analyze(load(tmp_path))
        said = document["verdict"]
        assert document["headline"]["step_s_p50"] > 0 and document["headline"]["steps_skipped"] == len(bad)
        if told:
            assert said["line"] == f"{told}: the run failed" and "optim.lr" in said["next"] and document["failed"]
            assert f"{6 - len(bad)} of 6 steps changed the weights" in said["why"]
            assert told in terminal(document).replace("\n         ", " ") and told in markdown(document, None)
            drawn = None if window and len(bad) == 6 else {}  # drawing takes most of the time
            assert told in render(document, None, drawn)
        else:
            assert "skipped" not in said["line"] and "1 of 6 steps skipped (loss not finite)" in said["why"]

    def test_a_missing_rank_is_told_and_the_rest_is_shown(self, tmp_path: Path) -> None:
        write(tmp_path, small(*CUBE))
        (tmp_path / "events.rank5.jsonl").unlink()
        document = analyze(load(tmp_path))
        assert any("rank 5" in problem for problem in document["problems"])
        assert len(document["budget_by_rank"]) == 7 and document["accounting"]["exact"] is None

    def test_a_run_that_died_is_shown(self, tmp_path: Path) -> None:
        write(tmp_path, small(*CUBE))
        for rank in range(8):
            edit(tmp_path, rank, lambda lines: lines[: len(lines) * 2 // 3])
        document = analyze(load(tmp_path))
        assert document["problems"] and document["headline"]["goodput"] is None and document["budget_s"]

    def test_a_step_that_not_all_have_ended_is_not_counted(self, tmp_path: Path) -> None:
        """Of a killed run; its calls per step are those of a whole one."""
        write(tmp_path / "whole", small(*CUBE))
        write(tmp_path / "killed", small(*CUBE))
        edit(tmp_path / "killed", 3, lambda lines: lines[: places(lines, SPAN, 4)[5]])
        whole, killed = (analyze(load(tmp_path / name)) for name in ("whole", "killed"))
        assert killed["identity"]["steps_profiled"] == whole["identity"]["steps_profiled"] - 1
        for key in ("calls", "bytes_per_step"):
            found, expected = (
                {(row["axis"], row["op"], row["payload_bytes"]): row[key] for row in document["collectives"]}
                for document in (killed, whole)
            )
            assert found == pytest.approx(expected) and found

    @pytest.mark.parametrize(
        ("rank", "fact"),
        [
            (0, {"ceiling": {"flops_per_s": 0, "bytes_per_s": 0, "dtype": "fp32"}}),
            (1, {"step": 1 << 59, "phase": "train", "step_s": 0.0, "comm": {}}),
        ],
    )
    def test_strange_values_are_no_reason_to_die(self, rank: int, fact: dict[str, Any], tmp_path: Path) -> None:
        write(tmp_path, small(*CUBE))
        edit(tmp_path, rank, lambda lines: [*lines[:-2], json.dumps(fact), *lines[-2:]])
        assert analyze(load(tmp_path))["budget_s"]

    def test_without_the_late_ranks_file_the_verdict_says_what_is_not_known(self, tmp_path: Path) -> None:
        write(tmp_path, small("parallel.tp=4"), late=[Late(rank=3, ns=LATE_NS)])
        (tmp_path / "events.rank3.jsonl").unlink()
        assert "Not all ranks were read" in analyze(load(tmp_path))["verdict"]["why"]

    def test_difference_from_the_declaration(self, tmp_path: Path) -> None:
        write(tmp_path, small("parallel.pp=2"))
        fact = {"step": 3, "phase": "train", "action": "send 0SEND_F0", "axis": "pp", "op": "send",
                "payload_bytes": 4096, "calls": 1}  # fmt: skip
        edit(tmp_path, 0, lambda lines: [*lines[:-1], json.dumps({"difference": fact}), lines[-1]])
        document = analyze(load(tmp_path))
        assert document["accounting"]["exact"] is False
        assert document["accounting"]["differences"] == [{"rank": 0, **fact}]


def test_losses_are_summed_by_what_would_mend_them() -> None:
    parts = {"forward": 5.0, "transfer.tp": 1.0, "wait.tp": 2.0, "wait.data": 0.5, "bubble": 3.0, "data": 0.1}
    assert losses(parts) == {"tp": 3.0, "data": 0.5, "bubble": 3.0, "data loading": 0.1}


def test_steps_of_a_resumed_run_are_counted_not_numbered(tmp_path: Path) -> None:
    """Steps 4 to 6 are of the last attempt: three, whatever they are called."""
    write(tmp_path, small(window=None))
    for path in tmp_path.glob("events.rank*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [row for row in rows if row.get("phase") != "train" or row["step"] > 3]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    run = load(tmp_path)
    assert max(log.steps[-1]["step"] for log in run.ranks.values()) == 6
    assert {_trained(log) for log in run.ranks.values()} == {3}
