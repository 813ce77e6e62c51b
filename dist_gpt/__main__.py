"""Entry point of `python -m dist_gpt` and of the `dist-gpt` command."""

import gc

from dist_gpt.cli import main

if __name__ == "__main__":
    try:
        main()
    finally:
        gc.freeze()  # the process ends: a last garbage collection over torch's objects takes a second
