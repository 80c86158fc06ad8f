"""The command `slimvit`: verbs, options and exit codes; the work is done below."""

from toolchain.cli.main import app, main

__all__ = ["app", "main"]
