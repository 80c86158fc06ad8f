"""A process that works in bursts beside a measurement; it ends with its block, and when its parent is killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

LOAD = """import numpy as np, os, random, time
r, x = random.Random({seed}), np.ones((600, 600), np.float32)
while os.getppid() == {parent}:
    end = time.time() + r.uniform(0.2, 2)
    while time.time() < end: x @ x
    time.sleep(r.uniform(0.2, 2))
"""
"""A process that works in bursts, and ends by itself once its parent was killed: left behind, it would be beside every
experiment that follows."""


@contextlib.contextmanager
def load(seed: int, *, wanted: bool) -> Iterator[subprocess.Popen[bytes] | None]:
    """Bursts of work on one core, of 0.2 to 2 s with pauses of that length, by the process given, while the block runs."""
    if not wanted:
        yield None
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    code = LOAD.format(seed=seed, parent=os.getpid())
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        try:
            yield process
        finally:
            process.kill()
