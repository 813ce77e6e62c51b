"""Parallel layers, flat buffers and the executor; groups are passed in explicitly, never global."""
