"""Messages between a session and the process that runs ncnn: a line of JSON, and the arrays that it names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ARRAYS = "arrays"


def send(stream: IO[bytes], message: Mapping[str, object], arrays: Mapping[str, Array] | None = None) -> None:
    """Writes a message, and arrays by name after it; raises OSError where nobody reads."""
    held = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    kinds = [[name, list(array.shape), str(array.dtype)] for name, array in held.items()]
    stream.write(json.dumps({**message, ARRAYS: kinds}).encode() + b"\n")
    for array in held.values():
        stream.write(array.tobytes())
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, Array]]:
    """The next message and its arrays; raises EOFError where the other side is gone."""
    if not (line := stream.readline()).endswith(b"\n"):
        raise EOFError
    message, arrays = json.loads(line), {}
    for name, shape, kind in message.pop(ARRAYS):
        size = math.prod(shape) * np.dtype(kind).itemsize
        if len(content := stream.read(size)) < size:
            raise EOFError
        arrays[name] = np.frombuffer(content, kind).reshape(shape)
    return message, arrays
