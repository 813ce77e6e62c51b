"""Batch scripts and command lines, against recorded files; inside an allocation, against recorded answers of Slurm.

The recorded files are written anew only with DIST_GPT_UPDATE_GOLDEN=1.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.launch_problems import slurm_seconds
from dist_gpt.config.load import load
from dist_gpt.config.problems import problems
from dist_gpt.config.schema import SlurmConfig
from launch.spec import JobSpec, train_argv
from launch.starters import slurm, torchrun
from launch.starters.job_states import ENDED, WORDS
from launch.starters.slurm import SlurmJob, sbatch_text, srun_argv, state_in_words
from tests.patience import PATIENCE_S
from tests.unit.test_submit import Slurm

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = sorted((Path(__file__).parents[2] / "slurm").glob("*.sbatch"))
NASTY = "a b'c\"d;touch canary;$(touch canary)`touch canary`&&touch canary|#\\ %j *"


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("DIST_GPT_UPDATE_GOLDEN") == "1":
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"differs from {path}; DIST_GPT_UPDATE_GOLDEN=1 records it anew"


def lines(argv: Sequence[str]) -> str:
    return "".join(f"{word}\n" for word in argv).replace(sys.executable, "/opt/env/bin/python")


def job(**changes: Any) -> SlurmJob:
    config = SlurmConfig(
        partition="gpu", account="m1234", qos="regular", constraint="gpu&hbm80g", time="1:30:00", gpus_per_node=4,
        cpus_per_rank=16, options={"mail-type": "FAIL", "exclusive": ""},
    )  # fmt: skip
    base = SlurmJob(
        name="gpt", run_dir=Path("/scratch/me/runs/gpt"), cwd=Path("/home/me/work"), python="/opt/env/bin/python",
        nodes=2, ranks_per_node=4, env={"NCCL_DEBUG": "WARN"}, modules=("cuda/12.4",), grace_s=90.5, slurm=config,
        argv=("-m", "dist_gpt", "launch", "/scratch/me/runs/gpt/config.yaml", "--via", "slurm", "--resume", "auto"),
    )  # fmt: skip
    return replace(base, **changes)


def spec(nodes: int = 2) -> JobSpec:
    return JobSpec(train_argv("/scratch/me/runs/gpt/config.yaml"), 4 * nodes, Path("/scratch/me/runs/gpt/logs"), nodes,
                   name="gpt", grace_s=90.5)  # fmt: skip


@pytest.mark.parametrize("starter", ["srun", "torchrun", "mpi"])
def test_the_script_is_as_recorded(starter: str) -> None:
    with_starter = job().slurm.model_copy(update={"starter": starter})
    golden(f"{starter}.sbatch", sbatch_text(job(slurm=with_starter)))


def test_the_script_of_defaults_and_of_an_array() -> None:
    bare = job(slurm=SlurmConfig(requeue=False), modules=(), env={}, nodes=1, ranks_per_node=1)
    golden("bare.sbatch", sbatch_text(bare))
    text = sbatch_text(job(array="1-10%2"))
    assert "#SBATCH --array=1-10%2\n" in text
    assert "/logs/slurm-%A_%a.out\n" in text


def test_command_lines_are_as_recorded() -> None:
    where: dict[str, Any] = {"nodes": ("node1", "node2"), "step": "dist-gpt-1a2b3c4d"}
    golden("srun.txt", lines(srun_argv(spec(), "srun", "10.0.0.1", 23456, 16, **where)))
    golden("srun_torchrun.txt", lines(srun_argv(spec(), "torchrun", "10.0.0.1", 23456, 16, **where)))
    golden("torchrun.txt", lines(torchrun.torchrun_argv(spec(), 1, "10.0.0.1", 23456)))
    golden("torchrun_one_node.txt", lines(torchrun.torchrun_argv(spec(1), 0, "127.0.0.1", 23456)))
    program = torchrun.torchrun_argv(JobSpec(("./a.out", "-m", "x"), 2, Path("logs")), 0, "127.0.0.1", 1)
    assert program[-4:] == ("--no-python", "./a.out", "-m", "x")
    assert torchrun.environment(spec())["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "91"


def test_a_starter_dies_with_its_launcher(tmp_path: Path) -> None:
    """Killed with SIGKILL, the launcher cannot end it."""
    program = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    launcher = (
        "import os, subprocess, sys, time\n"
        f"tied = [sys.executable, '-m', 'launch.rank.lifeline', str(os.getpid()), sys.executable, '-c', {program!r}]\n"
        "subprocess.Popen(tied)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", launcher], cwd=ROOT) as parent:
        _until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        parent.kill()
    child = int((tmp_path / "pid").read_text())
    _until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
    argv = [sys.executable, "-m", "launch.rank.lifeline", str(os.getpid()), "/no/such"]
    missing = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (missing.returncode, missing.stderr) == (1, "/no/such: No such file or directory\n")


def test_a_starter_whose_launcher_is_gone_does_not_start(tmp_path: Path) -> None:
    """Killed before the tie was made: this process is the child of somebody else by then (here: of this test)."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    argv = [sys.executable, "-m", "launch.rank.lifeline", str(gone.pid), "touch", str(tmp_path / "ran")]
    assert subprocess.run(argv, cwd=ROOT, timeout=PATIENCE_S, check=False).returncode == 1
    assert not (tmp_path / "ran").exists()


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_node_knows_its_number() -> None:
    assert torchrun.node_rank(1, {}) == 0
    assert torchrun.node_rank(2, {"SLURM_NODEID": "1"}) == 1
    for environ in ({}, {"SLURM_NODEID": "2"}, {"SLURM_NODEID": "x"}):
        with pytest.raises(ConfigError, match="SLURM_NODEID"):
            torchrun.node_rank(2, environ)


@pytest.mark.parametrize("bad", ["a\nb", "a\rtouch x", "a\0b", "a\tb", "a\x1bb", "a\u2028b", "a\x85b", "a\x0bb"])
def test_control_characters_are_refused_by_name(bad: str) -> None:
    config = job().slurm
    cases = {
        "name": job(name=bad),
        "run_dir": job(run_dir=Path("/tmp") / bad.replace("\0", "\x01")),
        "launch.modules": job(modules=(bad,)),
        "working directory": job(cwd=Path(bad.replace("\0", "\x01"))),
        "launch.slurm.options.comment": job(slurm=config.model_copy(update={"options": {"comment": bad}})),
        **{f"launch.slurm.{key}": job(slurm=config.model_copy(update={key: bad}))
           for key in ("partition", "account", "qos", "constraint", "time")},
    }  # fmt: skip
    for key, case in cases.items():
        with pytest.raises(ConfigError) as caught:
            sbatch_text(case)
        assert key in str(caught.value)


@pytest.mark.parametrize("option", ["Mail", "-x", "mail type", "x=y", "", "x\ny", "output", "signal", "nodes", "wrap-"])
def test_options_that_are_none_or_ours(option: str) -> None:
    with pytest.raises(ConfigError, match=r"launch\.slurm\.options"):
        sbatch_text(job(slurm=SlurmConfig(options={option: "1"})))


def test_the_config_is_refused_before(tmp_path: Path) -> None:
    base = load(str(_tiny(tmp_path)), world=1)
    bad = {
        "env": {"A B": "1", "OK": "x\0"}, "modules": ["a\nb", ""], "interface": "eth 0",
        "slurm": SlurmConfig(time="90 min", partition="x\ny", options={"Bad": "", "output": "x", "comment": "a\nb"}),
    }  # fmt: skip
    launch = base.launch.model_copy(update=bad)
    found = "\n".join(problems(base.model_copy(update={"launch": launch})))
    for named in ("'A B'", "'OK'", "'a\\nb'", "launch.modules: an empty", "launch.interface: 'eth 0'",
                  "launch.slurm.time: '90 min'", "launch.slurm.partition: 'x\\ny'", "'Bad' is not a long sbatch option",
                  "output is set by dist-gpt", "launch.slurm.options.comment"):  # fmt: skip
        assert named in found
    for limit in ("30", "1:30:00", "90:00", "2-00", "2-12:30", "1-00:00:00", "0"):
        ok = base.launch.model_copy(update={"slurm": SlurmConfig(time=limit)})
        assert not problems(base.model_copy(update={"launch": ok}))


@pytest.mark.parametrize(("time", "seconds"), [
    ("4", 240), ("4:30", 270), ("1:00:00", 3600), ("1-2", 93600), ("1-2:3", 93780), ("1-2:3:4", 93784), ("soon", None),
])  # fmt: skip
def test_the_seconds_of_a_time(time: str, seconds: int | None) -> None:
    assert slurm_seconds(time) == seconds


@pytest.mark.parametrize(("time", "grace", "least"), [("2", 120, 4), ("3:59", 120, 4), ("0:30", 1, 3), ("5", 181, 6)])
def test_a_time_that_ends_in_its_own_warning_is_refused(time: str, grace: float, least: int, tmp_path: Path) -> None:
    """Else the job is warned as soon as it starts, saves, and goes back to the queue for ever."""
    base = [f"launch.grace_s={grace}"]
    with pytest.raises(ConfigError, match=rf"launch\.slurm\.time {time} is .* at least {least} minutes") as caught:
        load(str(_tiny(tmp_path)), [*base, f"launch.slurm.time={time}"])
    assert len(caught.value.problems) == 1
    load(str(_tiny(tmp_path)), [*base, f"launch.slurm.time={least}"])


def test_gpus_are_not_bound_to_tasks() -> None:
    """Only where srun starts the ranks, and has GPUs to bind; who sets it himself counts for more."""
    config = job().slurm
    line = "export SLURM_GPU_BIND=none\n"
    assert line in sbatch_text(job())
    assert line not in sbatch_text(job(slurm=config.model_copy(update={"gpus_per_node": None})))
    assert line not in sbatch_text(job(slurm=config.model_copy(update={"starter": "torchrun"})))
    assert line not in sbatch_text(job(env={"SLURM_GPU_BIND": "closest"}))
    assert "module" not in sbatch_text(job(modules=()))


def _tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text("model: {num_layers: 1, hidden_size: 8, num_heads: 1, seq_len: 8, vocab_size: 256}\n"
                    "train: {steps: 1, global_batch: 1}\ndata: {source: synthetic}\n")  # fmt: skip
    return path


def nasty_job(folder: Path) -> SlurmJob:
    program = "import json, os, sys; print(json.dumps([os.environ['VALUE'], sys.argv[1:], os.getpid()]))"
    config = SlurmConfig(account=NASTY, options={"comment": NASTY})
    return job(name=NASTY, cwd=folder, run_dir=folder / "100% 'of' $(touch canary)", python=sys.executable, modules=(),
               env={"VALUE": NASTY + "\nline 2"}, slurm=config, argv=("-c", program, NASTY, "x\ny"))  # fmt: skip


def test_values_are_values_for_bash_and_python_takes_the_shells_place(tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(sbatch_text(nasty_job(tmp_path)))
    with subprocess.Popen(["bash", str(script)], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as shell:
        out, _ = shell.communicate(timeout=PATIENCE_S)
    assert json.loads(out) == [NASTY + "\nline 2", [NASTY, "x\ny"], shell.pid]
    assert [path.name for path in tmp_path.iterdir()] == ["job.sbatch"]


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="sbatch is not installed")
def test_values_are_values_for_sbatch(tmp_path: Path) -> None:
    """The real sbatch says what it read, before it misses its controller."""
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=x\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nMessageTimeout=2\nNodeName=n1 CPUs=1\n"
        "PartitionName=p Nodes=n1 Default=YES\n"
    )
    script = tmp_path / "job.sbatch"
    made = nasty_job(tmp_path)
    script.write_text(sbatch_text(made))
    env = {"PATH": os.environ["PATH"], "SLURM_CONF": str(tmp_path / "slurm.conf")}
    done = subprocess.run(["sbatch", "-vv", "--test-only", str(script)], env=env, cwd=tmp_path, capture_output=True,
                          text=True, timeout=PATIENCE_S, check=False)  # fmt: skip
    if "defined options" not in done.stderr:
        pytest.skip(f"this sbatch does not show what it read: {done.stderr[-200:]}")
    assert f": {NASTY}\n" in done.stderr.split("job-name")[1]
    assert f": {NASTY}\n" in done.stderr.split("comment  ")[1]
    assert "100%% 'of' $(touch canary)/logs/slurm-%j.out\n" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.sbatch", "slurm.conf"]


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.stem != "perlmutter"], ids=lambda path: path.name)
def test_the_scripts_find_the_environment_that_they_are_told(script: Path, tmp_path: Path) -> None:
    """sbatch may be typed in a shell without it."""
    tools = {"bin": "echo other", "env/bin": 'echo "mine $*"', "tools": "exit 0"}
    for folder, text in tools.items():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / ("module" if folder == "tools" else "dist-gpt")).write_text(f"#!/bin/sh\n{text}\n")
        for tool in (tmp_path / folder).iterdir():
            tool.chmod(0o755)
    (tmp_path / "sets.txt").write_text("train.seed=1\n")
    env = {
        "PATH": f"{tmp_path / 'bin'}:{tmp_path / 'tools'}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    more = ["sets.txt"] if script.stem == "array" else []
    argv = ["bash", str(script), "c.yaml", *more, str(tmp_path / "env")]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout.startswith("mine launch c.yaml --via "), done.stdout + done.stderr
    if script.stem != "frontier":  # there it must be said
        done = subprocess.run(
            argv[:-1], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=True
        )
        assert done.stdout == "other\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_for_hands(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=PATIENCE_S)
    text = script.read_text()
    assert "exec dist-gpt launch" in text
    assert "--resume auto" in text
    assert "--open-mode=append" in text
    assert "--signal=B:USR1@" in text
    first = next(i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in text.splitlines()[first:]), "sbatch stops reading there"


def test_there_are_scripts() -> None:
    assert {path.stem for path in SCRIPTS} == {"torchrun", "srun", "mpi", "array", "perlmutter", "frontier"}


# --- words -----------------------------------------------------------------------------------------------------------


def test_every_state_has_words() -> None:
    for state in WORDS:
        assert state_in_words(state).startswith(f"{state}: ")
    assert set(WORDS) > ENDED
    assert state_in_words("FAILED", "2:0").endswith("it failed with exit code 2 (bad input)")
    assert state_in_words("FAILED", "75:0").startswith("it was asked to stop, saved and exited (exit code 75")
    assert "SIGKILL" in state_in_words("OUT_OF_MEMORY", "0:9")
    assert state_in_words("CANCELLED by 1000", "0:15").startswith("CANCELLED: it was cancelled")
    assert "unknown state" in state_in_words("NEW_STATE")
    with pytest.raises(ConfigError):
        state_in_words("FAILED", "x")


# --- inside an allocation -------------------------------------------------------------------------------------------


def test_inside_an_allocation() -> None:
    assert slurm.hosts({"SLURM_JOB_NODELIST": "n[1-2]"}) == ["n1", "n2"]
    with pytest.raises(ConfigError, match="not a Slurm allocation"):
        slurm.hosts({})
    assert slurm.is_warning(signal.SIGUSR1)
    assert not slurm.is_warning(signal.SIGTERM)
    assert slurm.requeue("7", Slurm(scontrol=[""]).run) == ""
    assert "Access denied" in slurm.requeue("7", Slurm(scontrol=[(1, "", "Access denied\n")]).run)


def test_only_our_steps_are_ended() -> None:
    """The user's own, beside ours in an allocation, go on."""
    listed = "7.batch|x.sh\n7.extern|extern\n7.0|dist-gpt-1a\n7.1|bash\n7.2|dist-gpt-1a\n7.3|dist-gpt-2b\n"
    fake = Slurm(squeue=[listed, "7.batch|x.sh\n7.1|bash\n"], scancel=[""])
    slurm.end_steps("7", lambda number, name: name == "dist-gpt-1a", fake.run, fake.sleep)
    assert [call for call in fake.calls if call[0] == "scancel"] == [("scancel", "--signal=KILL", "7.0", "7.2")]


def test_the_address_that_others_reach() -> None:
    names = {"n1": "10.0.0.1", "loop": "127.0.1.1", "10.0.0.9": "10.0.0.9"}
    assert slurm.address_of("n1", None, Slurm().run, names.get) == "10.0.0.1"
    node = Slurm(scontrol=["NodeName=loop NodeAddr=10.0.0.9 NodeHostName=loop"])
    assert slurm.address_of("loop", None, node.run, names.get) == "10.0.0.9"
    for host, part in (("loop", "resolves to 127.0.1.1, which is loopback"), ("gone", "does not resolve here")):
        with pytest.raises(ConfigError, match=part):
            slurm.address_of(host, None, Slurm().run, names.get)
    assert slurm.interface_address("lo").startswith("127.")
    with pytest.raises(ConfigError, match="'nic9' has no IPv4 address"):
        slurm.interface_address("nic9")
