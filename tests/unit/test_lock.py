"""One launcher to a run directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dist_gpt.config.errors import ConfigError
from launch import lock
from tests.patience import PATIENCE_S


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def leave(folder: Path, age_s: float = 0.0, **changes: Any) -> Path:
    """A lock as another launcher leaves it, touched `age_s` ago."""
    path = folder / lock.FILE
    path.write_text(json.dumps({"host": "n7", "pid": 12, "began": 1.0, "job": None, "restarts": "0", **changes}))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def is_free(folder: Path) -> bool:
    try:
        lock.look(folder)
    except ConfigError:
        return False
    with lock.hold(folder):
        return True


def test_held_here_and_gone_afterwards(tmp_path: Path) -> None:
    with lock.hold(tmp_path):
        told = json.loads((tmp_path / "launcher.lock").read_text())
        assert told["pid"] == os.getpid() and told["job"] is None and set(told) >= {"host", "pid", "job"}
        where = f"process {os.getpid()} on {told['host']}"
        with pytest.raises(ConfigError, match=f"{where}.*end it .kill {os.getpid()} on .*remove {tmp_path}"):
            lock.look(tmp_path)
        with pytest.raises(ConfigError, match=where), lock.hold(tmp_path):
            pass
        assert os.listdir(tmp_path) == ["launcher.lock"], "who looks leaves nothing"
    assert os.listdir(tmp_path) == []
    lock.look(tmp_path)


def test_it_goes_with_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock.hold(tmp_path):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_launcher_that_was_killed_holds_nobody_up(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from launch.lock import hold\n"
        "with hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        os.utime(tmp_path / lock.FILE, (0, 0))  # it hangs, but it is there
        assert not is_free(tmp_path)
        process.kill()
        deadline = time.monotonic() + PATIENCE_S
        while not is_free(tmp_path):  # not waited for: it stays a zombie
            assert time.monotonic() < deadline
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("age_s", "free"), [(0.0, False), (20.0, False), (40.0, True)])
def test_on_another_host_the_age_counts(age_s: float, free: bool, tmp_path: Path) -> None:
    leave(tmp_path, age_s)
    assert is_free(tmp_path) == free


@pytest.mark.parametrize("skew_s", [-3600.0, 3600.0])
def test_not_by_the_clock_of_this_host(skew_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path, 10.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + skew_s)
    assert not is_free(tmp_path)


def test_it_is_kept_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "TOUCH_S", 0.01)
    with lock.hold(tmp_path):
        os.utime(tmp_path / lock.FILE, (0, 0))
        deadline = time.monotonic() + PATIENCE_S
        while (tmp_path / lock.FILE).stat().st_mtime < time.time() - 60:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_another_process_has_its_number_by_now(tmp_path: Path) -> None:
    """Its age decides, as on another host."""
    ours = lock._ours()
    leave(tmp_path, 0.0, **{**ours, "began": ours["began"] - 1000})
    assert not is_free(tmp_path)
    leave(tmp_path, 40.0, **{**ours, "began": ours["began"] - 1000})
    assert is_free(tmp_path)


def test_slurm_has_started_the_job_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path, job="4711")
    with pytest.raises(ConfigError, match="Slurm job 4711; .*scancel 4711"):
        lock.look(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert not is_free(tmp_path), "two commands in one salloc"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_free(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"pid": "x"}'])
def test_one_that_says_nothing(text: str, tmp_path: Path) -> None:
    """It is being written."""
    (tmp_path / lock.FILE).write_text(text)
    assert not is_free(tmp_path)
    os.utime(tmp_path / lock.FILE, (0, 0))
    assert is_free(tmp_path)


def test_many_at_once_over_one_that_is_left(tmp_path: Path) -> None:
    leave(tmp_path, 100.0)
    inside, most, refused = [], [], []
    barrier = threading.Barrier(8)

    def launcher() -> None:
        barrier.wait()
        try:
            with lock.hold(tmp_path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.2)
                inside.pop()
        except ConfigError:
            refused.append(1)

    threads = [threading.Thread(target=launcher) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) + len(refused) == 8 and refused
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write .*launcher.lock"), lock.hold(tmp_path / "nowhere"):
        pass
