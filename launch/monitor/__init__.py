"""Supervision of a running job: heartbeats, checks before the start, diagnosis of failures."""
