"""The report of a run: read its directory, align its clocks, match its calls, and account for their cost."""
