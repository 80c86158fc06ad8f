"""Checks that a .tflite file holds the weights of its ONNX file, bit for bit and integer for integer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.artifacts.half import in_fp16
from toolchain.artifacts.tflite_reading import Graph, StoredTensor, read_tflite
from toolchain.errors import ArtifactError
from toolchain.targets.litert.program import Source, layouts

Array = NDArray[Any]
PRODUCTS = {"int8": "INT8-DYNAMIC", "float16": "HALF", "float32": "FLOAT"}
"""Type of a stored weight → the type of its product, as engine.json has it for all targets."""


def require_weights(source: Source, path: Path) -> dict[str, int]:
    """Type of matrix products → how many there are with a stored weight, in each graph of a file.

    Every int8 weight has the codes and scales of the ONNX file, every fp16 weight its numbers; of fp32 weights a converter may
    fold what is around them, and parity tells.

    Args:
        source: what the file was made from.
        path: the .tflite file.

    Raises:
        ArtifactError: a weight is another one, is missing, or is not to be had in fp16; or the graphs differ in what they multiply by.
    """
    model = read_tflite(path)
    counts = [Counter(PRODUCTS.get(each.type, each.type) for each in _weights(graph)) for graph in model.graphs]
    if any(count != counts[0] for count in counts):
        raise ArtifactError(f"{path.name}: its signatures have other products: {counts}")
    for graph in model.graphs:
        named = {each.name: each for each in _weights(graph)}
        for name, codes in source.codes.items():
            _require(path, named, name, codes.codes.T, "int8", codes.scales)
        for name in sorted(source.halves):
            half = rounded(path, name, source.weights[name])
            stored = name if name in named else _twin(source, named, name)
            values = named[stored].values if stored in named else half
            wanted = next((each for each in layouts(half) if np.array_equal(each, values)), half)
            _require(path, named, stored, wanted, "float16")
        halves = [each.name for each in named.values() if each.type == "float16"]
        if source.precision == "fp16" and (strange := sorted(set(halves) - source.halves)):
            raise ArtifactError(f"{path.name}: {', '.join(strange)} is no weight of {source.file.path.name}")
    return dict(counts[0])


def _weights(graph: Graph) -> Iterator[StoredTensor]:
    return filter(None, map(graph.weight, graph.nodes))


def _twin(source: Source, named: Iterable[str], name: str) -> str:
    """The weight with the same numbers that a file has in place of one, whose name it then bears; the weight itself where none is."""
    same = (each for each in named if each in source.weights)
    return next((each for each in same if np.array_equal(source.weights[each], source.weights[name])), name)


def rounded(path: Path, name: str, weight: Array) -> Array:
    """A weight of a file in fp16, with the scale that was folded into it; raises ArtifactError where fp16 has no such numbers.

    A layer scale may leave single outputs below 6e-5; `in_fp16` is about the whole weight.
    """
    if (half := in_fp16(weight)) is None:
        range_ = np.finfo(np.float16)
        raise ArtifactError(
            f"{path.name}: {name} times the scale behind it comes to {np.abs(weight).max(initial=0):.2g} at most, and fp16 has its "
            f"digits from {range_.tiny:.1g} to {range_.max:.0f}; build from the fp32 or the int8-dynamic file"
        )
    return half


def _require(
    path: Path, named: dict[str, StoredTensor], name: str, expected: Array, kind: str, scales: Array | None = None
) -> None:
    tensor = named.get(name)
    if tensor is None or tensor.type != kind:
        found = "is missing" if tensor is None else f"is {tensor.type}"
        raise ArtifactError(f"{path.name}: the weight of {name} {found}; the ONNX file has it in {kind}")
    if tensor.values.shape != expected.shape or not np.array_equal(tensor.values, expected):
        raise ArtifactError(f"{path.name}: the {kind} numbers of {name} are not those of the ONNX file")
    if scales is not None and (tensor.axis != 0 or not np.array_equal(tensor.scales, scales)):
        raise ArtifactError(f"{path.name}: the scales of {name} are not those of the ONNX file")
