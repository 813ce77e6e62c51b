"""Takes the cluster down when the session that started it has died, however it died.

python -m tests.cluster.guard FOLDER: standard input is a pipe from the session. "done" means that the session has
cleaned up itself; the pipe's end without it means that it was killed. The session's lock is inherited, so that the
next session waits until all is gone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.cluster import network


def main(folder: str) -> None:
    if "done" not in sys.stdin.read():
        network.remove(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
