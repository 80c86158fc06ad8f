"""One measuring session in a fresh process, for the runtimes that the device runner does not have built in.

Usage: `python -m toolchain.devices.worker SCHEDULE OUT`; exit codes are the device runner's. Only the runtime of the schedule
is imported: what else a process holds would be counted as the artifact's memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from toolchain.on_device.runner import main
from toolchain.targets import TARGETS, Runner, get_target
from toolchain.targets.base import PRODUCTS
from toolchain.targets.mode import EVERY_MODE


def _opener(name: str) -> Callable[[str, int], Runner]:
    return lambda path, threads: get_target(name).open(Path(path), threads)


def _products(name: str) -> Callable[[str, int], Runner]:
    def opened(path: str, threads: int) -> Runner:
        from toolchain.targets import products

        get_target(name).require_run()
        return products.OPENERS[PRODUCTS + name](path, threads)

    return opened


OPENERS = {
    **{name + mode.suffix: _opener(name + mode.suffix) for name in TARGETS for mode in EVERY_MODE},
    **{PRODUCTS + name: _products(name) for name in TARGETS},
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], OPENERS))
