"""The command `slimvit`: verbs, options and exit codes; the work is done below."""

import gc

_collects = gc.isenabled()
gc.disable()  # what is imported stays: looking through it for garbage is a fifth of the time of `slimvit --help`

from toolchain.cli.main import app, main  # noqa: E402

gc.freeze()
if _collects:
    gc.enable()

__all__ = ["app", "main"]
