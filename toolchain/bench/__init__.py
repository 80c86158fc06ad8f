"""Paired, interleaved measurement: what may be said about the latency of two artifacts, and their exact size."""

from __future__ import annotations

from toolchain.bench.compare import compare
from toolchain.bench.protocol import Comparison
from toolchain.bench.samples import Design, Scenario
from toolchain.bench.size import artifact_files, artifact_size_bytes
from toolchain.bench.summary import summary

__all__ = ["Comparison", "Design", "Scenario", "artifact_files", "artifact_size_bytes", "compare", "summary"]
