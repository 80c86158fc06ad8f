"""Numbers in fp16, where it has digits for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ROUNDING = 2.0**-11
"""What fp16 loses of a number that has all its digits, as a share of it."""


def in_fp16(values: Array) -> Array | None:
    """The numbers in fp16; None where that loses more of them, taken together, than of numbers that have all their digits.

    Above 65504 fp16 has no numbers, and below 6e-5 few digits. Single small numbers lose little next to the others.
    """
    exact = values.astype(np.float64)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.linalg.norm(half - exact) <= ROUNDING * np.linalg.norm(exact) else None
