"""`python -m dist_gpt` and the `dist-gpt` command."""

from dist_gpt.cli import main

if __name__ == "__main__":
    main()
