"""The plan: what every rank will send, compute and hold, from config arithmetic alone."""
