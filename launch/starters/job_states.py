"""Explain Slurm's job states in plain words, and read its exit codes."""

from __future__ import annotations

import signal

from dist_gpt.config.errors import ConfigError
from dist_gpt.protocol import PREEMPTED

WORDS = {
    "BOOT_FAIL": "a node failed to boot, so the job could not start; submit it again",
    "CANCELLED": "it was cancelled by a user or an administrator (scancel)",
    "COMPLETED": "done",
    "COMPLETING": "its processes are being cleaned up",
    "CONFIGURING": "its nodes are being prepared",
    "DEADLINE": "it could not end before its deadline, so Slurm ended it",
    "FAILED": "it failed",
    "NODE_FAIL": "one of its nodes failed; submit it again: it continues from its newest checkpoint",
    "OUT_OF_MEMORY": "it used more memory than it requested: request more (launch.slurm.options: {mem: ...}), or "
    "reduce train.micro_batch",
    "PENDING": "waiting in the queue",
    "PREEMPTED": "another job took its nodes; unless Slurm requeues it by itself, submit it again: "
    "it continues from its newest checkpoint",
    "REQUEUED": "back in the queue",
    "REQUEUE_FED": "back in the queue of another cluster",
    "REQUEUE_HOLD": "back in the queue, held: release it with scontrol release",
    "RESIZING": "its size is changing",
    "RESV_DEL_HOLD": "held, because its reservation is gone: release it with scontrol release",
    "REVOKED": "it runs on another cluster of the federation",
    "RUNNING": "running",
    "SIGNALING": "receiving a signal",
    "SPECIAL_EXIT": "back in the queue, held, because of its exit code: release it with scontrol release",
    "STAGE_OUT": "its files are being staged out",
    "STOPPED": "stopped (SIGSTOP); it keeps its nodes",
    "SUSPENDED": "suspended while another job uses its nodes",
    "TIMEOUT": "its time limit was reached: request more (launch.slurm.time), or continue with --resume auto",
}
"""Job states of squeue (slurm.schedmd.com/squeue.html#SECTION_JOB-STATE-CODES) and of sacct."""

ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
"""Final states (a job that is requeued goes to PENDING)."""


def code_of(exit_code: str) -> tuple[int, int]:
    """Return (exit code, signal) of Slurm's `3:0`. Raise ConfigError if it is not an exit code."""
    code, colon, number = exit_code.partition(":")
    if not (code.isascii() and code.isdigit()) or (colon and not (number.isascii() and number.isdigit())):
        raise ConfigError([f"{exit_code!r} is not a Slurm exit code, for example 1:0"])
    return int(code), int(number or 0)


def base_state(state: str) -> str:
    """Return CANCELLED for `CANCELLED by 1000` and `CANCELLED+`."""
    return (state.split() or [""])[0].rstrip("+").upper()


def state_in_words(state: str, exit_code: str = "0:0") -> str:
    """Return one sentence: `FAILED: it failed with exit code 2 (bad input)`."""
    base = base_state(state)
    words = WORDS.get(base, "unknown state; see man squeue")
    code, number = code_of(exit_code)
    if base in ENDED - {"COMPLETED"} and number:
        words += f" (ended by {_signal_name(number)})"
    elif base == "FAILED" and code == PREEMPTED:
        return "it was asked to stop, saved and exited (exit code 75, which Slurm calls FAILED)"
    elif base == "FAILED":
        meaning = {1: "the run failed", 2: "bad input"}.get(code)
        words += f" with exit code {code}" + (f" ({meaning})" if meaning else "")
    return f"{base or 'no state'}: {words}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
