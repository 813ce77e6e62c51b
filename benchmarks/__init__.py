"""What is compared with whom, each one command: `python -m benchmarks [NAME ...]`, all of them by `make bench`."""
