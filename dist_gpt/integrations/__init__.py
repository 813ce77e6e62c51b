"""Engines of other projects."""
