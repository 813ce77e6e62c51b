"""The report: a run directory is read, its clocks are aligned, its calls are matched, and what they cost is told."""
