"""Submit a batch script to Slurm and follow the job to its end: its log as it grows, why it waits, how it ends.

Slurm's tools are called through `run`, and time passes through `sleep` and `clock`, so that tests can replay answers.
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
from dist_gpt.protocol import BAD_INPUT, PREEMPTED
from dist_gpt.rundir import ended as ended_run
from launch.monitor.supervisor import handled, say
from launch.starter import NotStartedError
from launch.starters.job_states import ENDED, base_state, code_of, state_in_words
from launch.starters.slurm import Run, run_tool

LOG_S, QUEUE_S = 0.5, 5.0
"""Seconds between looks at the log and at the queue (centres want few queries)."""
LAST_WORDS_S = 2.0
"""Seconds to wait for the end of a log, which a shared file system shows a little later."""
LOST_S = 120.0
"""Seconds without an answer from Slurm after which the follower stops; the job continues."""
CANCEL_S = 60.0
TIMED_OUT = 124  # code of launch.slurm.run_tool: the job may have been submitted
SPOKE = {"COMPLETED", "FAILED"}
"""States in which the run ended by itself and may have noted its own code."""
PERHAPS_REQUEUED = {"PREEMPTED", "NODE_FAIL", "BOOT_FAIL"}
"""States that are final only if the next look says the same."""
REASONS = {
    "Priority": "jobs of higher priority come first",
    "Resources": "not enough nodes are free",
    "Dependency": "a job that it depends on has not ended",
    "BeginTime": "its begin time has not come (a requeued job waits about two minutes)",
    "QOSMaxJobsPerUserLimit": "you have as many jobs running as your QOS allows",
    "AssocGrpCpuLimit": "your account uses as many cores as it may",
    "AssocGrpNodeLimit": "your account uses as many nodes as it may",
    "AssocMaxJobsLimit": "you have as many jobs running as your account allows",
    "PartitionTimeLimit": "launch.slurm.time is more than the partition allows: it will never start",
    "PartitionNodeLimit": "launch.nodes is more than the partition allows: it will never start",
    "PartitionConfig": "the partition does not accept it (its limits, accounts or QOS): it will never start; sinfo -s "
    "lists the partitions",
    "PartitionDown": "the partition is down",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
    "JobHeldUser": "you hold it: release it with scontrol release",
    "JobHeldAdmin": "an administrator holds it",
}


@dataclass(frozen=True)
class Ended:
    """End of a job."""

    state: str
    code: int
    """Exit code that the run's own command would have had: 0, 1, 2 or 75."""
    words: str


def submit(script: Path, run: Run = run_tool) -> str:
    """Hand `script` to sbatch and return the job's number. Raise ConfigError with Slurm's reason if it refuses."""
    answer = run(("sbatch", "--parsable", str(script)))
    if answer.returncode == 127:
        raise NotStartedError([
            "sbatch was not found: this machine has no Slurm; start on the cluster's login node (perhaps after `module "
            "load slurm`), or here with --via local (--dry-run shows the batch script)"
        ])  # fmt: skip
    job = answer.stdout.strip().splitlines()[-1].split(";")[0] if answer.stdout.strip() else ""
    if answer.returncode == 0 and re.fullmatch(r"[0-9]+", job):
        return job
    if answer.returncode in (0, TIMED_OUT):
        raise ConfigError([f"sbatch printed no job number for {script} ({answer.stderr.strip() or 'no message'}); "
                           "check whether the job was submitted: squeue --me"])  # fmt: skip
    raise NotStartedError([f"Slurm refuses the job: {_refusal(answer.stderr) or f'exit code {answer.returncode}'}"])


def _refusal(stderr: str) -> str:
    """Return what sbatch said, once, and how to find a partition if it was invalid."""
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
    """Cancel a job; return, at most CANCEL_S seconds later, whether it is gone."""
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
    """Job that is being followed."""

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
        """Follow the job to its end and return (state, exit code as Slurm writes it)."""
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
                        f"Slurm has not answered about job {self.job_id} for {LOST_S:.0f} s; it may still run: see "
                        f"squeue -j {self.job_id} and {self.log}"
                    ])  # fmt: skip
            self.sleep(LOG_S)

    def _look(self) -> tuple[str, str] | None:
        """Return (state, exit code) now; None if Slurm does not answer."""
        answer = self.run(("squeue", "--noheader", "--jobs", self.job_id, "--format", "%T|%r|%S"))
        line = answer.stdout.strip().splitlines()
        if answer.returncode == 0 and line:
            state, _, rest = line[0].partition("|")
            reason, _, start = rest.partition("|")
            self._say(base_state(state), reason, start)
            if base_state(state) not in ENDED:
                return base_state(state), "0:0"
        elif answer.returncode != 0 and "Invalid job id" not in answer.stderr:
            return None  # the controller does not answer; sacct may not either
        return final_state(self.job_id, self.run)

    def _say(self, state: str, reason: str, start: str) -> None:
        words = state_in_words(state)
        if state == "PENDING":
            why = REASONS.get(reason.split(",")[0].strip("()"), reason)
            words = f"waiting in the queue: {why}" if why not in ("", "None") else "waiting in the queue"
            words += ". Press Ctrl-C to cancel it" if "never start" in why else ""
            if re.match(r"\d{4}-\d\d-\d\dT", start):
                words += f"; Slurm expects to start it at {start.replace('T', ' ')}"
        if words != self.said:
            self.said = words
            self.say(f"job {self.job_id}: {words}")

    def show_more(self) -> None:
        """Show what the log got since the last look. A requeued job appends to the same file."""
        with suppress(OSError), open(self.log, "rb") as file:
            size = file.seek(0, 2)
            if size < self.read:  # the log was truncated
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
    """Return (state, exit code) of a job that has left the queue; None if neither scontrol nor sacct knows.

    scontrol, which remembers the job for some minutes, is asked first.
    """
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

    The run's own code, in run_dir/exit.json, takes precedence over Slurm's if the run ended by itself.
    """
    path = Path(str(log).replace("%j", job_id))
    state, exit_code = Following(job_id, path, say, show, run, sleep, clock).to_end()
    code, number = code_of(exit_code)
    own = _own_code(run_dir, job_id) if run_dir is not None and state in SPOKE else None
    if own is not None:
        code = own
    elif state != "COMPLETED":
        code = code if code in (BAD_INPUT, PREEMPTED) and not number else 1
    words = state_in_words(state, exit_code)
    say(f"job {job_id}: {words}")
    return Ended(state, code, words)


def _own_code(run_dir: Path, job_id: str) -> int | None:
    """Return the exit code that the run noted itself; None if it noted none or another job did.

    A job that dies before it notes its end leaves the earlier file in place.
    """
    end = ended_run(run_dir)
    code = end.get("code")
    return code if str(end.get("job")) == job_id and isinstance(code, int) else None


class Stopped(Exception):
    """Raised when a signal asks the follower to stop."""


class Guard:
    """Keeper of the signals that ask the follower to stop; the first one ends what runs inside `interrupted`.

    Submitting before that and cancelling afterwards run to their ends whatever signals come.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.may_raise = False

    def on_signal(self, number: int, frame: object) -> None:
        """Note the signal; raise Stopped inside `interrupted`."""
        self.number = self.number or number
        if self.may_raise:
            self.may_raise = False
            raise Stopped

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """Let a signal in the block raise Stopped, also one that came before."""
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
    """Submit `script`, follow the job on the terminal, and return the run's exit code.

    Ctrl-C and SIGTERM, from before the submission on, cancel the job and make the code 128 + signal. `go_on` gives the
    last lines if the run did not end by itself.
    """
    stream = sys.stderr if live_on_stderr else sys.stdout

    def show(text: str) -> None:
        with suppress(OSError, ValueError):  # the stream is closed: the log file has it all
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
            say(f"job {job} is gone" if cancel(job, run) else f"job {job} is still in the queue: scancel {job}")
            if go_on is not None:
                say(go_on(run_dir, "slurm"))
            return 128 + (guard.number or 0)
