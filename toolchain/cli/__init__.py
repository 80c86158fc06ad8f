"""The command `slimvit`: verbs, options and exit codes; the work is done below."""

import gc

if (
    _collects := gc.isenabled()
):  # what is imported stays; looking through it for garbage is much of the time of `--help`
    gc.disable()

from toolchain.cli.main import app, main

gc.freeze()
if _collects:
    gc.enable()

__all__ = ["app", "main"]
