"""Submitting a batch script to Slurm and following the job to its end: its log as it grows, why it waits, how it ended.

Slurm's tools are called through `run`, time passes through `sleep` and `clock`: tests give recorded answers.
"""

from __future__ import annotations

import codecs
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from dist_gpt.config.errors import ConfigError
from dist_gpt.rundir import ended as ended_run
from launch.slurm import Run, run_tool
from launch.slurm_words import ENDED, base_state, code_of, state_in_words
from launch.starter import NotStartedError
from launch.supervise import handled, say

LOG_S, QUEUE_S = 0.5, 5.0
"""Seconds between looks at the log and at the queue (centres ask not to be asked often)."""
LAST_WORDS_S = 2.0
"""A shared file system shows the end of a log a little later."""
LOST_S = 120.0
"""Slurm not answering for longer than this ends the following, not the job."""
CANCEL_S = 60.0
TIMED_OUT = 124  # as launch.slurm.run_tool has it: the job may have been submitted
SPOKE = {"COMPLETED", "FAILED"}
"""The run ended by itself, and may have left its own code."""
PERHAPS_REQUEUED = {"PREEMPTED", "NODE_FAIL", "BOOT_FAIL"}
"""The end only where the next look says the same."""
REASONS = {
    "Priority": "jobs of higher priority are first",
    "Resources": "not enough nodes are free",
    "Dependency": "a job that it depends on has not ended",
    "BeginTime": "its begin time has not come (a requeued job waits about two minutes)",
    "QOSMaxJobsPerUserLimit": "you have as many jobs running as your QOS allows",
    "AssocGrpCpuLimit": "your account has as many cores in use as it may",
    "AssocGrpNodeLimit": "your account has as many nodes in use as it may",
    "AssocMaxJobsLimit": "you have as many jobs running as your account allows",
    "PartitionTimeLimit": "launch.slurm.time is more than the partition allows: it will never start",
    "PartitionNodeLimit": "launch.nodes is more than the partition allows: it will never start",
    "PartitionConfig": "the partition does not take it (its limits, accounts or QOS): it will never start; sinfo -s "
    "lists the partitions",
    "PartitionDown": "the partition is down",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
    "JobHeldUser": "you hold it: scontrol release",
    "JobHeldAdmin": "an administrator holds it",
}


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    state: str
    code: int
    """What the run's own command would have left with: 0, 1, 2 or 75."""
    words: str


def submit(script: Path, run: Run = run_tool) -> str:
    """Hand `script` to sbatch; the job's number. ConfigError says what Slurm said where it refuses."""
    answer = run(("sbatch", "--parsable", str(script)))
    if answer.returncode == 127:
        raise NotStartedError([
            "sbatch is not found: this machine has no Slurm; start on the cluster's login node (perhaps after `module "
            "load slurm`), or here with --via local (--dry-run shows the batch script)"
        ])  # fmt: skip
    job = answer.stdout.strip().splitlines()[-1].split(";")[0] if answer.stdout.strip() else ""
    if answer.returncode == 0 and re.fullmatch(r"[0-9]+", job):
        return job
    if answer.returncode in (0, TIMED_OUT):
        raise ConfigError([f"sbatch gave no job's number for {script} ({answer.stderr.strip() or 'and no word'}); "
                           "look whether it was submitted: squeue --me"])  # fmt: skip
    raise NotStartedError([f"Slurm refuses the job: {_refusal(answer.stderr) or f'exit code {answer.returncode}'}"])


def _refusal(stderr: str) -> str:
    """What sbatch said, once, and how to find a partition."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in stderr.splitlines() if line]
    first = [line for line in lines if not line.startswith("Batch job submission failed")]
    said = "\n".join(first or lines)
    if "invalid partition" in stderr.lower():
        said += "; sinfo -s lists the partitions (launch.slurm.partition)"
    return said


def cancel(
    job_id: str, run: Run = run_tool, sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> bool:  # fmt: skip
    """Cancel a job; whether it is gone when this returns, at most CANCEL_S seconds later."""
    run(("scancel", job_id))
    deadline = clock() + CANCEL_S
    while clock() < deadline:
        answer = run(("squeue", "--noheader", "--jobs", job_id, "--format", "%T"))
        if not answer.stdout.strip() and (answer.returncode == 0 or "Invalid job id" in answer.stderr):
            return True
        sleep(1.0)
    return False


@dataclass
class Following:
    """A job that is being followed."""

    job_id: str
    log: Path
    say: Callable[[str], None]
    show: Callable[[str], None]
    run: Run = run_tool
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    read: int = 0  # bytes of the log that were shown
    said: str = ""  # the last sentence about the state
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def to_end(self) -> tuple[str, str]:
        """Follow to the end: (state, exit code as Slurm writes it)."""
        answered = self.clock()
        asked = answered - QUEUE_S
        before: tuple[str, str] | None = None
        while True:
            self.show_more()
            now = self.clock()
            if now - asked >= QUEUE_S:
                asked = now
                state = self._look()
                if state is not None:
                    answered = now
                    if state[0] in ENDED and (state[0] not in PERHAPS_REQUEUED or state == before):
                        self._last_words()
                        return state
                    before = state
                elif now - answered > LOST_S:
                    raise ConfigError([
                        f"Slurm has not said a word about job {self.job_id} for {LOST_S:.0f} s; it may well run: see "
                        f"squeue -j {self.job_id} and {self.log}"
                    ])  # fmt: skip
            self.sleep(LOG_S)

    def _look(self) -> tuple[str, str] | None:
        """(state, exit code) now; None: Slurm does not answer."""
        answer = self.run(("squeue", "--noheader", "--jobs", self.job_id, "--format", "%T|%r|%S"))
        line = answer.stdout.strip().splitlines()
        if answer.returncode == 0 and line:
            state, _, rest = line[0].partition("|")
            reason, _, start = rest.partition("|")
            self._say(base_state(state), reason, start)
            if base_state(state) not in ENDED:
                return base_state(state), "0:0"
        elif answer.returncode != 0 and "Invalid job id" not in answer.stderr:
            return None  # the controller is away; sacct may be too
        return final_state(self.job_id, self.run)

    def _say(self, state: str, reason: str, start: str) -> None:
        words = state_in_words(state)
        if state == "PENDING":
            why = REASONS.get(reason.split(",")[0].strip("()"), reason)
            words = f"waiting in the queue: {why}" if why not in ("", "None") else "waiting in the queue"
            words += ". Ctrl-C to give up" if "never start" in why else ""
            if re.match(r"\d{4}-\d\d-\d\dT", start):
                words += f"; Slurm expects to start it at {start.replace('T', ' ')}"
        if words != self.said:
            self.said = words
            self.say(f"job {self.job_id}: {words}")

    def show_more(self) -> None:
        """What the log has got since the last look. A requeued job appends to the same file."""
        with suppress(OSError), open(self.log, "rb") as file:
            size = file.seek(0, 2)
            if size < self.read:  # somebody cut it
                self.read = 0
            file.seek(self.read)
            data = file.read()
            self.read += len(data)
            text = self.decoder.decode(data)
            if text:
                self.show(text)

    def _last_words(self) -> None:
        deadline = self.clock() + LAST_WORDS_S
        while self.clock() < deadline:
            self.sleep(LOG_S)
            self.show_more()


def final_state(job_id: str, run: Run = run_tool) -> tuple[str, str] | None:
    """(state, exit code) of a job that has left the queue, from scontrol (which remembers it for some minutes), else
    sacct; None where neither knows."""
    text = run(("scontrol", "show", "job", job_id)).stdout
    state, code = re.search(r"\bJobState=(\S+)", text), re.search(r"\bExitCode=(\d+:\d+)", text)
    if state and code:
        return base_state(state[1]), code[1]
    fields = ("sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job_id, "--format", "State,ExitCode")
    for line in run(fields).stdout.splitlines():
        state_word, _, code_word = line.strip().partition("|")
        if base_state(state_word) and re.fullmatch(r"\d+:\d+", code_word):
            return base_state(state_word), code_word
    return None


def follow(
    job_id: str, log: Path, say: Callable[[str], None], show: Callable[[str], None], run_dir: Path | None = None, *,
    run: Run = run_tool, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic,
) -> Ended:  # fmt: skip
    """Follow a job to its end: `show` gets its log (`%j` in its name is the job's number), `say` what its state means.
    The run's own code, in run_dir/exit.json, counts for more than Slurm's where the run ended by itself."""
    path = Path(str(log).replace("%j", job_id))
    state, exit_code = Following(job_id, path, say, show, run, sleep, clock).to_end()
    code, number = code_of(exit_code)
    own = _own_code(run_dir, job_id) if run_dir is not None and state in SPOKE else None
    if own is not None:
        code = own
    elif state != "COMPLETED":
        code = code if code in (2, 75) and not number else 1
    words = state_in_words(state, exit_code)
    say(f"job {job_id}: {words}")
    return Ended(state, code, words)


def _own_code(run_dir: Path, job_id: str) -> int | None:
    """What the run itself left with; None where it left no word, or another job did: a job that dies without a word
    leaves what was there before."""
    end = ended_run(run_dir)
    code = end.get("code")
    return code if str(end.get("job")) == job_id and isinstance(code, int) else None


class Stopped(Exception):
    """A signal asked the follower to leave."""


class Guard:
    """Notes the signals that ask the follower to leave, and ends what runs inside `interrupted`, once: what follows,
    submitting before and cancelling afterwards, goes on to its end whatever comes."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.may_raise = False

    def on_signal(self, number: int, frame: object) -> None:
        """Signal handler."""
        self.number = self.number or number
        if self.may_raise:
            self.may_raise = False
            raise Stopped

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """Inside, a signal raises Stopped; so does one that came before."""
        self.may_raise = True
        try:
            if self.number is not None:
                raise Stopped
            yield
        finally:
            self.may_raise = False


def run_job(
    script: Path, log: Path, run_dir: Path, live_on_stderr: bool = False,
    go_on: Callable[[Path, str], str] | None = None, run: Run = run_tool,
) -> int:  # fmt: skip
    """Submit `script` and follow the job on the terminal; the run's code. Ctrl-C and SIGTERM, from before it is
    submitted on, cancel the job and leave with 128 + signal. `go_on` has the last words where the job had none."""
    stream = sys.stderr if live_on_stderr else sys.stdout

    def show(text: str) -> None:
        with suppress(OSError, ValueError):  # nobody reads any more: the log file has it all
            stream.write(text)
            stream.flush()

    guard = Guard()
    with handled(guard.on_signal, signal.SIGINT, signal.SIGTERM):
        job = submit(script, run)
        say(f"submitted: job {job}, script {script}")
        try:
            with guard.interrupted():
                ended = follow(job, log, say, show, run_dir, run=run)
            if go_on is not None and ended.state not in SPOKE:
                say(go_on(run_dir, "slurm"))
            return ended.code
        except Stopped:
            say(f"cancelling job {job}")
            say(f"job {job} is gone" if cancel(job, run) else f"job {job} is still there: scancel {job}")
            if go_on is not None:
                say(go_on(run_dir, "slurm"))
            return 128 + (guard.number or 0)
