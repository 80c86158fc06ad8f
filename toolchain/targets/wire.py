"""Messages between a session and a child process: the length of a JSON header, the header, and the arrays that it lists."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ARRAYS = "arrays"
LENGTH = 4
"""Bytes of the length, the least significant first."""


def send(stream: IO[bytes], message: Mapping[str, object], arrays: Mapping[str, Array] | None = None) -> None:
    """Writes a message, and arrays by name after it; raises OSError where nobody reads."""
    held = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    kinds = [[name, list(array.shape), str(array.dtype)] for name, array in held.items()]
    header = json.dumps({**message, ARRAYS: kinds}).encode()
    stream.write(len(header).to_bytes(LENGTH, "little") + header)
    for array in held.values():
        stream.write(array.tobytes())
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, Array]]:
    """The next message and its arrays; raises EOFError where the other side is gone, ValueError for what is no message."""
    message = json.loads(_read(stream, int.from_bytes(_read(stream, LENGTH), "little")))
    if not isinstance(message, dict):
        raise ValueError(f"{message!r} is no header")  # noqa: TRY004 - as of what is no JSON
    arrays = {}
    for name, shape, kind in message.pop(ARRAYS, ()):
        arrays[name] = np.frombuffer(_read(stream, math.prod(shape) * np.dtype(kind).itemsize), kind).reshape(shape)
    return message, arrays


def _read(stream: IO[bytes], count: int) -> bytes:
    if len(content := stream.read(count)) < count:
        raise EOFError
    return content
