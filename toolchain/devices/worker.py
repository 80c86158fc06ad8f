"""One measuring session in a fresh process, for the runtimes that the device runner does not have built in.

Usage: `python -m toolchain.devices.worker SCHEDULE OUT`; exit codes are the device runner's. Only the runtime of the schedule is
imported: what else a process holds would be counted as the artifact's memory.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from toolchain.on_device.runner import main
from toolchain.targets import MODES, TARGETS, Runner, get_target

PRODUCTS = "products/"
"""Before a target's name: the variant is a file of products, see `products_runner`."""


def _opener(name: str) -> Callable[[str, int], Runner]:
    return lambda path, threads: get_target(name).open(Path(path), threads)


def _products(name: str) -> Callable[[str, int], Runner]:
    def opened(path: str, threads: int) -> Runner:
        get_target(name.removeprefix(PRODUCTS)).require_run()
        runner: Runner = importlib.import_module("toolchain.analysis.products_runner").OPENERS[name](path, threads)
        return runner

    return opened


OPENERS = {
    **{name: _opener(name) for name in (*MODES, *TARGETS)},
    **{PRODUCTS + name: _products(PRODUCTS + name) for name in TARGETS},
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], OPENERS))
