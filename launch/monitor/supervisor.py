"""Follow the ranks of a job from start to end, whichever launcher starts them.

`supervise(spec, starter, host)` returns the job's exit code. It opens the watch, judges what every rank finds on its
node (monitor.preflight), lets the ranks start, follows their heartbeats, names the rank, link or collective that a
failure came from, passes on requests to stop, restarts the job if launch.max_restarts allows, and leaves no process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty

from dist_gpt.awake import Suspension
from dist_gpt.protocol import ATTEMPT, BAD_INPUT, CONFIG_HASH, LOG_DIR, PREEMPTED, SILENCE, WATCH, WATCH_TOKEN
from dist_gpt.rundir import EXIT
from dist_gpt.wording import counted
from launch.monitor import diagnose
from launch.monitor.heartbeat_server import Watch
from launch.monitor.preflight import check_answers, warnings
from launch.monitor.tee import Follow
from launch.rank.node_info import config_digest
from launch.run_files import last_words, newest_checkpoint, note_failure, size, step_left, tail, to_change, why_left
from launch.spec import JobSpec
from launch.starter import Failure, Starter

GRACE_S = 1.0
"""Seconds after the first failure in which the ranks that fail because of it can write their errors to their logs."""
PREEMPTED_GRACE_S = 30.0
"""Seconds after the first rank has saved and exited in which others may still be writing."""
HELLO_S, HELLO_EACH_S = 25.0, 0.05
"""Seconds from the first rank's hello to the last one's, and more for each rank."""
SETTLE_S = 1.0
"""Seconds, once the starter has ended, to read the ranks' last messages."""
TICK_S = 0.2
SAID_S = 3.0
"""Suspensions of fewer seconds are not reported: a busy machine looks the same."""
SHORTLY_S = 60.0
"""Seconds after a suspension in which the report of a failure mentions it."""
BACK_S = 1.0
"""Seconds from the end of a suspension to its report: by then it is known whether the ranks kept running."""
PASSED_THROUGH = (BAD_INPUT, PREEMPTED)
ASKING = ("SIGTERM", "SIGUSR1")
"""Signals that ask the ranks to save and exit; others end them at once."""


def say(text: str) -> None:
    """Print a line for the user on stderr; if stderr is closed, the job continues all the same."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _meaning(name: str) -> str:
    """Return what a signal means if Slurm sends it, in words."""
    warning = name == "SIGUSR1" and "SLURM_JOB_ID" in os.environ
    return " (Slurm's warning: the job's time is nearly over)" if warning else ""


def hello_patience(spec: JobSpec) -> float:
    """Return the seconds from the first rank's hello to the last one's: thousands of ranks do not start at once."""
    return min(HELLO_S + HELLO_EACH_S * spec.ranks, spec.timeout_s)


class Supervisor:
    """Supervisor of one job, attempt after attempt."""

    def __init__(self, spec: JobSpec, starter: Starter, host: str) -> None:
        self.spec, self.starter, self.host = spec, starter, host
        self.stops: list[int] = []  # signals received
        self.watch: Watch | None = None
        self.asked_at: float | None = None
        self.let_go = False
        self.took_leave = False  # every rank exited in an orderly way: a restart would change nothing
        self.log_starts: dict[int, int] = {}  # bytes that earlier attempts wrote
        self.starter_start = 0
        self.told: Suspension | None = None  # the last one that was reported
        self.survived: Suspension | None = None  # the last one after which the job continued

    def on_signal(self, number: int, frame: object) -> None:
        """Note a signal and do no more: this is a signal handler (SimpleQueue.put may be called from one)."""
        self.stops.append(number)
        self.starter.wake.put(None)

    def run(self) -> int:
        """Run all attempts and return the last one's exit code."""
        steps_before = None
        for attempt in range(self.spec.max_restarts + 1):
            code = self.attempt(attempt)
            over = code in (0, *PASSED_THROUGH) or self.took_leave or bool(to_change(self.spec.log_dir.parent))
            if over or self.stops or attempt == self.spec.max_restarts:
                break
            steps = newest_checkpoint(self.spec.log_dir.parent)
            if attempt and steps == steps_before:
                say(f"no progress between two starts (newest checkpoint: {steps or 'none'}): not restarted")
                break
            steps_before = steps
            say(f"restart {attempt + 1} of {self.spec.max_restarts}, from {steps or 'the beginning'}")
        return code

    def attempt(self, number: int) -> int:
        """Start the ranks, follow them to their end, leave no process, and return the exit code."""
        spec = self.spec
        spec.log_dir.mkdir(parents=True, exist_ok=True)
        (spec.log_dir.parent / EXIT).unlink(missing_ok=True)
        for rank in range(spec.ranks):
            spec.error_path(rank).unlink(missing_ok=True)
            self.log_starts[rank] = size(spec.log_path(rank))
        shown, self.let_go, self.took_leave = None, False, False
        self.told = self.survived = None
        self.starter_start = size(Path(self.starter.where())) if self.starter.where() else 0
        self.watch = (
            Watch(self.host, spec.ranks, silence_s=spec.silence_s, on_event=lambda: self.starter.wake.put(self))
            if spec.watched
            else None
        )
        try:
            if not self.starter.live:
                stream = sys.stderr if spec.live_on_stderr else sys.stdout
                shown = Follow(spec.log_path(0), self.log_starts[0], stream)
            self.starter.start(self._environment(number))
            refused = self._look() if self.watch is not None else None
            return self._follow() if refused is None else refused
        finally:
            self.end()
            if shown is not None:
                shown.close()

    def end(self) -> None:
        """End the job; none of its processes is left when this returns."""
        if self.watch is not None:
            self.watch.leave("the launcher ends the job")
        seen = len(self.stops)
        self.starter.end(lambda: len(self.stops) > seen)
        if self.watch is not None:
            self.watch.close()

    def _environment(self, attempt: int) -> dict[str, str]:
        env = {"TORCHELASTIC_RESTART_COUNT": str(attempt), **self.spec.env, ATTEMPT: str(attempt)}
        if not self.starter.live:
            env[LOG_DIR] = str(self.spec.log_dir)
        if self.watch is not None:
            env |= {
                WATCH: self.watch.address,
                WATCH_TOKEN: self.watch.token,
                SILENCE: str(self.spec.silence_s),
                CONFIG_HASH: config_digest(self.spec.log_dir.parent / "config.yaml"),
            }
        return env

    # --- before training -----------------------------------------------------------------------------------------

    def _look(self) -> int | None:
        """Wait for every rank's hello and judge what they found; return an exit code if the job must not start."""
        watch, spec = self._watched(), self.spec
        begun, first = self._now(), None
        while (missing := watch.missing()) and not self.stops and not self.starter.failures():
            now = self._now()
            self._tell_of_suspension()
            if first is None and len(missing) < spec.ranks:
                first = now
            late = now - begun > spec.timeout_s or (first is not None and now - first > hello_patience(spec))
            if late or not self.starter.running():
                break
            if self._in_vain(missing):
                time.sleep(GRACE_S)  # others may still come and must not be reported missing
                break
            self._pause()
        missing = watch.missing()
        if self.stops:
            return None
        if not missing or not self.starter.failures():
            problems = check_answers(spec, watch.states(), missing) if spec.preflight != "off" or missing else ""
            if problems:
                said = bool(missing) and self._show_cause(missing)
                if len(missing) < spec.ranks or not self._told_in(missing):  # else a rank has given the reason itself
                    say(problems)
                if missing or spec.preflight == "strict":
                    if not said:
                        self._show_starter()
                    say("refused before training started; set launch.preflight: warn to start anyway")
                    return 2
            elif spec.preflight != "off" and (doubts := warnings(spec, watch.states())):
                say(doubts)
            watch.go()
            self.let_go = True  # from now on a request to stop reaches every rank, at its first heartbeat
        return None

    def _in_vain(self, missing: list[int]) -> bool:
        """Return whether the missing ranks will never come: one has said why, or a process came as another rank."""
        lost = [state for state in self._watched().states() if state.hello is not None
                and (state.rivals or state.hello["world"] != self.spec.ranks)]  # fmt: skip
        return bool(lost) or self._told_in(missing)

    def _told_in(self, missing: list[int]) -> bool:
        """Return whether one of `missing` has written why it exited; look at the folder once, however many they are."""
        there = {path.name for path in self.spec.log_dir.glob("rank*.error.json")}
        return any(self.spec.error_path(rank).name in there and self._last_words(rank) for rank in missing)

    def _show_cause(self, missing: list[int]) -> bool:
        """Show the error that the first of `missing` wrote, else a failed starter's output; return whether any."""
        if told := next((words for rank in missing if (words := self._last_words(rank))), ""):
            say(told)
            return True
        return not self.starter.running() and self.starter.code() != 0 and self._show_starter()

    # --- while they run ------------------------------------------------------------------------------------------

    def _follow(self) -> int:
        """Follow the ranks to their end or shortly past a failure; report it on stderr and return the exit code."""
        deadline: float | None = None
        trouble: diagnose.Explanation | None = None
        while self.starter.running():
            now = self._now()
            self._tell_of_suspension()
            if self.stops and not self._asked(now):
                return self._stopped()
            failures = self.starter.failures()
            trouble = trouble or self._trouble(now)
            if deadline is None and (failures or trouble is not None):
                saved = any(f.code == PREEMPTED for f in failures)
                deadline = now + (PREEMPTED_GRACE_S if saved else GRACE_S)
            if deadline is not None and now >= deadline:
                break
            self._pause(deadline)
        return self._verdict(trouble)

    def _now(self) -> float:
        """Return the time on the watch's clock, which leaves out suspensions of this process."""
        return self.watch.now() if self.watch is not None else time.monotonic()

    def _tell_of_suspension(self, ended: bool = False) -> None:
        """Report once that the job, or the launcher alone, was suspended; `ended`: the ranks are gone by now."""
        last = self.watch.clock.last if self.watch is not None else None
        if self.watch is None or last is None or last is self.told or last.seconds < SAID_S:
            return
        if not ended:
            leaving = any(state.bye is not None or state.closed is not None for state in self.watch.states())
            if leaving or self._now() - last.at < BACK_S or not self.starter.running():
                return  # reported at the end, when its effect is known
        self.told, self.survived = last, self.survived if ended else last
        alone = ended or self.watch.ran_on()
        who = "the launcher" if alone else "this job"
        say(f"{who} was suspended for {last.seconds:.0f} s" + ("" if ended else "; continuing"))

    def _trouble(self, now: float) -> diagnose.Explanation | None:
        return diagnose.explain(self.watch.states(), now, self.spec.rank_name, watch_host=self.watch.name,
                               stuck_s=self.spec.timeout_s) if self.watch is not None else None  # fmt: skip

    def _asked(self, now: float) -> bool:
        """Return whether a request to stop is under way: the ranks save and exit, and have time left for it."""
        name = signal.Signals(self.stops[-1]).name
        if self.asked_at is None:
            if not self.spec.saves or self.watch is None or name not in ASKING or not self.let_go:
                return False
            self.asked_at = now
            self.watch.ask_stop()
            say(f"{name} received{_meaning(name)}: asking {counted(self.spec.ranks, 'rank')} to save and exit within "
                f"{self.spec.grace_s:.0f} s; another signal ends them at once")  # fmt: skip
        return len(self.stops) == 1 and now - self.asked_at < self.spec.grace_s

    def _pause(self, deadline: float | None = None) -> None:
        """Wait until something happens, for TICK_S at most if ranks or a log have to be watched."""
        patience = 60.0 if self.watch is None and self.starter.live else TICK_S
        if deadline is not None:
            patience = min(patience, max(0.0, deadline - self._now()))
        with suppress(Empty):
            self.starter.wake.get(timeout=patience)
            while True:  # handle ranks that end at once, maybe thousands, together
                self.starter.wake.get_nowait()

    def _watched(self) -> Watch:
        if self.watch is None:
            raise ValueError(f"job {self.spec.name} is not watched")
        return self.watch

    # --- the end -------------------------------------------------------------------------------------------------

    def _stopped(self) -> int:
        name = signal.Signals(self.stops[-1]).name
        late = self.asked_at is not None and len(self.stops) == 1
        why = f"not saved within {self.spec.grace_s:.0f} s" if late else f"{name} received"
        say(f"{why}: ending {counted(self.spec.ranks, 'rank')}")
        return 128 + self.stops[-1]

    def _verdict(self, trouble: diagnose.Explanation | None) -> int:
        """Name what failed first, show the end of its log, and return the job's code."""
        self._settle()
        failures = self.starter.failures()
        states = self.watch.states() if self.watch is not None else []
        codes = [state.bye for state in states if state.bye is not None]
        if PREEMPTED in [f.code for f in failures] + codes and all(f.code == PREEMPTED for f in failures):
            self._tell_saved()
            return PREEMPTED
        self._tell_of_suspension(ended=True)
        exits = {**{rank: how for rank in range(self.spec.ranks) if (how := self._last_words(rank))},
                 **{f.rank: f.how for f in failures}}  # fmt: skip
        found = None
        if self.watch is not None:
            pairs = self.watch.probe() if self._may_be_link() else {}
            found = diagnose.explain(
                states, self._now(), self.spec.rank_name, exits, pairs, self.watch.name, self.spec.timeout_s
            ) or (trouble if self.starter.running() else None)  # it recovered, and is ended all the same
        self.took_leave = len(codes) == self.spec.ranks and all(states[f.rank].bye == f.code for f in failures)
        if found is None and (self.took_leave or not failures):
            return self._whole(codes)
        code = self._code(failures, [states[rank] for rank in found.culprits] if found is not None else [])
        why = self._report(failures, found)
        if self.spec.saves:
            note_failure(self.spec.log_dir.parent, code, why)
        return code

    def _tell_saved(self) -> None:
        """Report that the ranks saved and exited, and why if this launcher did not ask them to."""
        last = self.watch.clock.last if self.watch is not None else None
        ranks = counted(self.spec.ranks, "rank")
        if self.stops or not self.spec.saves:
            say(f"preempted: {ranks} saved and exited (exit code {PREEMPTED})")
            return
        step, why = step_left(self.spec.log_dir.parent), why_left(self.spec.log_dir.parent)
        left = f"the {ranks} saved at step {step} and exited (exit code {PREEMPTED})"
        if last is not None and last is not self.told and last.seconds >= SAID_S:
            say(f"the launcher was suspended for {last.seconds:.0f} s; {left}")
        else:
            say(f"preempted: {left}{f': {why}' if why else ''}")

    def _settle(self) -> None:
        """If nothing runs any more, wait until the watch has read the ends of all connections."""
        deadline = time.monotonic() + SETTLE_S
        while self.watch is not None and not self.starter.running() and time.monotonic() < deadline:
            if all(state.closed is not None for state in self.watch.states() if state.joined is not None):
                return
            time.sleep(0.02)

    def _code(self, failures: list[Failure], culprits: list[diagnose.RankState]) -> int:
        """Return the job's exit code: that of the first failure if it is in PASSED_THROUGH, else 1."""
        first = min(failures, key=lambda f: f.at, default=None)
        said = [int((state.failed or {}).get("code", 1)) for state in culprits]
        code = first.code if first is not None else said[0] if said else 1
        return code if code in PASSED_THROUGH else 1

    def _may_be_link(self) -> bool:
        trouble = self._trouble(self._now())
        return trouble is not None and trouble.kind in ("link", "stuck", "failed")

    def _whole(self, codes: list[int]) -> int:
        """Return the exit code if no rank is known to have failed; report one other than 0."""
        if len(codes) == self.spec.ranks:
            code = max(codes)
            if code not in (0, PREEMPTED):
                why = why_left(self.spec.log_dir.parent) or "no rank gave a reason"
                say(f"the ranks exited with code {code}: {why}")
                self._show_log(codes.index(code))
            return code
        code = self.starter.code()
        if code and not self.starter.running():
            say(f"the ranks exited with code {code} and gave no reason")
            self._show_starter()
        return code if code in (0, *PASSED_THROUGH) else 1

    def _report(self, failures: list[Failure], found: diagnose.Explanation | None) -> str:
        """Say what failed, show logs, and return the first line of the text."""
        by_time = sorted(failures, key=lambda f: f.at)
        culprits = found.culprits if found is not None else []
        first = by_time[0] if by_time else None
        if first is not None and (found is None or first.rank not in culprits):
            lines = [f"{self.spec.rank_name(first.rank)} died: {first.how}"]
            if first.how.endswith("killed by SIGKILL"):
                lines.append("  (if it was not killed on purpose: the kernel sends SIGKILL when memory runs out)")
            text = "\n".join(lines)
            culprits = [first.rank]
        else:
            text = found.text if found is not None else ""
        if self.survived is not None and self._now() - self.survived.at < SHORTLY_S:
            text += f"\n  (shortly before, the job was suspended for {self.survived.seconds:.0f} s)"
        say(text)
        for rank in culprits[:2]:
            self._show_log(rank)
        others = sorted(f.rank for f in failures if f.rank not in culprits)
        if others and (found is None or first is None or first.rank not in found.culprits):
            say(f"failed after it: rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}")
        self._show_starter()
        return text.partition("\n")[0]

    def _last_words(self, rank: int) -> str:
        """Return the error that a rank wrote; some ranks fail before they have a heartbeat to send it with."""
        return last_words(self.spec.error_path(rank))

    def _show_log(self, rank: int) -> None:
        path = self.spec.log_path(rank)
        lines = tail(path, self.log_starts.get(rank, 0))
        say("\n".join([f"end of {path}:" if lines else f"{path} is empty", *(f"  | {line}" for line in lines)]))

    def _show_starter(self) -> bool:
        """Show the end of the starter's output in this attempt; return whether there was any."""
        where = self.starter.where()
        lines = tail(Path(where), self.starter_start)[-8:] if where else []
        if lines:
            say("\n".join([f"end of {where}:", *(f"  | {line}" for line in lines)]))
        return bool(lines)


@contextmanager
def handled(handler: Callable[[int, object], None], *numbers: signal.Signals) -> Iterator[None]:
    """Send signals `numbers` to `handler` in the block, except ignored ones (nohup, `&`), if in the main thread."""
    before: dict[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for known, earlier in before.items():
            signal.signal(known, earlier)  # type: ignore[arg-type]


def supervise(
    spec: JobSpec, starter: Starter, host: str, on_code: Callable[[int, list[int]], int] = lambda code, stops: code
) -> int:
    """Run `spec` and return the job's exit code.

    It is 0, a failed rank's 2, 75 if the job was asked to stop and has saved, 1 for any other failure, or 128 + signal.
    `host` is the one address that the watch listens on. `on_code` gets the code and the signals received, while signals
    are still handled, and may change the code (a requeue).
    """
    job = Supervisor(spec, starter, host)
    with handled(job.on_signal, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        return on_code(job.run(), job.stops)
