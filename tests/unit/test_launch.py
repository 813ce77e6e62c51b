"""Starting, following and ending the ranks of a job; the ranks are small Python programs without torch."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.load import load
from dist_gpt.layout import Layout
from launch import env, run
from launch.spec import WORKER, JobSpec, train_argv
from launch.starters.local import launch_local
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
LONG_S = 2 * PATIENCE_S  # a rank that is meant to be ended sleeps this long


def program(tmp_path: Path, body: str) -> tuple[str, ...]:
    """The command of a rank that runs `body`, through the real entry of a rank."""
    header = """
        import json, os, signal, socket, subprocess, sys, time
        from pathlib import Path
        rank, here = int(os.environ["RANK"]), Path(__file__).parent
        def wait_for(name):
            while not (here / name).exists():
                time.sleep(0.005)
    """
    file = tmp_path / "rank_program.py"
    file.write_text(textwrap.dedent(header) + textwrap.dedent(body))
    return (sys.executable, *WORKER, str(file))


def job(tmp_path: Path, body: str, ranks: int = 3, **more: object) -> JobSpec:
    layout = Layout(pp=ranks, dp=1, cp=1, tp=1)
    return JobSpec(program(tmp_path, body), ranks, tmp_path / "logs", layout=layout, **more)  # type: ignore[arg-type]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Ended; a zombie whose parent (here: whatever adopts orphans) has not looked yet counts as ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pids(tmp_path: Path) -> list[int]:
    """Process ids that rank programs left as files pid.*"""
    return [int(text) for file in tmp_path.glob("pid.*") if (text := file.read_text())]


WRITE_PID = "(here / f'pid.{rank}').write_text(str(os.getpid()))\n"


class TestSuccess:
    def test_torchruns_variables_logs_and_live_output(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        body = """
            names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR OMP_NUM_THREADS GIVEN".split()
            print(json.dumps([os.environ[n] for n in names]))
            print(f"error stream of {rank}", file=sys.stderr)
        """
        assert launch_local(job(tmp_path, body, env={"GIVEN": "yes"})) == 0
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        for rank in range(3):
            lines = (tmp_path / "logs" / f"rank{rank}.log").read_text().splitlines()
            expected = [str(rank), str(rank), "3", "3", "0", "127.0.0.1", threads, "yes"]
            assert sorted(lines) == sorted([json.dumps(expected), f"error stream of {rank}"])
        shown = capfd.readouterr()
        assert [json.loads(line)[0] for line in shown.out.splitlines()] == ["0"], "only rank 0 is shown"
        assert shown.err == ""

    def test_one_thread_by_default(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        body = "sys.exit(0 if os.environ['OMP_NUM_THREADS'] == '1' else 1)"
        assert launch_local(job(tmp_path, body, ranks=1)) == 0

    def test_json_keeps_stdout_free(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        assert launch_local(job(tmp_path, "print('progress')", ranks=2, live_on_stderr=True)) == 0
        shown = capfd.readouterr()
        assert (shown.out, shown.err) == ("", "progress\n")

    def test_logs_are_appended_to(self, tmp_path: Path) -> None:
        for _ in range(2):
            assert launch_local(job(tmp_path, "print('attempt')", ranks=2)) == 0
        for rank in range(2):
            assert (tmp_path / "logs" / f"rank{rank}.log").read_text() == "attempt\nattempt\n"

    def test_rank_0_inherits_the_listening_socket_and_nobody_else(self, tmp_path: Path) -> None:
        body = """
            port = int(os.environ["MASTER_PORT"])
            if rank == 0:
                server = socket.socket(fileno=int(os.environ["DIST_GPT_STORE_FD"]))
                assert server.getsockname() == ("127.0.0.1", port)
                server.settimeout(120)
                for _ in range(2):
                    peer, _ = server.accept()
                    peer.sendall(b"welcome")
            else:
                assert "DIST_GPT_STORE_FD" not in os.environ
                with socket.create_connection(("127.0.0.1", port), timeout=120) as peer:  # may come before accept
                    assert peer.recv(7) == b"welcome"
        """
        assert launch_local(job(tmp_path, body)) == 0

    def test_what_a_rank_leaves_running_is_ended(self, tmp_path: Path) -> None:
        body = f"""
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep({LONG_S})"])
            (here / f"pid.{{rank}}").write_text(str(child.pid))
        """
        assert launch_local(job(tmp_path, body, ranks=2)) == 0
        assert len(pids(tmp_path)) == 2
        wait_until(lambda: all(map(gone, pids(tmp_path))), "children of ranks ended")


class TestDeath:
    def test_killed_rank_is_named_with_the_end_of_its_log(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        body = WRITE_PID + textwrap.dedent(f"""
            if rank == 1:
                wait_for("pid.0"); wait_for("pid.2")
                for i in range(50):
                    print(f"line {{i}}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep({LONG_S})
        """)
        assert launch_local(job(tmp_path, body)) == 1
        assert all(map(gone, pids(tmp_path))) and len(pids(tmp_path)) == 3
        lines = capfd.readouterr().err.splitlines()
        assert lines[0] == "rank 1 (pp 1, dp 0, cp 0, tp 0) died: killed by SIGKILL"
        assert [line for line in lines if line.startswith("  | ")] == [f"  | line {i}" for i in range(30, 50)]
        assert not any("failed after it" in line for line in lines)

    def test_those_that_fail_because_of_it_are_not_blamed(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        body = f"""
            if rank == 2:
                (here / "died").touch()
                raise RuntimeError("the culprit's own words")
            wait_for("died")
            if rank == 0:
                time.sleep(0.2)
                sys.exit("connection reset by peer")
            time.sleep({LONG_S})
        """
        assert launch_local(job(tmp_path, body)) == 1
        error = capfd.readouterr().err
        assert error.startswith("rank 2 (pp 2, dp 0, cp 0, tp 0) died: exit code 1\n")
        assert "  | RuntimeError: the culprit's own words\n" in error and "connection reset" not in error
        assert error.endswith("failed after it: rank 0\n")

    def test_a_slow_leaver_is_still_the_culprit(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """The rank that failed first needs longer to leave than the ranks that failed because of it."""
        body = """
            record = {"time": time.time() + rank, "error": "x"}
            Path(os.environ["DIST_GPT_ERROR_FILE"]).write_text(json.dumps(record))
            (here / f"failed.{rank}").touch()
            wait_for("failed.0"); wait_for("failed.1")
            time.sleep(0.0 if rank else 0.3)
            sys.exit(1)
        """
        assert launch_local(job(tmp_path, body, ranks=2)) == 1
        assert capfd.readouterr().err.startswith("rank 0 (pp 0, dp 0, cp 0, tp 0) died: exit code 1\n")

    def test_a_killed_rank_is_blamed_before_the_error_it_caused(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """A killed process closes its connections before its parent is told."""
        body = """
            if rank == 0:
                wait_for("failed")
                os.kill(os.getpid(), signal.SIGKILL)
            record = {"time": time.time(), "error": "reset"}
            Path(os.environ["DIST_GPT_ERROR_FILE"]).write_text(json.dumps(record))
            (here / "failed").touch()
            sys.exit(1)
        """
        assert launch_local(job(tmp_path, body, ranks=2)) == 1
        assert capfd.readouterr().err.startswith("rank 0 (pp 0, dp 0, cp 0, tp 0) died: killed by SIGKILL\n")

    @pytest.mark.parametrize(("code", "expected"), [(2, 2), (75, 75), (1, 1), (7, 1)])
    def test_exit_codes(self, code: int, expected: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        assert launch_local(job(tmp_path, f"sys.exit({code})", ranks=2)) == expected
        assert ("died" in capfd.readouterr().err) == (code != 75)

    def test_the_tail_is_of_this_attempt(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "rank0.log").write_text("an earlier attempt\n")
        assert launch_local(job(tmp_path, "sys.exit(1)", ranks=1)) == 1
        assert "an earlier attempt" not in capfd.readouterr().err

    def test_a_rank_that_ignores_sigterm_is_killed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("launch.starters.local.TERM_S", 0.2)
        body = WRITE_PID + textwrap.dedent(f"""
            if rank == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                (here / "deaf").touch()
                time.sleep({LONG_S})
            wait_for("deaf")
            sys.exit(1)
        """)
        assert launch_local(job(tmp_path, body, ranks=2)) == 1
        assert all(map(gone, pids(tmp_path)))

    def test_a_command_that_cannot_be_started(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            launch_local(JobSpec((str(tmp_path / "no-such-python"), *WORKER, "x"), 2, tmp_path / "logs"))
        with pytest.raises(ValueError, match="begin with PYTHON -m launch.rank.worker"):
            launch_local(JobSpec(("./a.out",), 2, tmp_path / "logs"))


class TestLauncherEnds:
    """The launcher is a process of its own here: it gets the signal."""

    @pytest.fixture
    def launcher(self, tmp_path: Path) -> subprocess.Popen[bytes]:
        argv = program(tmp_path, WRITE_PID + f"time.sleep({LONG_S})")
        code = (
            "import signal, sys; from pathlib import Path; from launch.starters.local import launch_local; "
            "from launch.spec import JobSpec; "
            # tests that run in the background or under nohup inherit ignored signals, which the launcher respects
            "signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL); "
            f"sys.exit(launch_local(JobSpec(tuple({list(argv)!r}), 3, Path({str(tmp_path / 'logs')!r}))))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
        )
        wait_until(lambda: len(pids(tmp_path)) == 3, "three ranks run")
        return process

    @pytest.mark.parametrize(
        ("number", "code"),
        [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
        ids=["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"],
    )
    def test_no_process_is_left(
        self, launcher: subprocess.Popen[bytes], number: int, code: int, tmp_path: Path
    ) -> None:
        ranks = pids(tmp_path)
        launcher.send_signal(number)
        assert launcher.wait(PATIENCE_S) == code
        wait_until(lambda: all(map(gone, ranks)), "every rank ended")

    def test_a_worker_whose_launcher_is_gone_does_not_start(self, tmp_path: Path) -> None:
        argv = program(tmp_path, "(here / 'ran').touch()")
        environ = {**os.environ, "DIST_GPT_LAUNCHER_PID": "1", "RANK": "0"}  # not our child: its parent is this test
        assert subprocess.run(argv, cwd=ROOT, env=environ, check=False).returncode == 1
        assert not (tmp_path / "ran").exists()


class TestRunDirectory:
    @pytest.fixture
    def overrides(self, tmp_path: Path) -> list[str]:
        return [f"run_dir={tmp_path / 'r'}"]

    def test_made_once_never_written_over(self, overrides: list[str], tmp_path: Path) -> None:
        config = load("demo", overrides)
        made = run.create_run_dir(config, {"schema": 1})
        assert load(str(made / "config.yaml")) == config
        assert json.loads((made / "plan.json").read_text()) == {"schema": 1}
        before = {file: file.stat().st_mtime_ns for file in made.rglob("*")}
        (tmp_path / "r-2").mkdir()
        with pytest.raises(ConfigError, match=r"r already exists.*--set run_dir=\S*r-3"):
            run.create_run_dir(config, {})
        assert {file: file.stat().st_mtime_ns for file in made.rglob("*")} == before

    def test_job_of_the_demo(self, overrides: list[str], tmp_path: Path) -> None:
        config = load("demo", overrides)
        spec = run.job_of(config, tmp_path / "r", env.choose_device(8, 0))
        assert (spec.ranks, spec.nodes, spec.argv) == (8, 1, train_argv(tmp_path / "r" / "config.yaml"))
        assert spec.rank_name(3) == "rank 3 (pp 0, dp 1, cp 0, tp 1)"
        assert spec.env["CUDA_VISIBLE_DEVICES"] == "", "the user was told CPU"
        assert "CUDA_VISIBLE_DEVICES" not in run.job_of(config, tmp_path, env.choose_device(8, 8)).env

    @pytest.mark.parametrize(("inherited", "given", "gloo", "nccl"), [
        ({}, {}, "hsn0", "hsn0"),
        ({"NCCL_SOCKET_IFNAME": "hsn"}, {}, "hsn0", None),  # as slurm/*.sbatch export it: all cards of the node
        ({"GLOO_SOCKET_IFNAME": "ib0"}, {"NCCL_SOCKET_IFNAME": "hsn1"}, None, "hsn1"),
    ])  # fmt: skip
    def test_the_interface_is_for_what_nothing_else_is_said_of(
        self, inherited: dict[str, str], given: dict[str, str], gloo: str | None, nccl: str | None,
        overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in inherited.items():
            monkeypatch.setenv(name, value)
        sets = [*overrides, "launch.interface=hsn0", f"launch.env={json.dumps(given)}"]
        found = run.job_of(load("demo", sets), tmp_path / "r", env.choose_device(8, 8)).env
        assert (found.get("GLOO_SOCKET_IFNAME"), found.get("NCCL_SOCKET_IFNAME")) == (gloo, nccl)

    def test_a_verdict_never_spoils_a_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(folder: Path) -> None:
            raise ZeroDivisionError("of all things")

        assert run.verdict(tmp_path).startswith("none (RunError: ")
        monkeypatch.setattr("dist_gpt.report.write.read_document", broken)
        assert run.verdict(tmp_path) == "none (ZeroDivisionError: of all things)"
        monkeypatch.setattr("launch.run.QUICKLY_READ_BYTES", 3)
        (tmp_path / "events.rank0.jsonl").write_text("much")
        assert f"dist-gpt report {tmp_path}" in run.verdict(tmp_path)

    def test_summary(self, tmp_path: Path) -> None:
        rows: list[dict[str, object]] = [{"step": 0, "val_loss": 5.0}]
        rows += [{"step": k, "loss": 6.0 - k, "tokens_per_s": 10.0 * k, "step_s": 0.1} for k in (1, 2, 3)]
        rows[-1]["val_loss"] = 2.0
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = run.summary(tmp_path)
        assert found == {"steps": 3, "skipped": 0, "skipped_why": None, "loss": [5.0, 3.0], "val_loss": [5.0, 2.0],
                         "tokens_per_s": 20.0, "step_s": 0.1}  # fmt: skip
        assert "5.0000 -> 2.0000  (0.40 x the initial)" in run.summary_text(found)
        assert run.summary_text(found).startswith("3 steps done\n")

    def test_summary_of_a_run_that_skipped(self, tmp_path: Path) -> None:
        rows: list[dict[str, object]] = [{"step": 0, "val_loss": 5.0}, {"step": 1, "loss": 5.0, "step_s": 0.1}]
        rows += [{"step": k, "loss": None, "grad_norm": None, "step_s": 0.1, "skipped": True} for k in (2, 3)]
        rows[-1]["val_loss"] = None
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = run.summary(tmp_path)
        assert (found["steps"], found["skipped"], found["step_s"]) == (3, 2, 0.1)
        first, loss, validation, *_ = run.summary_text(found).splitlines()
        assert first == ("1 step trained, 2 of 3 steps skipped (loss not finite); "
                         "the validation loss after step 3 is not finite")  # fmt: skip
        assert loss.endswith("5.0000 -> 5.0000") and validation == "validation loss  5.0000 -> not finite"


class TestGpus:
    @pytest.fixture
    def fake_smi(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        tool = tmp_path / "nvidia-smi"
        tool.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: NVIDIA X (UUID: GPU-$i)"; done\n')
        tool.chmod(0o755)
        monkeypatch.setattr(env, "torch_is_cpu_build", lambda: False)
        return {"PATH": str(tmp_path)}

    @pytest.mark.parametrize(("visible", "count"), [(None, 4), ("0,1", 2), ("", 0), ("1,-1,2", 1), ("0,1,2,3,4", 4)])
    def test_counted(self, fake_smi: dict[str, str], visible: str | None, count: int) -> None:
        environ = fake_smi | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
        assert env.count_gpus(environ) == count

    def test_a_cpu_build_of_torch_sees_none(self, fake_smi: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(env, "torch_is_cpu_build", lambda: True)
        assert env.count_gpus(fake_smi) == 0

    @pytest.mark.parametrize(
        ("ranks", "gpus", "kind", "words"),
        [(8, 0, "cpu", "no GPU found: gloo on CPU"), (4, 8, "cuda", "NCCL"), (8, 1, "cpu", "8 ranks need one each")],
    )
    def test_said(self, ranks: int, gpus: int, kind: str, words: str) -> None:
        device = env.choose_device(ranks, gpus)
        assert device.kind == kind and words in device.sentence

    def test_the_world_follows_the_gpus_unless_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run, "count_gpus", lambda: 9)
        sets = ["parallel.dp=auto", "parallel.tp=2", "parallel.pp=2"]
        config, device = run.load_for_launch("demo", sets)
        assert (config.world_size, config.parallel.dp, device.kind) == (8, 2, "cuda")
        config, device = run.load_for_launch("demo", [*sets, "parallel.dp=1"])
        assert (config.world_size, device.kind) == (4, "cuda")
        config, _ = run.load_for_launch("demo", [*sets, "launch.ranks_per_node=4"])
        assert config.world_size == 4


def test_a_killed_ranks_progress_bar_is_taken_away(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
        print("\\x1b[?25lbar 1\\r\\x1b[2Kstep 1\\nbar 2", end="", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert launch_local(job(tmp_path, body, ranks=1)) == 1
    assert (tmp_path / "logs" / "rank0.log").read_text() == "step 1\n"
    assert capfd.readouterr().out.endswith("bar 2\r\x1b[2K\x1b[?25h")


def test_a_closed_live_stream_does_not_stop_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    monkeypatch.setattr(closed, "isatty", lambda: False)
    monkeypatch.setattr(closed, "write", lambda text: (_ for _ in ()).throw(BrokenPipeError()))
    monkeypatch.setattr(sys, "stdout", closed)
    assert launch_local(job(tmp_path, "print('a'); print('b')", ranks=1)) == 0
    assert (tmp_path / "logs" / "rank0.log").read_text() == "a\nb\n"
