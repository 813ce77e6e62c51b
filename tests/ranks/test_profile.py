"""What is recorded of a call and of a step, and by whom it is measured: order and structure, no durations."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dist_gpt.comm.device_time import CudaTimer
from dist_gpt.comm.group import Group
from dist_gpt.comm.ledger import Ledger
from dist_gpt.comm.mesh import Backends, FakeBackends
from dist_gpt.comm.rendezvous import RankEnv
from dist_gpt.comm.trace_buffer import WATCH_EVERY, HostTimer, Record, Tape
from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.events import BOUND, CALL, CALL_COLUMNS, DIRECT, EMULATED, ESTIMATED, OPS, SPAN
from dist_gpt.plan.count import count_memory
from dist_gpt.plan.kernels import rank_kernels
from dist_gpt.profile.kernels import kernel_facts
from dist_gpt.profile.memory import MemoryWatch
from dist_gpt.profile.recorder import Recorder, record_cost_ns, told
from dist_gpt.replica import Rank
from dist_gpt.verify import verify_samples
from tests.ranks.threads import on_gloo

AT = {name: i + 1 for i, name in enumerate(CALL_COLUMNS)}


def taped(ledger: Ledger) -> Tape:
    ledger.tape = Tape(HostTimer(), 0)
    return ledger.tape


def small(folder: Path, **sets: object) -> Config:
    tree = {
        "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "seq_len": 8, "vocab_size": 32},
        "train": {"steps": 6, "global_batch": 4, "micro_batch": 2, "dtype": "fp64"},
        "parallel": {"dp": 1},
        "data": {"source": "synthetic"},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load(str(path), [f"{key}={value}" for key, value in sets.items()])


class TestCalls:
    @pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter", "broadcast"])
    @pytest.mark.parametrize("read", [True, False], ids=["read", "sent"])
    def test_every_collective_has_its_times_in_order(self, read: bool, op: str) -> None:
        def body(rank: int, backends: Backends) -> list[list[int]]:
            group = Group("tp", (0, 1), rank, backends.create("tp", (0, 1), rank), Ledger({"tp": 2}))
            tape = taped(group.ledger)
            whole, part = torch.ones(64), torch.ones(32)
            calls = {
                "all_reduce": lambda: group.all_reduce(whole),
                "all_gather": lambda: group.all_gather(whole, part),
                "reduce_scatter": lambda: group.reduce_scatter(part, whole),
                "broadcast": lambda: group.broadcast(whole),
            }
            with group.ledger.step("train", "F0", {("tp", op, 256): 1}, index=7):
                calls[op]().wait()
            while not tape.records[0].done:  # gloo tells on a thread of its own
                pass
            rows = tape.rows(3)
            group.close()
            return rows

        for call, span in on_gloo(2, body, single_copy=read):
            assert [call[0], call[AT["step"]], call[AT["index"]], call[AT["channel"]]] == [CALL, 3, 7, 0]
            assert OPS[call[AT["op"]]] == op and call[AT["payload"]] == 256
            assert 0 <= call[AT["issued"]] <= call[AT["wait"]] <= call[AT["waited"]]
            assert call[AT["done"]] > 0 and call[AT["cpu"]] >= 0
            flags = {"broadcast": 0, "reduce_scatter": DIRECT if read else EMULATED | DIRECT}
            kinds = call[AT["flags"]] & (EMULATED | DIRECT)
            assert kinds == flags.get(op, DIRECT if read or op == "all_gather" else 0)
            assert [span[0], span[1], span[2]] == [SPAN, 3, 7]
            assert span[3] <= call[AT["issue"]] and span[4] >= call[AT["waited"]] and span[5] > 0

    def test_a_message_ends_where_its_sender_knows_it(self) -> None:
        def body(rank: int, backends: Backends) -> list[list[int]]:
            group = Group("pp", (0, 1), rank, backends.create("pp_f", (0, 1), rank), Ledger({"pp": 2}), "f")
            assert group.ledger.channels == [{"axis": "pp", "ranks": [0, 1], "direction": "f"}]
            tape = taped(group.ledger)
            tensor = torch.ones(1000)
            (group.send(tensor) if rank == 0 else group.recv(tensor)).wait()
            while not (rank or tape.records[0].done):
                pass
            rows = tape.rows(1)
            group.close()
            return rows

        (send,), (recv,) = on_gloo(2, body)
        assert (OPS[send[AT["op"]]], send[AT["payload"]], send[AT["flags"]]) == ("send", 4000, 0)
        assert (OPS[recv[AT["op"]]], recv[AT["payload"]]) == ("recv", 0) and recv[AT["flags"]] in (BOUND, ESTIMATED)
        assert recv[AT["wait"]] <= recv[AT["done"]] <= recv[AT["waited"]]
        assert send[AT["index"]] == recv[AT["index"]] == -1, "outside of any entry"

    def test_only_what_has_computing_under_it_is_watched_and_not_in_every_step(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """gloo calls Python at the end of a watched collective, which costs more than all the rest."""
        clock = count(0, 1000)  # 1 us between two looks at the clock, however busy the machine is
        monkeypatch.setattr("dist_gpt.comm.ledger.perf_counter_ns", lambda: next(clock))

        class Work:
            def __init__(self) -> None:
                self.watched = False

            def get_future(self) -> Work:
                return self

            def add_done_callback(self, note: object) -> None:
                self.watched = True

        ledger = Ledger({"tp": 2})
        tape = taped(ledger)
        assert isinstance(tape.timer, HostTimer)
        if not tape.timer.delay.known:
            pytest.skip("the kernel does not tell how long a thread waits for a processor: all calls are watched")
        watched = []
        for step in range(WATCH_EVERY + 1):
            works = [Work(), Work(), Work()]
            for index, batch in ((0, works[:2]), (1, works[2:])):
                with ledger.step("train", "B0", {("tp", "all_reduce", 8): len(batch)}, index=index):
                    for work in batch:
                        record = ledger.issue("tp", "all_reduce", 8, 0)
                        ledger.issued(record, work, emulated=False)
                        if work is works[1]:  # as if something had been computed meanwhile
                            record.issued -= 10**9
                        ledger.waits(record)
                        ledger.woken(record)
                        ledger.waited(record)
            tape.rows(step)
            watched.append([work.watched for work in works])
        nothing = [[False, False, False]] * (WATCH_EVERY - 1)
        assert watched == [[True, True, True], *nothing, [False, True, False]]

    def test_a_call_never_waited_for(self) -> None:
        ledger = Ledger({"tp": 2})
        tape = taped(ledger)
        ledger.issued(ledger.issue("tp", "send", 8, 0), object(), emulated=False)
        (row,) = tape.rows(1)
        assert (row[AT["wait"]], row[AT["waited"]], row[AT["done"]]) == (-1, -1, -1)

    def test_rows_are_bounded(self) -> None:
        ledger = Ledger({"tp": 2})
        tape = ledger.tape = Tape(HostTimer(), 0, limit=2)
        for _ in range(5):
            ledger.issued(ledger.issue("tp", "send", 8, 0), object(), emulated=False)
            with ledger.step("train", "F0", {}):
                pass
        assert len(tape.rows(1)) == 4 and tape.dropped == 6
        assert ledger.counts("control").as_dict()["tp"]["send"]["calls"] == 5, "counts are never dropped"

    def test_without_a_tape_the_axis_is_charged(self) -> None:
        ledger = Ledger({"tp": 2})
        ledger.begin(4)
        record = ledger.issue("tp", "all_reduce", 8, 0)
        ledger.issued(record, object(), emulated=False)
        ledger.waits(record)
        ledger.waited(record)
        with ledger.reading():
            pass
        spent = ledger.end()
        assert spent.blocked_ns == {"tp": record.issued - record.issue + record.waited - record.wait}
        assert spent.data_ns > 0 and ledger.records == 1
        ledger.issue("tp", "all_reduce", 8, 0)
        assert ledger.records == 1, "between steps nothing is counted as a step's"

    def test_every_entry_is_annotated(self) -> None:
        ledger, names = Ledger({}), []
        ledger.tape = Tape(HostTimer(), 0, annotate=lambda name: names.append(name) or nullcontext())
        with ledger.step("train", "forward 0F0 block 1", {}):
            pass
        assert names == ["forward 0F0 block 1"]

    def test_the_cost_of_a_record_is_measured(self) -> None:
        assert 0 < record_cost_ns() < 1e6


class FakeDevice:
    """torch.cuda as the timer uses it: a stream's events happen when the test says."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.stream_now: dict[int, float] = {}
        self.current = 0
        self.made = 0

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802 (torch's name)
        self.made += 1
        return FakeEvent(self)

    def Stream(self) -> int:  # noqa: N802
        return len(self.stream_now) + 1

    def stream(self, which: int) -> Any:
        device = self

        class Inside:
            def __enter__(self) -> None:
                device.current = which

            def __exit__(self, *error: object) -> None:
                device.current = 0

        return Inside()

    def synchronize(self) -> None: ...


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device, self.at = device, math.nan

    def record(self) -> None:
        self.at = self.device.stream_now.get(self.device.current, 0.0) if self.device.current else self.device.now_ms

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: FakeEvent) -> float:
        return later.at - self.at


class FakeWork:
    """Ends at `end_ms`: whichever stream waits for it stands still until then."""

    def __init__(self, device: FakeDevice, end_ms: float) -> None:
        self.device, self.end_ms = device, end_ms

    def wait(self) -> None:
        if self.device.current:
            self.device.stream_now[self.device.current] = self.end_ms
        else:
            self.device.now_ms = max(self.device.now_ms, self.end_ms)


def test_times_of_the_device_are_those_of_its_streams() -> None:
    device = FakeDevice()
    timer = CudaTimer(device)
    ledger = Ledger({"tp": 2})
    tape = ledger.tape = Tape(timer, 0)
    for step in range(2):
        start = device.now_ms = 100.0 * step + 10.0
        with ledger.step("train", "B0", {("tp", "all_reduce", 8): 1}, index=5):
            record = ledger.issue("tp", "all_reduce", 8, 0)
            ledger._issued = {("tp", "all_reduce", 8): 1}
            work = FakeWork(device, end_ms=start + 7.0)
            ledger.issued(record, work, emulated=False)
            device.now_ms = start + 2.0  # two milliseconds of computing under it
            ledger.waits(record)
            work.wait()
            ledger.waited(record)
            device.now_ms = start + 8.0
        call, span = tape.rows(step)
        began = timer._anchor_ns + int((start - timer._anchor.at) * 1e6)
        assert call[AT["issue"]] == began, "arrival: the compute stream's, not the host's"
        times = [call[AT[name]] for name in ("issued", "done", "wait", "waited", "cpu")]
        assert times == [0, 7_000_000, 2_000_000, 7_000_000, 0]
        assert span == [SPAN, step, 5, began, 8_000_000, 8_000_000]
    assert device.made == 6 + 3, "six events, used again in the second step, and an anchor for each step"


def test_measured_memory_is_the_plan(tmp_path: Path) -> None:
    config = small(tmp_path)
    rank = Rank(config, 0, FakeBackends(), torch.device("cpu"))
    rank.initialise()
    watch = MemoryWatch(rank, baseline=0)
    before = rank.executor.after_step, rank.sink.hold
    with watch.watching():
        rank.train_step(0, verify_samples(config, 0))
    assert (rank.executor.after_step, rank.sink.hold) == before
    fact = watch.fact(1)
    assert fact["parts"] == count_memory(rank.plan, rank.plan.steps)
    assert fact["rss_bytes"] > fact["parts"]["peak"]
    if fact["source"] == "mallinfo2":
        assert fact["peak_bytes"] > fact["parts"]["peak"]


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the ceiling alone may take the time for all products, which are then left out."""
    monkeypatch.setattr("dist_gpt.profile.kernels.TOTAL_S", math.inf)


@pytest.mark.usefixtures("unhurried")
def test_products_are_measured_alone(tmp_path: Path) -> None:
    config = small(tmp_path, **{"model.num_kv_heads": 1})
    ceiling, *rows = [next(iter(fact.items())) for fact in kernel_facts(config, torch.device("cpu"))]
    assert ceiling[0] == "ceiling" and ceiling[1]["flops_per_s"] > 0 < ceiling[1]["bytes_per_s"]
    assert [row["name"] for _, row in rows] == [kernel.name for kernel in rank_kernels(config)]
    assert all(name == "kernel" and row["seconds"] > 0 and row["flops"] > 0 for name, row in rows)


class TestRecorder:
    def run(self, folder: Path, steps: int = 5, fail_at: int | None = None, **sets: object) -> list[Any]:
        config = small(folder, **{"train.steps": 5, **sets})
        rank = Rank(config, 0, FakeBackends(), torch.device("cpu"))
        rank.initialise()
        recorder = Recorder(config, rank, RankEnv(0, 1, 0, 1, "127.0.0.1", 0, 0, math.inf), folder, 0)
        try:
            for number in range(1, steps + 1):
                with recorder.step(number):
                    rank.train_step(number - 1, verify_samples(config, number))
                    if number == fail_at:
                        raise ZeroDivisionError
            recorder.finish([])
        finally:
            recorder.close()
        return [json.loads(line) for line in (folder / "events.rank0.jsonl").read_text().splitlines()]

    @pytest.mark.usefixtures("unhurried")
    def test_rows_only_inside_the_window(self, tmp_path: Path) -> None:
        rows = self.run(tmp_path, **{"profile.steps": "[2, 3]"})
        assert sorted({row[1] for row in rows if isinstance(row, list)}) == [2, 3]
        assert [row["step"] for row in rows if "phase" in row] == [1, 2, 3, 4, 5]
        assert [row["memory"]["step"] for row in rows if "memory" in row] == [1]
        assert "ceiling" in rows[-8] and "end" in rows[-1]

    def test_steps_of_the_window_say_what_was_computed_between_entries(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """1 s passes whenever somebody looks: when it leaves an entry, and when it comes to the next one."""
        looks = count()
        monkeypatch.setattr(HostTimer, "cpu_ns", lambda timer: next(looks) * 1_000_000_000)
        rows = self.run(tmp_path, **{"profile.steps": "[2, 3]"})
        entries = {step: sum(isinstance(row, list) and row[:2] == [SPAN, step] for row in rows) for step in (2, 3)}
        assert {row["step"]: row["between_cpu_s"] for row in rows if "between_cpu_s" in row} == {
            step: many + 1 for step, many in entries.items()
        }

    def test_where_nobody_tells_they_say_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(HostTimer, "cpu_ns", lambda timer: None)
        assert not any("between_cpu_s" in row for row in self.run(tmp_path, **{"profile.steps": "[2, 3]"}))

    def test_without_a_window_nothing_is_measured_apart(self, tmp_path: Path) -> None:
        rows = self.run(tmp_path)
        always = {"phase", "step", "step_s", "comm", "start_ns", "blocked_s", "data_s"}
        assert [set(row) for row in rows[1:-1]] == [always] * 5

    def test_memory_is_watched_behind_a_window_that_starts_at_once(self, tmp_path: Path) -> None:
        rows = self.run(tmp_path, **{"profile.steps": "[1, 2]"})
        assert [row["memory"]["step"] for row in rows if "memory" in row] == [3]

    def test_a_step_that_fails_leaves_its_rows(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError):
            self.run(tmp_path, fail_at=3, **{"profile.steps": "[2, 5]"})
        rows = [json.loads(line) for line in (tmp_path / "events.rank0.jsonl").read_text().splitlines()]
        assert {row[1] for row in rows if isinstance(row, list)} == {2, 3}
        assert not any("end" in row for row in rows)

    def test_what_is_measured_last_cannot_fail_the_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_memory(*_: object) -> None:
            raise MemoryError("3 GiB")

        monkeypatch.setattr("dist_gpt.profile.recorder.kernel_facts", no_memory)
        rows = self.run(tmp_path, **{"profile.steps": "[2, 3]"})
        assert rows[-2] == {"kernels_failed": {"error": "MemoryError: 3 GiB"}} and "end" in rows[-1]

    def test_a_full_disk_does_not_hide_what_failed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("dist_gpt.events.EventFile.rows", full)
        with pytest.raises(ZeroDivisionError):
            self.run(tmp_path, fail_at=2, **{"profile.steps": "[2, 5]"})

    def test_torch_profiler(self, tmp_path: Path) -> None:
        rows = self.run(tmp_path, **{"profile.steps": "[2, 3]", "profile.torch": "true"})
        (fact,) = [row["torch_trace"] for row in rows if "torch_trace" in row]
        assert [step for step, _ in fact["anchors"]] == [2, 3] and (tmp_path / fact["file"]).stat().st_size > 0


def test_no_secret_is_told() -> None:
    environ = {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "1", "SLURM_JWT": "x", "HOME": "/root", "CUDA_API_KEY": "x",
               "SLURM_PASSWD": "x", "NCCL_CREDENTIALS": "x", "GLOO_AUTH": "x"}  # fmt: skip
    assert told(environ) == {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "1"}


def test_a_record_completes_once() -> None:
    record = Record("tp", "all_reduce", 8, 0, issue=1)
    record.complete()
    assert record.done > 0
