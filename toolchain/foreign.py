"""Other libraries: a runtime's Python module or the line that installs it, and the line of a message that says what is wrong."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

from toolchain.errors import TargetUnavailable


def imported(module: str, target: str, install: str) -> ModuleType:
    """A Python module.

    Args:
        module: its name.
        target: that needs it, for the message.
        install: the line that brings its package.

    Raises:
        TargetUnavailable: it is missing or broken.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a wheel without its libraries raises the latter two
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({error})"
        package = module.partition(".")[0]
        raise TargetUnavailable(target, f"the Python module {package} {why}", install) from error


def first_line(error: BaseException) -> str:
    """The first line of what a library raised, with the kind of the error where it says too little alone."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    text, kind = lines[0].strip()[:200] if lines else "", type(error).__name__
    return f"{kind} {text}".strip() if isinstance(error, LookupError | ArithmeticError) or not text else text


def root(error: BaseException) -> BaseException:
    """The error that caused all others: torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def last_line(text: str) -> str:
    """The last line that says something, "" if none does; those before it are places in a library's sources."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def reason(error: BaseException) -> str:
    """The last line of what an error says, or its kind."""
    return last_line(str(error)) or type(error).__name__
