"""DeepSpeed as optimizer engine."""
