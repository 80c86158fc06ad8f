"""The command `slimvit`: verbs, options and exit codes; the work is done below."""

import gc

# What is imported stays: looking through it for garbage is much of the time of `--help`.
collects = gc.isenabled()
gc.disable()
try:
    from toolchain.cli.main import app, main
finally:
    gc.freeze()
    if collects:
        gc.enable()

__all__ = ["app", "main"]
