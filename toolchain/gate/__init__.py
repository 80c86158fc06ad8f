"""The gate of a CI job: checks artifacts against budgets, and against a baseline that is measured in the same job."""

from __future__ import annotations

from toolchain.gate.accepts import Accept, accepts_path, add_accepts, load_accepts
from toolchain.gate.checks import Check
from toolchain.gate.config import GateConfig
from toolchain.gate.result import CellResult, GateFile, GateResult
from toolchain.gate.run import run_gate

__all__ = [
    "Accept",
    "CellResult",
    "Check",
    "GateConfig",
    "GateFile",
    "GateResult",
    "accepts_path",
    "add_accepts",
    "load_accepts",
    "run_gate",
]
