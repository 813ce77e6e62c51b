"""Parallel layers and the executor: explicit groups in, no module state."""
