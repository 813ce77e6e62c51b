"""Agreements between the launcher and the ranks: environment variables, exit codes, limits of messages, error files.

Each is defined here and nowhere else. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

BAD_INPUT = 2
"""Exit code after bad input: one message on stderr, and no restart."""
PREEMPTED = 75
"""Exit code of a run that was asked to stop, saved and exited."""
MAX_LINE = 65536
"""Bytes of the longest message between a rank and the launcher's watch, one JSON object per line."""
MAX_ERROR = 2000
"""Characters of the longest error text in a message."""

STORE_FD = "DIST_GPT_STORE_FD"
"""Rank 0 only: number of an inherited socket, bound to MASTER_PORT and listening, for the rendezvous store."""
RUN_DIR = "DIST_GPT_RUN_DIR"
"""Set if a launcher has already made the run directory: ranks then write into it instead of making it."""
LAUNCHER = "DIST_GPT_LAUNCHER"
"""Set by a dist-gpt launcher that has set torchrun's variables itself; its value is shown in messages."""
LAUNCHER_PID = "DIST_GPT_LAUNCHER_PID"
"""Process that a rank must not outlive; `parent`: the one that starts it (srun's daemon, torchrun, mpirun)."""
STARTER = "DIST_GPT_STARTER"
"""srun, torchrun or mpi: the launcher that dist-gpt launch used to start the ranks."""
STARTED = "DIST_GPT_STARTED_S"
"""Start, in seconds since 1970, of the process that a rank was forked from; read by dist_gpt.profile.recorder."""
ERROR_FILE = "DIST_GPT_ERROR_FILE"
"""File for a failing rank's {"time": seconds since 1970, "error": text}, written before it closes its connections:
the earliest one is the culprit, the others failed because of it."""
LOG_DIR = "DIST_GPT_LOG_DIR"
"""Folder of rank{r}.log and rank{r}.error.json if ranks open them themselves, under srun, torchrun or mpirun."""
ATTEMPT = "DIST_GPT_ATTEMPT"
"""Number of times that the launcher has started the ranks before. torchrun always passes 0 to its ranks, so this is
read before TORCHELASTIC_RESTART_COUNT."""
TERMINAL = "DIST_GPT_TERMINAL"
"""Columns of the terminal that shows rank 0's output live; not set if there is none."""
MASTER = "DIST_GPT_MASTER"
"""host:port of the ranks' store, for ranks that find their places themselves; see launch.rank.discover."""
INTERFACE = "DIST_GPT_INTERFACE"
"""Value of launch.interface, for the rank that chooses the master's address."""
CONFIG_HASH = "DIST_GPT_CONFIG_HASH"
"""Digest of the run's config.yaml as the launcher wrote it (launch.rank.node_info.config_digest)."""
WATCH = "DIST_GPT_WATCH"
"""host:port of the launcher's watch (launch.monitor.heartbeat_server); not set if there is none."""
WATCH_TOKEN = "DIST_GPT_WATCH_TOKEN"
"""Password of the watch, hex."""
SILENCE = "DIST_GPT_SILENCE_S"
"""Seconds of silence after which a rank and its launcher give each other up."""
WATCH_FD = "DIST_GPT_WATCH_FD"
"""Descriptor of the socket that said hello to the watch; set by launch.rank.worker for dist_gpt.train.heartbeat."""


def record_failure(error: BaseException) -> None:
    """Write the time and cause of this rank's failure for the launcher. Call this before connections are closed.

    Closing them makes the other ranks fail too, so the earliest time identifies the rank that failed first. Only the
    first call counts; without a launcher nothing happens.
    """
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    with contextlib.suppress(OSError), open(path, "x") as file:
        json.dump({"time": time.time(), "error": f"{type(error).__name__}: {error}"}, file)
