"""Plan of a run: traffic, FLOPs and memory of every rank, computed from the configuration alone."""
