"""Start the ranks of a job. Torch-free: runs once on the submitting side, or in a rank before its program starts."""
