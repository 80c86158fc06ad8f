"""Breaks a latency down: the time of the matrix products alone, and the time of each node."""
