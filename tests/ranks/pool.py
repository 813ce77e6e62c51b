"""A pool of rank processes on loopback that lives through the test session."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
RANKS = 8


class CellError(RuntimeError):
    """A rank raised, died or did not answer."""


class Pool:
    """Runs cells on `RANKS` processes; a broken pool is replaced before the next cell."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        self._ids = count()

    def certify(
        self, config: dict[str, Any], world: int, plant: str | None = None, timeout_s: float = 120
    ) -> dict[str, Any]:
        """The certificate of `config` on the first `world` ranks. CellError carries the traceback of each rank."""
        if not self.processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(yaml.safe_dump(config))
            cell = {
                "id": f"cell{next(self._ids)}",
                "config": str(path),
                "world": world,
                "folder": folder,
                "plant": plant,
            }
            for process in self.processes[:world]:
                assert process.stdin is not None
                process.stdin.write(json.dumps(cell) + "\n")
                process.stdin.flush()
            answers = self._collect(world, timeout_s)
        errors = [f"rank {r}: {a['error']}" for r, a in enumerate(answers) if "error" in a]
        if errors:
            self.close()
            raise CellError("\n".join(errors))
        result: dict[str, Any] = answers[0]["result"]
        return result

    def _collect(self, world: int, timeout_s: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        answers: list[dict[str, Any]] = []
        for rank, process in enumerate(self.processes[:world]):
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            line = process.stdout.readline() if ready else ""
            answers.append(
                json.loads(line) if line else {"error": f"rank {rank} died or gave no answer in {timeout_s} s"}
            )
        return answers

    def _start(self) -> None:
        server = socket.socket()
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        common = {
            **os.environ,
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(server.getsockname()[1]),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        for rank in range(RANKS):
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            fds: tuple[int, ...] = ()
            if rank == 0:
                env["DIST_GPT_STORE_FD"] = str(server.fileno())
                fds = (server.fileno(),)
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.ranks.worker"],
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=fds,
                text=True,
            )
            self.processes.append(process)
        server.close()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self.processes.clear()
