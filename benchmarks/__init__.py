"""Benchmarks: run some with `python -m benchmarks [NAME ...]`, or `make bench` for the default set."""
