"""Paired, interleaved measurement: workloads, raw samples, and what may be said about them."""
