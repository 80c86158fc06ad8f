"""One measuring session in a fresh process, for the runtimes that the device runner does not have built in.

Usage: `python -m toolchain.bench.worker PLAN OUT`; exit codes are the device runner's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from toolchain.bench import products_runner
from toolchain.targets import MODES, TARGETS, Runner, Target
from toolchain.targets.device_runner import main


def _opener(target: Target) -> Callable[[str, int], Runner]:
    return lambda path, threads: target.open(Path(path), threads)


OPENERS = {
    **{name: _opener(target) for name, target in {**MODES, **TARGETS}.items() if target.measures},
    **products_runner.OPENERS,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], OPENERS))
