"""What runs beside a rank or instead of the launcher: entry, discovery of ranks, facts of the node."""
