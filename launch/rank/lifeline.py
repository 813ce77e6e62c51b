"""Become PROGRAM and die with process PID, which started this one: `python -m launch.rank.lifeline PID PROGRAM ...`.

For srun, torchrun and mpirun: a launcher killed with SIGKILL cannot end them, and they would keep running alone. The
launcher passes PID: when this process looks, its parent may be another already.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Tie this process to its parent and exec the program; on Linux the tie holds across exec."""
    from launch.rank.worker import tie_to_parent

    if len(argv) < 2 or not argv[0].isdecimal():
        sys.exit("usage: python -m launch.rank.lifeline PID PROGRAM [ARGS...]")
    program = list(argv[1:])
    tie_to_parent(int(argv[0]))
    try:
        os.execvpe(program[0], program, os.environ)
    except OSError as error:
        sys.exit(f"{program[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
