"""A pool of rank processes on loopback that lives through the test session."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
RANKS = 8


class CellError(RuntimeError):
    """A rank raised, died or did not answer."""


class Pool:
    """Runs cells on `RANKS` processes; a broken pool is replaced before the next cell.

    `dry_everywhere`: every rank of a cell makes a dry run, not one pipeline alone.
    """

    def __init__(self, dry_everywhere: bool = True) -> None:
        self.dry_everywhere = dry_everywhere
        self.parent: subprocess.Popen[bytes] | None = None  # the ranks are its children, in a session of their own
        self.cells: list[IO[str]] = []
        self.answers: list[IO[str]] = []
        self._ids = count()

    def certify(
        self,
        config: dict[str, Any],
        world: int,
        plant: str | None = None,
        grid: str | None = None,
        timeout_s: float = 120,
    ) -> dict[str, Any]:
        """The certificate of `config` on the first `world` ranks, with `plant_hits` added: how often the planted bug
        was run into. `grid` replaces the schedule's orders. CellError carries the traceback of each rank."""
        if self.parent is None:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(yaml.safe_dump(config))
            number = next(self._ids)
            cell = {"id": f"cell{number}", "number": number, "dry_everywhere": self.dry_everywhere}
            cell |= {"config": str(path), "world": world, "folder": folder, "plant": plant, "grid": grid}
            line = json.dumps(cell)
            for pipe in self.cells[:world]:
                with suppress(BrokenPipeError):  # a dead rank: its missing answer says so
                    print(line, file=pipe, flush=True)
            answers = self._collect(world, timeout_s)
        errors = [f"rank {r}: {a['error']}" for r, a in enumerate(answers) if "error" in a]
        if errors:
            self.close()
            raise CellError("\n".join(errors))
        return {**answers[0]["result"], "plant_hits": sum(a["hits"] for a in answers)}

    def _collect(self, world: int, timeout_s: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        answers: list[dict[str, Any]] = []
        for rank, pipe in enumerate(self.answers[:world]):
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            line = pipe.readline() if ready else ""
            answers.append(
                json.loads(line) if line else {"error": f"rank {rank} died or gave no answer in {timeout_s} s"}
            )
        return answers

    def _start(self) -> None:
        server = socket.socket()
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        theirs: list[tuple[int, int]] = []
        for _ in range(RANKS):
            (cell_out, cell_in), (answer_out, answer_in) = os.pipe(), os.pipe()
            self.cells.append(os.fdopen(cell_in, "w"))
            self.answers.append(os.fdopen(answer_out))
            theirs.append((cell_out, answer_in))
        fds = [server.fileno(), *(fd for pair in theirs for fd in pair)]
        pairs = [f"{reading},{writing}" for reading, writing in theirs]
        self.parent = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.worker", str(server.fileno()), *pairs],
            cwd=ROOT,
            env={
                **os.environ,
                "WORLD_SIZE": str(RANKS),
                "LOCAL_WORLD_SIZE": str(RANKS),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(server.getsockname()[1]),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=fds,
            start_new_session=True,
        )
        server.close()
        for pair in theirs:
            for fd in pair:
                os.close(fd)

    def close(self) -> None:
        """End the processes, all of them and only them."""
        if self.parent is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.parent.pid, signal.SIGKILL)
            self.parent.wait()
            self.parent = None
        for pipe in (*self.cells, *self.answers):
            with suppress(BrokenPipeError):
                pipe.close()
        self.cells.clear()
        self.answers.clear()
