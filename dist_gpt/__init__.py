"""Plan, run and report distributed GPT training."""

__version__ = "0.1.0"
