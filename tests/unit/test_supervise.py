"""The supervisor over programs that start ranks as srun and torchrun do; ranks are small programs without torch."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_gpt.awake import AwakeClock
from launch.monitor import supervisor as module
from launch.monitor.supervisor import Supervisor, hello_patience, say, supervise
from launch.rank import worker
from launch.spec import WORKER, JobSpec
from launch.starters.command import CommandRanks
from launch.starters.mpi import OURS
from tests.ranks.runs import end

ROOT = Path(__file__).resolve().parents[2]
STARTER = """
    import os, signal, subprocess, sys, time
    kind, world, *command = sys.argv[1:]
    places = ({"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} for r in range(int(world)))
    ranks = [subprocess.Popen(command, env={**os.environ, **place}) for place in places]
    while any(rank.poll() is None for rank in ranks):  # srun waits for all; torchrun ends the others
        if kind == "torchrun" and any(rank.poll() for rank in ranks):
            [rank.terminate() for rank in ranks]
        time.sleep(0.01)
    sys.exit(max(abs(rank.returncode) for rank in ranks))
"""
RANK = """
    import json, os, signal, socket, sys, time
    from pathlib import Path
    rank, here = int(os.environ["RANK"]), Path(__file__).parent
    def said(name):
        (here / name).touch()
    def wait_for(name):
        while not (here / name).exists():
            time.sleep(0.005)
    class Pulse:
        def __init__(self):
            self.line = socket.socket(fileno=int(os.environ.pop("DIST_GPT_WATCH_FD")))
        def say(self, **message):
            self.line.sendall(json.dumps(message).encode() + b"\\n")
        def beat(self):
            self.say(beat={"step": 1, "phase": "train", "state": "computing", "counts": [], "calls": 0})
        def told(self):
            return json.loads(self.line.makefile("rb", buffering=0).readline())
"""


def job(folder: Path, body: str, ranks: int = 2, **more: Any) -> JobSpec:
    file = folder / "rank_program.py"
    file.write_text(textwrap.dedent(RANK) + textwrap.dedent(body))
    (folder / "logs").mkdir(exist_ok=True)
    values = {"saves": True, "watched": True, "timeout_s": 30.0, **more}
    return JobSpec((sys.executable, *WORKER, str(file)), ranks, folder / "logs", **values)


def starter(spec: JobSpec, kind: str = "srun") -> CommandRanks:
    argv = [sys.executable, "-c", textwrap.dedent(STARTER), kind, str(spec.ranks), *spec.argv]
    return CommandRanks(argv, {"PYTHONPATH": str(ROOT)}, spec.log_dir / f"{kind}.log")


def run(spec: JobSpec, kind: str = "srun") -> int:
    return supervise(spec, starter(spec, kind), "127.0.0.1")


@pytest.mark.parametrize("kind", ["srun", "torchrun"])
@pytest.mark.parametrize(("end", "code", "words"), [
    ("raise ImportError('no module x')", 1, "exited with code 1: ImportError: no module x"),
    ("sys.exit('dist-gpt: no such option')", 1, "exited with code 1: dist-gpt: no such option"),
    ("sys.exit(2)", 2, "exited with code 2"),
    ("sys.exit(7)", 1, "exited with code 7"),
])  # fmt: skip
def test_a_failure_before_the_pulse_is_the_first_one(
    kind: str, end: str, code: int, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 1's; under torchrun rank 0 is killed for it, and its connection closes without a word."""
    body = f"""
        if rank == 1:
            wait_for("there")
            print("the culprit's own words", flush=True)
            {end}
        said("there")
        time.sleep(60 if {kind == "torchrun"} else 0.1)
    """
    assert run(job(tmp_path, body), kind) == code
    error = capfd.readouterr().err
    assert re.match(rf"rank 1 on \S+, pid \d+, failed: {re.escape(words)}\n", error), error
    assert "  | the culprit's own words\n" in error and "rank 0 on" not in error
    ended = json.loads((tmp_path / "exit.json").read_text())
    assert ended["code"] == code and words in ended["why"]


def test_a_log_holds_what_says_something(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The traceback from the program on; none where the error's text explains it."""
    body = """
        def deep():
            raise KeyError("deep") from ValueError("cause")
        deep()
    """
    assert run(job(tmp_path, body, ranks=1)) == 1
    log = (tmp_path / "logs" / "rank0.log").read_text()
    assert "KeyError: 'deep'" in log and "ValueError: cause" in log and ", in deep" in log
    assert "runpy" not in log and "worker.py" not in log and log.count("Traceback") == 1
    (tmp_path / "logs" / "rank0.log").unlink()
    explained = "from dist_gpt.config.errors import ConfigError\nraise ConfigError(['lower optim.lr'])"
    assert run(job(tmp_path, explained, ranks=1)) == 1
    assert (tmp_path / "logs" / "rank0.log").read_text().splitlines()[-1] == "dist-gpt: lower optim.lr"
    assert "Traceback" not in (tmp_path / "logs" / "rank0.log").read_text()
    assert "exited with code 1: ConfigError: lower optim.lr" in capfd.readouterr().err


STAYS = """
    import os, subprocess, sys, time
    place = {"RANK": "1", "WORLD_SIZE": "two"}
    subprocess.run(sys.argv[1:], env={**os.environ, **place})
    time.sleep(60)
"""


def test_a_rank_that_finds_no_place_ends_the_waiting(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It never says hello, and who started it may stay: the launcher reads what it wrote down, and guesses nothing."""
    spec = job(tmp_path, "said('ran')")
    argv = [sys.executable, "-c", textwrap.dedent(STAYS), *spec.argv]
    begun = time.monotonic()
    assert supervise(spec, CommandRanks(argv, {"PYTHONPATH": str(ROOT)}, spec.log_dir / "srun.log"), "127.0.0.1") == 2
    assert time.monotonic() - begun < spec.timeout_s / 2 and not (tmp_path / "ran").exists()
    first, *rest = capfd.readouterr().err.splitlines()
    assert "WORLD_SIZE" in first and "'two'" in first, first
    assert not any("reported to the launcher" in line for line in rest)


def test_what_the_starter_said_comes_before_guesses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = job(tmp_path, "")
    (spec.log_dir / "srun.log").write_text("srun: of an earlier attempt\n")
    argv = [sys.executable, "-c", "import sys; sys.exit('srun: error: More processors requested than permitted')"]
    assert supervise(spec, CommandRanks(argv, {}, spec.log_dir / "srun.log"), "127.0.0.1") == 2
    said = capfd.readouterr().err
    assert said.splitlines()[:2] == [f"end of {spec.log_dir / 'srun.log'}:",
                                     "  | srun: error: More processors requested than permitted"]  # fmt: skip
    assert "reported to the launcher" in said.splitlines()[2]  # which ranks, by node
    assert said.count("More processors") == 1


def test_slurms_warning_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert module._meaning("SIGUSR1") == ""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "the job's time is nearly over" in module._meaning("SIGUSR1") and module._meaning("SIGTERM") == ""


def test_its_last_words_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
        record = {"time": time.time(), "error": "ConfigError: launch.nodes is odd"}
        Path(os.environ["DIST_GPT_ERROR_FILE"]).write_text(json.dumps(record))
        sys.exit(2)
    """
    assert run(job(tmp_path, body, ranks=1)) == 2
    assert "failed: exited with code 2 (ConfigError: launch.nodes is odd)" in capfd.readouterr().err


@pytest.mark.parametrize("why", ["the accounting differs", None])
def test_when_all_take_their_leave_nothing_is_started_again(
    why: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The next attempt would resume after the last step, train nothing, and say 0. A bad end has a word, too."""
    body = f"""
        with open(here / "starts", "a") as file:
            file.write(str(rank))
        if {why!r} and rank == 0:
            (here / "exit.json").write_text(json.dumps({{"code": 1, "why": {why!r}}}))
        Pulse().say(bye={{"code": 1}})
        sys.exit(1)
    """
    assert run(job(tmp_path, body, max_restarts=3)) == 1
    assert sorted((tmp_path / "starts").read_text()) == ["0", "1"]
    assert f"the ranks exited with code 1: {why or 'no rank gave a reason'}\n" in capfd.readouterr().err


def test_a_rank_that_dies_is_started_again(tmp_path: Path) -> None:
    body = """
        pulse = Pulse()
        if not (here / "again").exists():
            if rank == 0:
                said("again")
                os.kill(os.getpid(), signal.SIGKILL)
            wait_for("never")
        pulse.say(bye={"code": 0})
    """
    assert run(job(tmp_path, body, max_restarts=1), "torchrun") == 0


def test_a_rank_that_comes_on_again_at_the_last_moment_leaves_no_zero(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is ended for its silence, and must not be called done."""
    monkeypatch.setattr(module, "GRACE_S", 1.5)
    body = """
        pulse = Pulse()
        pulse.beat()
        time.sleep(1.5)
        pulse.beat()
        while pulse.told()["do"] != "leave":
            time.sleep(0.1)
            pulse.beat()
    """
    assert run(job(tmp_path, body, ranks=1, silence_s=1.0)) == 1
    assert "is stopped: no heartbeat" in capfd.readouterr().err


ASKED = """
    import sys
    from pathlib import Path
    from tests.unit.test_supervise import job, run
    body = '''
        pulse = Pulse()
        pulse.beat()
        said(f"beats.{rank}")
        while pulse.told()["do"] != "stop":
            pass
        said(f"saved.{rank}")
        pulse.say(bye={"code": 75})
        sys.exit(75)
    '''
    sys.exit(run(job(Path(sys.argv[1]), body, timeout_s=60.0)))
"""


def test_a_launcher_whose_terminal_is_gone_has_its_ranks_save(tmp_path: Path) -> None:
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(ASKED), str(tmp_path)], cwd=ROOT,
                               stdout=write, stderr=write)  # fmt: skip
    os.close(write)
    try:
        until(lambda: all((tmp_path / f"beats.{rank}").exists() for rank in range(2)))
        os.close(read)  # whoever read it: what is written from now on fails with EPIPE
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    finally:
        process.kill()
        process.wait()
    assert all((tmp_path / f"saved.{rank}").exists() for rank in range(2))


SUSPENDED = """
    import sys
    from pathlib import Path
    from tests.unit.test_supervise import job, run
    body = '''
        pulse = Pulse()
        while not (here / "end").exists():
            pulse.beat()
            said(f"beats.{rank}")
            time.sleep(0.5)
        pulse.say(bye={"code": 0})
    '''
    sys.exit(run(job(Path(sys.argv[1]), body, timeout_s=60.0, silence_s=5.0)))
"""


@pytest.mark.parametrize("first", ["launcher", "ranks"])
def test_a_job_that_is_suspended_and_continued(first: str, tmp_path: Path) -> None:
    """Suspend for longer than a rank may be silent; continue some ranks later than others."""
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SUSPENDED), str(tmp_path)], cwd=ROOT,
                                   stderr=said)  # fmt: skip
    try:
        until(lambda: all((tmp_path / f"beats.{rank}").exists() for rank in range(2)))
        launcher = psutil.Process(process.pid)
        order = [launcher, *launcher.children(recursive=True)]
        order = order if first == "launcher" else order[::-1]
        for one in order:
            one.suspend()
        time.sleep(7.0)
        for one in order:
            one.resume()
            time.sleep(0.5)
        until(lambda: "suspended for" in (tmp_path / "said").read_text() or process.poll() is not None)
        (tmp_path / "end").touch()
        assert process.wait(30) == 0, (tmp_path / "said").read_text()
    finally:
        end(process)
        process.wait()
    assert re.search(r"this job was suspended for [6-9]\d* s; continuing", (tmp_path / "said").read_text())


def test_a_rank_waits_for_its_launchers_word_without_counting_suspensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both may be suspended for longer than a rank waits. What follows the command stays in the socket."""
    monkeypatch.setattr(worker, "LOOK_S", 0.01)
    readings = [0.0, 0.0, 1000.0, *(1000.0 + n / 2 for n in range(5000))]
    left = iter(readings)
    monkeypatch.setattr(worker, "AwakeClock", lambda: AwakeClock(lambda: next(left), lambda: 0.0))
    here, there = socket.socketpair()
    with here, there:
        assert worker._word(here) == {}  # never said, in GO_S of its own time
        assert next(left) + 5.0 > 1000.0 + worker.GO_S
        there.sendall(b'nonsense\n{"do": "ok"}\n{"do": "go"}\n{"do": "stop"}\n')
        left = iter([0.0, 0.0, *(5000.0 + n / 100 for n in range(5000))])
        assert worker._word(here) == {"do": "go"}
        assert here.recv(100) == b'{"do": "stop"}\n'
        there.close()
        left = iter([0.0] * 100)
        assert worker._word(here) == {}


def test_a_run_that_would_end_the_same_is_not_started_again(tmp_path: Path) -> None:
    """exit.json says what must be changed first."""
    body = """
        with open(here / "starts", "a") as file:
            file.write(str(rank))
        if rank == 0:
            end = {"code": 1, "why": "5 of 6 steps skipped", "step": 6, "change": "Lower optim.lr"}
            (here / "exit.json").write_text(json.dumps(end))
        Pulse().say(failed={"error": "DivergedError: 5 of 6 steps skipped", "inside": False, "position": None})
        time.sleep(0.3)
        sys.exit(1)
    """
    assert run(job(tmp_path, body, max_restarts=3)) == 1
    assert sorted((tmp_path / "starts").read_text()) == ["0", "1"]
    end = json.loads((tmp_path / "exit.json").read_text())
    assert end["change"] == "Lower optim.lr" and end["step"] == 6


def test_saying_something_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    closed = io.StringIO()
    closed.close()
    for stream in (Gone(), closed):
        monkeypatch.setattr(sys, "stderr", stream)
        say("word")


@pytest.mark.parametrize(("ranks", "timeout_s", "expected"), [(8, 300.0, 25.4), (2048, 300.0, 127.4), (8, 10.0, 10.0)])
def test_many_ranks_have_longer_to_come(ranks: int, timeout_s: float, expected: float, tmp_path: Path) -> None:
    assert hello_patience(JobSpec(("x",), ranks, tmp_path, timeout_s=timeout_s)) == pytest.approx(expected)


def test_mpirun_hands_on_all_that_the_supervisor_sets(tmp_path: Path) -> None:
    """Open MPI passes to other nodes what it is told to, and nothing else."""
    seen: dict[str, str] = {}

    class Noting(CommandRanks):
        def start(self, env: Any) -> None:
            seen.update(env)
            super().start(env)

    spec = job(tmp_path, "Pulse().say(bye={'code': 0})", ranks=1, env={"DIST_GPT_RUN_DIR": str(tmp_path)})
    argv = [sys.executable, "-c", textwrap.dedent(STARTER), "srun", "1", *spec.argv]
    ranks = Noting(argv, {"PYTHONPATH": str(ROOT)}, spec.log_dir / "srun.log")
    assert Supervisor(spec, ranks, "127.0.0.1").run() == 0
    assert {"DIST_GPT_WATCH", "DIST_GPT_CONFIG_HASH"} <= set(seen) <= set(OURS)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
