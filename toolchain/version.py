"""Name and version of this program."""

from __future__ import annotations

from importlib.metadata import version


def tool() -> str:
    """Name and version of this program."""
    return f"slimvit {version('slimvit')}"
