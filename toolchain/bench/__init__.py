"""Paired, interleaved measurement: what may be said about the latency of two artifacts, and their exact size."""
