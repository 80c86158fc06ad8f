"""The gate of a CI job: artifacts held against budgets, and against a baseline that is measured beside them."""

from __future__ import annotations

from toolchain.bench.gate.accepts import Accept, Accepts, accepts_path, add_accepts, load_accepts
from toolchain.bench.gate.config import GateConfig
from toolchain.bench.gate.result import CellResult, Check, GateResult
from toolchain.bench.gate.run import run_gate

__all__ = [
    "Accept",
    "Accepts",
    "CellResult",
    "Check",
    "GateConfig",
    "GateResult",
    "accepts_path",
    "add_accepts",
    "load_accepts",
    "run_gate",
]
