"""`python -m launch.tied PROGRAM ARGS...`: become PROGRAM, and die with the process that started this one.

For srun, torchrun and mpirun: killed with SIGKILL, their launcher cannot end them, and they would run on alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Tie and exec; on Linux the tie holds across exec."""
    from launch.worker import tie_to_parent

    if not argv:
        sys.exit("usage: python -m launch.tied PROGRAM [ARGS...]")
    tie_to_parent(os.getppid())
    try:
        os.execvpe(argv[0], list(argv), os.environ)
    except OSError as error:
        sys.exit(f"{argv[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
