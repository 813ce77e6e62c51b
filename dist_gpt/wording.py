"""Words of messages that several parts print. Standard library only."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return `1 rank` or `2 ranks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
