"""`python -m dist_gpt` and the `dist-gpt` command."""

import gc

from dist_gpt.cli import main

if __name__ == "__main__":
    try:
        main()
    finally:
        gc.freeze()  # the process ends: looking through all of torch's objects for garbage would take it a second
