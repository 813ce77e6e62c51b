"""The process from which the ranks of this machine are forked: what it imports, says and leaves."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from launch.spec import WORKER, JobSpec
from launch.starters.forkserver import Order, Place
from launch.starters.local import LocalRanks, launch_local
from tests.unit.test_launch import LONG_S, WRITE_PID, gone, job, pids, wait_until

SLOW = "slow_to_import"


def started(spec: JobSpec) -> LocalRanks:
    spec.log_dir.mkdir()
    ranks = LocalRanks(spec)
    ranks.start({})
    return ranks


def finds(folder: Path) -> dict[str, str]:
    """Environment in which modules in `folder` can be imported."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))}


def server_of(ranks: LocalRanks) -> psutil.Process:
    assert ranks.server is not None
    return psutil.Process(ranks.server.pid)


def test_an_order_is_read_as_it_was_sent() -> None:
    order = Order(7, ("python", *WORKER, "a", "ü\n"), ("torch",), (Place({"RANK": "0"}, 4, 5, (6,)), Place({}, 7, 7)))
    assert Order.of(order.line()) == order and order.line().count(b"\n") == 1
    assert order.descriptors() == {4, 5, 6, 7}


@pytest.mark.skipif(sys.platform != "linux", reason="forks in place on Linux alone")
def test_what_is_preloaded_is_imported_once(tmp_path: Path) -> None:
    """Each rank has the module, and none has imported it itself."""
    (tmp_path / "counted.py").write_text(
        f"from pathlib import Path\nwith open({str(tmp_path / 'imports')!r}, 'a') as file:\n    file.write('x')\n"
    )
    body = "import counted\nassert 'counted' in sys.modules\n(here / f'had.{rank}').touch()\n"
    assert launch_local(job(tmp_path, body, preload=("counted", "no_such_module"), env=finds(tmp_path))) == 0
    assert (tmp_path / "imports").read_text() == "x" and len(list(tmp_path.glob("had.*"))) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="forks in place on Linux alone")
def test_a_rank_is_executed_anew_where_a_thread_runs(tmp_path: Path) -> None:
    """A forked process has only the thread that forked it: locks that others held stay locked."""
    thread = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
    (tmp_path / "threaded.py").write_text(f"import threading\n{thread}\n")
    (tmp_path / "lone.py").write_text("")
    for module, anew in (("threaded", True), ("lone", False)):
        body = f"""
            assert ({module!r} not in sys.modules) == {anew}, sys.modules.keys()
            assert ("launch.starters.forkserver" in sys.orig_argv) == {not anew}, sys.orig_argv
            if rank == 0:
                socket.socket(fileno=int(os.environ["DIST_GPT_STORE_FD"])).close()
            print("told")
        """
        assert launch_local(job(tmp_path, body, preload=(module,), env=finds(tmp_path))) == 0
        assert (tmp_path / "logs" / "rank1.log").read_text().splitlines()[-1] == "told"


def test_ranks_are_named_and_found_by_their_command(tmp_path: Path) -> None:
    ranks = started(job(tmp_path, WRITE_PID + f"time.sleep({LONG_S})"))
    try:
        wait_until(lambda: len(pids(tmp_path)) == 3, "three ranks run")
        for rank in ranks.ranks:
            assert rank.pid is not None
            found = psutil.Process(rank.pid)
            assert os.getsid(rank.pid) == rank.pid and found.ppid() == server_of(ranks).pid
            assert str(tmp_path / "rank_program.py") in found.cmdline()
            if sys.platform == "linux":
                assert found.name() == f"rank{rank.rank}"  # no space: Slurm's linuxproc could not read it
    finally:
        ranks.end()
    assert all(map(gone, pids(tmp_path))) and not ranks.running()


def test_ranks_end_with_a_killed_fork_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = job(tmp_path, WRITE_PID + f"time.sleep({LONG_S})")
    killed = threading.Thread(target=lambda: (wait_until(lambda: len(pids(tmp_path)) == 3, "three ranks run"),
                                              psutil.Process(pids(tmp_path)[0]).parent().kill()))  # fmt: skip
    killed.start()
    assert launch_local(spec) == 1
    killed.join()
    assert all(map(gone, pids(tmp_path)))
    assert "rank 0 (pp 0, dp 0, cp 0, tp 0) died: the fork server ended: killed by SIGKILL" in capfd.readouterr().err


def test_a_job_that_is_ended_while_modules_are_imported(tmp_path: Path) -> None:
    (tmp_path / f"{SLOW}.py").write_text(
        f"import time\nfrom pathlib import Path\nPath({str(tmp_path / 'importing')!r}).touch()\ntime.sleep({LONG_S})\n"
    )
    ranks = started(job(tmp_path, "(here / 'ran').touch()", preload=(SLOW,), env=finds(tmp_path)))
    wait_until((tmp_path / "importing").exists, "the module is being imported")
    server = server_of(ranks)
    assert ranks.running()
    ranks.end()
    assert not ranks.running() and gone(server.pid) and not (tmp_path / "ran").exists()
    assert ranks.code() != 0


def test_a_fork_server_that_fails_is_reported_with_its_own_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As with a broken installation."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").write_text("raise ImportError('half installed')")
    spec = JobSpec((sys.executable, *WORKER, "x"), 2, tmp_path / "logs", env={"PYTHONPATH": str(tmp_path)})
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert launch_local(spec) == 1
    finally:
        os.chdir(here)
    told = capfd.readouterr().err
    assert "rank 0 died: exit code 1" in told and "ImportError: half installed" in told


def test_a_process_number_is_kept_until_the_launcher_knows(tmp_path: Path) -> None:
    """While the launcher does not listen, an ended rank stays a zombie: its number is nobody else's."""
    ranks = started(job(tmp_path, WRITE_PID + "wait_for('end')", ranks=2))
    wait_until(lambda: len(pids(tmp_path)) == 2, "both run")
    first = ranks.ranks[0]
    assert first.pid is not None
    with first.lock:  # to note its end the launcher has to wait for it
        (tmp_path / "end").touch()
        wait_until(lambda: not first.is_there(), "rank 0 has ended")
        assert psutil.Process(first.pid).ppid() == server_of(ranks).pid
    wait_until(lambda: not ranks.running(), "both ends are known")
    ranks.end()
    assert [r.code for r in ranks.ranks] == [0, 0]
    assert ranks.server is not None and ranks.server.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_every_process_ends_no_rank_before_its_time(number: signal.Signals, tmp_path: Path) -> None:
    """As Slurm sends its warning to a whole step. The rank has its own way to deal with it, and the server none."""
    body = f"""
        came = []
        signal.signal({int(number)}, lambda *_: came.append(1))
        {WRITE_PID}
        while not came:
            time.sleep(0.01)
        wait_for("go on")
        sys.exit(75)
    """
    ranks = started(job(tmp_path, body, ranks=2))
    wait_until(lambda: len(pids(tmp_path)) == 2, "both run")
    for pid in (server_of(ranks).pid, *pids(tmp_path)):
        os.kill(pid, number)
    time.sleep(0.1)
    (tmp_path / "go on").touch()
    wait_until(lambda: not ranks.running(), "both have left")
    ranks.end()
    assert [(r.code, r.lost) for r in ranks.ranks] == [(75, ""), (75, "")]


def test_ranks_have_the_launchers_ways_with_signals(tmp_path: Path) -> None:
    """What the fork server ignores for itself, and blocks while it forks, is neither in the ranks."""
    body = """
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, signal.getsignal(signal.SIGTERM)
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    """
    assert launch_local(job(tmp_path, body)) == 0


def test_a_stopped_fork_server_does_not_keep_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.starters.local.GONE_S", 0.2)
    ranks = started(job(tmp_path, WRITE_PID + f"time.sleep({LONG_S})", ranks=2))
    wait_until(lambda: len(pids(tmp_path)) == 2, "both run")
    server_of(ranks).suspend()
    ranks.end()
    assert all(map(gone, pids(tmp_path))) and not ranks.running()


def test_a_process_that_a_module_has_left_running_is_no_rank(tmp_path: Path) -> None:
    (tmp_path / "leaves_one.py").write_text(
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(0.3)'])\n"
    )
    ranks = started(job(tmp_path, WRITE_PID + "wait_for('end')", preload=("leaves_one",), env=finds(tmp_path)))
    wait_until(lambda: len(pids(tmp_path)) == 3, "all run")
    wait_until(lambda: len(server_of(ranks).children()) == 3, "the other one has ended")
    (tmp_path / "end").touch()
    wait_until(lambda: not ranks.running(), "all have left")
    ranks.end()
    assert [(r.code, r.lost) for r in ranks.ranks] == [(0, "")] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="forks in place on Linux alone")
def test_numpys_threads_do_not_keep_ranks_from_being_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    body = "assert 'numpy' in sys.modules and 'OPENBLAS_NUM_THREADS' not in os.environ\n"
    assert launch_local(job(tmp_path, body, preload=("numpy",))) == 0


def test_signals_reach_what_a_rank_has_started(tmp_path: Path) -> None:
    body = WRITE_PID + textwrap.dedent(f"""
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep({LONG_S})"])
        (here / f"pid.child{{rank}}").write_text(str(child.pid))
        child.wait()
        time.sleep({LONG_S})
    """)
    ranks = started(job(tmp_path, body, ranks=1))
    wait_until(lambda: len(pids(tmp_path)) == 2, "the rank and its child run")
    ranks.ranks[0].signal(signal.SIGTERM)
    wait_until(lambda: all(map(gone, pids(tmp_path))), "both have ended")
    ranks.end()
    assert ranks.ranks[0].code == -signal.SIGTERM
