"""The gate of a CI job: artifacts held against budgets, and against a baseline that is measured beside them."""

from __future__ import annotations

from toolchain.gate.accepts import Accept, Accepts, accepts_path, add_accepts, load_accepts
from toolchain.gate.config import GateConfig
from toolchain.gate.result import CellResult, Check, GateResult
from toolchain.gate.run import run_gate

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
