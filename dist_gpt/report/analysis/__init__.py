"""Turn a run's events into the report's document."""
