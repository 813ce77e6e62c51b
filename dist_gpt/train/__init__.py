"""The training loop of one process and what surrounds it."""
