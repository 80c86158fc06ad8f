"""Conversion of numbers to fp16, refused where too many digits would be lost."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ROUNDING = 2.0**-11
"""Relative rounding error of fp16 for a normal number."""


def in_fp16(values: Array) -> Array | None:
    """The numbers in fp16; None if their total rounding error exceeds that of normal fp16 numbers.

    fp16 ends at 65504, and has fewer digits below 6e-5. A few small numbers add little to the total error.
    """
    exact = values.astype(np.float64)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.linalg.norm(half - exact) <= ROUNDING * np.linalg.norm(exact) else None
