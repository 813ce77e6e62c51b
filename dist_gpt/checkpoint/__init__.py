"""Checkpoints: one file per rank and a manifest, committed by a rename."""
