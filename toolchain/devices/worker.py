"""One measuring session in a fresh process, for the runtimes that the device runner does not have built in.

Usage: `python -m toolchain.devices.worker SCHEDULE OUT`; exit codes are the device runner's. Only the runtime of the schedule
is imported: any other module would be counted as memory of the artifact.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from toolchain.on_device import runner as device_runner
from toolchain.targets import TARGETS, Runner, get_target, is_target
from toolchain.targets.base import PRODUCTS

Opener = Callable[[str, int], Runner]


class Openers(Mapping[str, Opener]):
    """What opens a variant, by the name of its target in any of its modes, and of its products alone."""

    def __getitem__(self, name: str) -> Opener:
        if name in device_runner.OPENERS:
            return device_runner.OPENERS[name]
        target = get_target(name.removeprefix(PRODUCTS))

        def opened(path: str, threads: int) -> Runner:
            if not name.startswith(PRODUCTS):
                return target.open(Path(path), threads)
            from toolchain.targets import products

            target.require_run()
            return products.OPENERS[name](path, threads)

        return opened

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and is_target(name.removeprefix(PRODUCTS))

    def __iter__(self) -> Iterator[str]:
        return iter(TARGETS)

    def __len__(self) -> int:
        return len(TARGETS)


OPENERS = Openers()

if __name__ == "__main__":
    sys.exit(device_runner.main(sys.argv[1:], OPENERS))
