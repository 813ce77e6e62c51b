"""Recorder of every training step: its totals go to the events file, inside the window every call and span as well.

Nothing here waits for the device or for another rank while a step runs, and nothing is written before the step is over.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.profiler import record_function

from dist_gpt import __version__, cpu
from dist_gpt.comm.clock import ClockReading
from dist_gpt.comm.group import Group
from dist_gpt.comm.ledger import Ledger
from dist_gpt.comm.probe import Network
from dist_gpt.comm.rendezvous import RankEnv
from dist_gpt.comm.trace_buffer import HostTimer, Tape, Timer
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.schema import Config
from dist_gpt.events import SAVE, TRAIN, Counts, EventFile
from dist_gpt.profile.device import DeviceSampler
from dist_gpt.profile.kernels import kernel_facts
from dist_gpt.profile.memory import MemoryWatch
from dist_gpt.profile.torch_trace import TorchTrace
from dist_gpt.protocol import STARTED, record_failure
from dist_gpt.replica import Rank

TOLD = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "OMP_", "MKL_", "OMPI_COMM_", "PMI_", "UCX_", "FI_", "MASTER_")
"""Prefixes of the environment variables that the header keeps."""
TOLD_BY_NAME = {
    f"SLURM_{name}"
    for name in (
        "JOB_ID", "JOB_NAME", "JOB_NODELIST", "JOB_NUM_NODES", "JOB_PARTITION", "NNODES", "NTASKS", "NTASKS_PER_NODE",
        "CPUS_PER_TASK", "CPUS_ON_NODE", "GPUS_PER_NODE", "GPUS_PER_TASK", "PROCID", "LOCALID", "NODEID", "STEP_ID",
        "RESTART_COUNT", "ARRAY_JOB_ID", "ARRAY_TASK_ID",
    )
}  # fmt: skip
"""Slurm's variables are listed one by one: among the others is a bearer token (SLURM_JWT)."""
SECRET = ("TOKEN", "KEY", "SECRET", "PASS", "CRED", "AUTH", "JWT")
COST_RECORDS = 2_000


@dataclass
class Taken:
    """Duration of one training step; `seconds` is set when the step is over."""

    seconds: float = 0.0


class Recorder:
    """Recorder of the steps of `rank`. `baseline` is the heap in use before the model was built, in bytes."""

    def __init__(self, config: Config, rank: Rank, env: RankEnv, run_dir: Path, baseline: int | None = None) -> None:
        self.config, self.rank, self.baseline = config, rank, baseline
        self.ledger = rank.mesh.ledger
        self.window = config.profile.steps
        self.began = time.perf_counter()
        coords = asdict(rank.mesh.coords)
        path = run_dir / f"events.rank{env.rank}.jsonl"
        self.events = EventFile(path, env.rank, coords, env.attempt, **header(config, rank, env))
        self.tape: Tape | None = None
        self.dropped = self.trained = 0
        self.sampler = DeviceSampler(rank.device)
        wanted = config.profile.torch and env.rank in config.profile.torch_ranks
        self.torch = TorchTrace(run_dir / f"torch.rank{env.rank}.json.gz", rank.device) if wanted else None

    @contextmanager
    def step(self, number: int) -> Iterator[Taken]:
        """Record training step `number`, which runs inside the context and ends with a read of its loss."""
        taken, memory = Taken(), None
        self._open(number)
        before = self.ledger.counts(TRAIN)
        with ExitStack() as stack:
            if number == self._memory_step():
                memory = MemoryWatch(self.rank, self.baseline)
                stack.enter_context(memory.watching())
            if self.tape is not None and self.torch is not None:
                stack.enter_context(self.torch.step(number))
            self.ledger.begin(number)
            self.ledger.tape = self.tape  # not for what happens between steps
            if self.tape is not None:
                self.tape.begin()
            started = time.perf_counter_ns()
            try:
                yield taken
            except BaseException as error:
                record_failure(error)
                self._failed(number)
                raise
            taken.seconds = (time.perf_counter_ns() - started) / 1e9
            more = self._over(number)
        self.trained += 1
        spent = self.ledger.end()
        self.events.step(
            number, TRAIN, taken.seconds, self.ledger.counts(TRAIN).since(before),
            start_ns=started - self.events.base_ns,
            blocked_s={axis: ns / 1e9 for axis, ns in spent.blocked_ns.items()}, data_s=spent.data_ns / 1e9,
            **more,
        )  # fmt: skip
        if memory is not None:
            self.events.fact("memory", memory.fact(number))
        self._close(number)

    def evaluation(self, step: int, phase: str, seconds: float, comm: Counts) -> None:
        """Record a validation after `step` steps: its phase, its seconds, and the traffic `comm`."""
        self.events.step(step, phase, seconds, comm)

    def saved(self, step: int, seconds: float) -> None:
        """Record a checkpoint after `step` steps. It communicates over the store alone: no collective."""
        self.events.step(step, SAVE, seconds, Counts())

    def network(self, found: Network | None) -> None:
        """Record the result of the network probe before the first step, if there was one."""
        if found is not None:
            self.events.fact("probe", found.fact())

    def clock(self, reading: ClockReading | None) -> None:
        """Record a reading of this rank's clock against rank 0's, if there is one."""
        if reading is not None:
            at = reading.at_ns - self.events.base_ns
            self.events.fact("clock", {"at_ns": at, "offset_ns": reading.offset_ns, "error_ns": reading.error_ns})

    def finish(self, differences: list[str]) -> None:
        """End the window and write the closing facts, after the last step or an early stop.

        `differences` says where this rank's traffic differs from the plan; empty if it matches exactly.
        """
        self._end_window()
        if self.window is not None and self.rank.mesh.rank == 0:
            self._measure_kernels()
        for at, reading in self.sampler.samples:
            self.events.fact("sample", {"at_ns": at - self.events.base_ns, **reading})
        if self.torch is not None and self.torch.anchors:
            self.events.fact("torch_trace", self.torch.fact(self.events.base_ns))
        if (engine := self.rank.engine_facts()) is not None:
            self.events.fact("engine", engine)
        for difference in self.ledger.found:
            self.events.fact("difference", asdict(difference))
        end = {
            "differences": differences, "dropped": self.dropped, "record_ns": record_cost_ns(),
            "records_per_step": self.ledger.records / max(1, self.trained), "wall_s": time.perf_counter() - self.began,
        }  # fmt: skip
        self.events.fact("end", end)

    def _measure_kernels(self) -> None:
        """Measure matmuls alone. Training is done: an error here (memory is short) must not end the run."""
        try:
            for fact in kernel_facts(self.config, self.rank.device):
                for name, content in fact.items():
                    self.events.fact(name, content)
        except Exception as error:
            self.events.fact("kernels_failed", {"error": f"{type(error).__name__}: {error}"[:500]})

    def close(self) -> None:
        """Stop sampling and close the events file; also when training failed."""
        self.sampler.stop()
        self.events.close()

    # --- the window --------------------------------------------------------------------------------------------

    def _open(self, number: int) -> None:
        if self.window is None or number != max(1, self.window[0]):
            return
        annotate = record_function if self.torch is not None else None
        self.tape = Tape(make_timer(self.rank.device), self.events.base_ns, annotate)
        self.sampler.start()
        if self.torch is not None:
            self.torch.start()

    def _failed(self, number: int) -> None:
        """Write the tape of a failed step, which holds what led to the failure, and stop the trace.

        On a GPU the tape is not read, which would wait for work that never completes. No error in here may hide the
        failure itself.
        """
        self.ledger.tape = None
        if self.tape is not None and self.rank.device.type == "cpu":
            with suppress(Exception):
                self.events.rows(self.tape.rows(number))
        if self.torch is not None and self.tape is not None:
            with suppress(Exception):
                self.torch.stop()

    def _over(self, number: int) -> dict[str, float]:
        """Write the tape of a completed step; return its CPU time between entries of the step list, if known."""
        self.ledger.tape = None
        if self.tape is None:
            return {}
        between = self.tape.finish()
        self.events.rows(self.tape.rows(number))
        return {"between_cpu_s": between / 1e9} if between is not None else {}

    def _close(self, number: int) -> None:
        if self.window is not None and number >= self.window[1]:
            self._end_window()

    def _end_window(self) -> None:
        if self.tape is None:
            return
        self.dropped += self.tape.dropped
        self.tape = None
        self.sampler.stop()
        if self.torch is not None:
            self.torch.stop()

    def _memory_step(self) -> int | None:
        """Return the step whose memory is measured: next to the window, not inside, since measuring takes time."""
        if self.window is None or self.config.optim.engine != "native":  # DeepSpeed's memory is not known by category
            return None
        first, last = max(1, self.window[0]), self.window[1]
        if first > 1:
            return first - 1
        return last + 1 if last < self.config.train.steps else None


def attempts_in(run_dir: Path, rank: int) -> int:
    """Return the number of attempts that have begun to write rank `rank`'s events: the headers in its file.

    A header may be on the same line as a row that the attempt before it did not complete.
    """
    path = run_dir / f"events.rank{rank}.jsonl"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(b'{"schema":' in line for line in file)


def make_timer(device: torch.device) -> Timer:
    """Return the timer for `device`. Raise ConfigError on a GPU if TORCH_NCCL_BLOCKING_WAIT is set."""
    if device.type == "cuda":
        if os.environ.get("TORCH_NCCL_BLOCKING_WAIT", "0") not in ("", "0"):
            raise ConfigError([
                "profile.steps: with TORCH_NCCL_BLOCKING_WAIT set, device times cannot be measured without "
                "blocking the host; unset it, or run without a window"
            ])  # fmt: skip
        from dist_gpt.comm.device_time import CudaTimer

        return CudaTimer()
    return HostTimer()


def started() -> float:
    """Return when this process, or the one from which the launcher forked it, began, in seconds since 1970."""
    return float(os.environ.get(STARTED) or psutil.Process().create_time())


def header(config: Config, rank: Rank, env: RankEnv) -> dict[str, Any]:
    """Return the facts that identify this rank's process and its place."""
    cuda = rank.device.type == "cuda"
    return {
        "world": env.world,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start_s": round(time.time() - started(), 3),
        "device": torch.cuda.get_device_name(rank.device) if cuda else "cpu",
        "backend": "nccl" if cuda else "gloo",
        "single_copy": rank.mesh.reads_memory,
        "cores": cpu.shared(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "dist_gpt": __version__},
        "environment": told(os.environ),
        "window": config.profile.steps,
        "channels": rank.mesh.ledger.channels,
    }


def told(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that affect how ranks communicate and compute, and none that may hold a secret."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name in TOLD_BY_NAME or (name.startswith(TOLD) and not any(word in name for word in SECRET))
    }


class _Nothing:
    """Backend whose collectives complete at once."""

    def name(self) -> str:
        return "none"

    def allreduce(self, tensors: object, options: object) -> _Nothing:
        return self

    def wait(self) -> None: ...


def record_cost_ns() -> float:
    """Return the ns that one record costs outside of the window, measured on collectives that do nothing."""
    group = Group("tp", (0, 1), 0, _Nothing(), Ledger({"tp": 2}))
    tensor = torch.empty(1)
    started = time.perf_counter_ns()
    for _ in range(COST_RECORDS):
        group.all_reduce(tensor).wait()
    return (time.perf_counter_ns() - started) / COST_RECORDS
