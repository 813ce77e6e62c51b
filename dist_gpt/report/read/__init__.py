"""Read a run directory: event files, torch traces, NCCL logs."""
