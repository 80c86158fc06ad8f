"""The result of a precision converter: a graph, and the references that its weights and scales are checked against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray


@dataclass(frozen=True)
class Conversion:
    """A converted graph, and the references to check it against.

    Attributes:
        model: the graph.
        reference: the fp32 graph, equal as a function to the one given, whose weights were rounded.
        ranges: quantised activation → max|x| over the calibration images, where scales are fixed.
        smoothed: whether the reference is another graph than the one given.
        moments: linear → E[x̂x̂ᵀ] of what it reads, with a 1 at its end, float64 [in + 1, in + 1], where the reference was rounded
            for that.
        left: linears that keep a finer type, fp32 in an int8 graph and int8 in an int4 graph, by the names of their nodes in the fp32
            graph.
        notes: a sentence on each choice that was made.
        plain: makes the graph without smoothing; None where smoothing is not optional.
    """

    model: onnx.ModelProto
    reference: onnx.ModelProto
    ranges: Mapping[str, float] = field(default_factory=dict)
    smoothed: bool = False
    moments: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    left: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    plain: Callable[[], Conversion] | None = None
