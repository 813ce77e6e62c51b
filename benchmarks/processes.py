"""The parent's side of worker processes: start them, send requests through pipes, end them. Torch-free.

An idle worker is blocked in a read of its standard input and uses no CPU time. It ends when its standard input is
closed, and dies with this process even if this one is killed (`launch.rank.worker`).
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

from benchmarks.pairs import Sample
from dist_gpt.config.schema import Config
from dist_gpt.protocol import LAUNCHER_PID, STORE_FD
from launch.spec import WORKER

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
TIMEOUT_S = 900.0
CLOSE_S = 5.0
SETTLE_S = 0.02
"""Pause between two measurements: OpenMP's threads spin for some milliseconds before they sleep."""
OF_PEERS = {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore::FutureWarning"}
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", STORE_FD)


class WorkerError(RuntimeError):
    """Error of a worker that failed, died or did not answer."""


class Worker:
    """One process that answers each line of JSON with a line of JSON."""

    def __init__(
        self, name: str, argv: Sequence[str], environment: dict[str, str] | None = None, inherited: Sequence[int] = ()
    ) -> None:
        self.name = name
        inherit = {key: value for key, value in os.environ.items() if key not in _OF_A_RANK}
        self.process = subprocess.Popen(
            [sys.executable, *argv], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**inherit, LAUNCHER_PID: str(os.getpid()), **(environment or {})}, pass_fds=inherited,
        )  # fmt: skip

    def tell(self, message: dict[str, Any]) -> None:
        """Send a request. Its answer is read with `hear`."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the worker died: `hear` raises
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def hear(self, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Return the answer to the oldest open request. Raise WorkerError if none comes or it reports an error."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            ended = self.process.wait(CLOSE_S) if ready else None
            how = f"ended with exit code {ended}" if ready else f"gave no answer in {timeout_s:.0f} s"
            raise WorkerError(f"{self.name} {how}; its own message, if any, is above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return its answer."""
        self.tell(message)
        return self.hear()

    def close(self) -> None:
        """Close the input of the worker and wait for its end; kill it after CLOSE_S."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Team:
    """Processes that train one model together: `python -m benchmarks.workers`, one per rank, or a single plain one."""

    def __init__(
        self,
        side: str,
        config: Config,
        threads: int,
        same_weights: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.workers: list[Worker] = []
        self.cpu_s, self.steps = 0.0, 0  # CPU seconds of the mean rank (all threads), and the steps they took
        ranks = config.world_size if side not in ("plain", "stock") else 1
        order = {
            "side": side, "threads": threads, "same_weights": same_weights, "config": config.model_dump(mode="json"),
            "options": dict(options or {}),
        }  # fmt: skip
        try:
            self._start(side, ranks, threads)
            answers = self._ask_all(order)
            self.memory_at_start = [answer["rss_bytes"] for answer in answers]
            self.memory_imported = [answer["imported_bytes"] for answer in answers]
        except BaseException:
            self.close()
            raise

    def _start(self, side: str, ranks: int, threads: int) -> None:
        with socket.create_server((HOST, 0)) as server:  # rank 0 inherits it and serves the store on it
            for rank in range(ranks):
                environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **OF_PEERS}
                inherited = []
                if ranks > 1:
                    environment |= {
                        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": HOST,
                        "MASTER_PORT": str(server.getsockname()[1]),
                    }  # fmt: skip
                    if rank == 0:
                        inherited = [server.fileno()]
                        environment[STORE_FD] = str(server.fileno())
                argv = (*WORKER, "benchmarks.workers")
                self.workers.append(Worker(f"{side} rank {rank}", argv, environment, inherited))

    def _ask_all(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        for worker in self.workers:
            worker.tell(message)
        return [worker.hear() for worker in self.workers]

    def run(self, steps: int, mode: str = "on") -> Sample:
        """Train `steps` steps, timed from the first rank's start to the last one's end (all share one clock)."""
        time.sleep(SETTLE_S)
        answers = self._ask_all({"do": "steps", "steps": steps, "mode": mode})
        self.cpu_s, self.steps = self.cpu_s + fmean(a["cpu_s"] for a in answers), self.steps + steps
        seconds = max(a["ended"] for a in answers) - min(a["started"] for a in answers)
        return Sample(seconds, fmean(a["loss"] for a in answers))  # ours is already the mean over ranks

    def build(self, config: Config, options: Mapping[str, Any]) -> None:
        """Build another model in the same processes, which starts from its first step."""
        self._ask_all({"do": "build", "config": config.model_dump(mode="json"), "options": dict(options)})

    def step_memory(self, steps: int) -> list[int]:
        """Return per process the peak resident size in bytes during `steps` steps, less the size after the imports."""
        self._ask_all({"do": "forget"})
        self.run(steps)
        peaks = [answer["peak_bytes"] for answer in self._ask_all({"do": "memory"})]
        return [peak - before for peak, before in zip(peaks, self.memory_imported, strict=True)]

    def sent_bytes(self) -> list[dict[str, float]]:
        """Return per process the bytes that it sends in one step, by operation, as it counts them itself."""
        return [answer["sent_bytes"] for answer in self._ask_all({"do": "traffic"})]

    def peak_bytes(self) -> list[int]:
        """Return per process the peak resident size in bytes so far, less the size after `import torch`."""
        peaks = [answer["peak_bytes"] for answer in self._ask_all({"do": "memory"})]
        return [peak - start for peak, start in zip(peaks, self.memory_at_start, strict=True)]

    def close(self) -> None:
        """End all workers. All inputs are closed first, so that no rank waits for another that still runs."""
        for worker in self.workers:
            with suppress(BrokenPipeError):
                assert worker.process.stdin is not None
                worker.process.stdin.close()
        with ExitStack() as stack:
            for worker in self.workers:
                stack.callback(worker.close)

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
