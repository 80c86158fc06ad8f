"""Reads ncnn's two files without ncnn: the .param lists layers as text, the .bin holds their numbers in the same order."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.artifacts.inputs import Port
from toolchain.errors import ArtifactError, StorageError
from toolchain.files import reading

MAGIC = "7767517"
"""The first line of a .param."""
LARGEST_RANK = 4
"""How many sizes a tensor has at most, beside the batch."""
TAGS = {0x01306B47: ("f16", 2), 0x000D4B38: ("i8", 1), 0x0002C056: ("f32", 4), 0: ("f32", 4)}
"""Tag before an array of the .bin → (type, bytes of one number)."""
ALIGNED = 4
WEIGHTLESS = frozenset(
    {"Input", "Noop", "Split", "Concat", "Slice", "Crop", "Reshape", "Permute", "Flatten", "Squeeze", "ExpandDims"}
    | {"BinaryOp", "UnaryOp", "Reduction", "Softmax", "Sigmoid", "Swish", "GELU", "ReLU", "HardSigmoid", "HardSwish"}
    | {"TanH", "ELU", "SELU", "CELU", "Mish", "Clip", "Dropout", "Eltwise", "Interp", "Pooling", "Padding", "MatMul"}
    | {"Einsum", "Tile", "Cast", "CumulativeSum", "Erf", "Exp", "Log", "Power", "AbsVal", "Softplus", "SDPA", "Packing"}
)
"""Layers without numbers. A layer that is neither here nor in `_arrays` is unknown."""


@dataclass(frozen=True)
class Layer:
    """One line of a .param.

    Attributes:
        kind: its operator.
        name: what it is called.
        inputs, outputs: the names of the blobs that it reads and writes.
        params: what else the line holds, as it is written: "0=48".
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: tuple[str, ...] = ()

    def number(self, key: int, default: int = 0) -> int:
        """The integer of a key."""
        found = next((text.partition("=")[2] for text in self.params if text.startswith(f"{key}=")), None)
        return default if found is None else int(found)

    def __str__(self) -> str:
        words = (self.kind, self.name, len(self.inputs), len(self.outputs), *self.inputs, *self.outputs, *self.params)
        return " ".join(map(str, words))


@dataclass(frozen=True)
class Numbers:
    """One array of numbers of a layer.

    Attributes:
        layer: its name.
        part: what they are: "weight", "bias".
        type: "f32", "f16" or "i8".
        count: how many.
        size_bytes: what they take in the file, with the tag before them.
        is_matrix: whether the layer multiplies by them.
    """

    layer: str
    part: str
    type: str
    count: int
    size_bytes: int
    is_matrix: bool


def read_layers(path: Path) -> tuple[Layer, ...]:
    """The layers of a .param; raises StorageError if it cannot be read, ArtifactError if it is none or is damaged."""
    try:
        with reading(path):
            lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not ncnn's .param: it is no text") from error
    if not lines or lines[0].strip() != MAGIC:
        raise ArtifactError(f"{path} is not ncnn's .param: it does not begin with {MAGIC}")
    try:
        layer_count, blob_count = map(int, lines[1].split())
        layers = tuple(_layer(line.split()) for line in lines[2:] if line.strip())
        blobs = sum(len(layer.outputs) for layer in layers)
    except (IndexError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    if (len(layers), blobs) != (layer_count, blob_count):
        raise ArtifactError(
            f"{path} is damaged or truncated: it has {len(layers)} layers and {blobs} blobs, and says {layer_count} and "
            f"{blob_count}"
        )
    return layers


def _layer(words: Sequence[str]) -> Layer:
    reads, writes = int(words[2]), int(words[3])
    inputs, outputs, params = words[4 : 4 + reads], words[4 + reads : 4 + reads + writes], words[4 + reads + writes :]
    if len(outputs) != writes or not all("=" in text for text in params):
        raise ValueError(f"the line of layer {words[1]} is incomplete")
    return Layer(words[0], words[1], tuple(inputs), tuple(outputs), tuple(params))


def write_layers(layers: Sequence[Layer]) -> str:
    """The text of a .param."""
    counts = f"{len(layers)} {sum(len(layer.outputs) for layer in layers)}"
    return "\n".join([MAGIC, counts, *map(str, layers), ""])


def left_over(layers: Sequence[Layer]) -> tuple[str, ...]:
    """The blobs that no layer reads: the outputs."""
    read = {blob for layer in layers for blob in layer.inputs}
    return tuple(blob for layer in layers for blob in layer.outputs if blob not in read)


def files_of(path: Path) -> tuple[Path, Path]:
    """The weights and the graph of the model whose .param is at `path`; raises StorageError where one is missing."""
    weights = path.with_suffix(".bin")
    for file in (path, weights):
        if not file.is_file():
            raise StorageError(f"there is no file {file}, which an ncnn model needs")
    return weights, path


def inputs_of(layers: Sequence[Layer]) -> tuple[Port, ...]:
    """What a graph takes, at the one batch that there is; of unknown shape where another tool wrote the file."""
    inputs = [(layer.outputs[0], sample_of(layer)) for layer in layers if layer.kind == "Input"]
    return tuple(Port(name, "float32", None if sample is None else (1, *sample)) for name, sample in inputs)


def sample_of(layer: Layer) -> tuple[int, ...] | None:
    """The shape that an Input layer says, without the batch: [C, H, W], [H, W] or [W]; None where it says none."""
    sizes = [layer.number(key) for key in (2, 11, 1, 0)]
    return tuple(size for size in sizes if size) or None


def shape_params(sample: Sequence[int]) -> tuple[str, ...]:
    """What an Input layer has to hold to say a shape of one to four sizes."""
    keys = {1: (0,), 2: (1, 0), 3: (2, 1, 0), 4: (2, 11, 1, 0)}[len(sample)]
    return tuple(f"{key}={size}" for key, size in sorted(zip(keys, sample, strict=True)))


def read_numbers(layers: Sequence[Layer], path: Path) -> tuple[tuple[Numbers, ...], int]:
    """What the layers hold, in the order of the .bin, and how many of its last bytes nothing is known of.

    Reading ends at a layer whose format is not known here: what comes after it cannot be told apart.

    Raises:
        StorageError: the file cannot be read.
        ArtifactError: it is shorter than its layers need.
    """
    numbers: list[Numbers] = []
    try:
        with reading(path), path.open("rb") as file:
            size = path.stat().st_size
            for layer in layers:
                if (arrays := _arrays(layer)) is None:
                    break
                for part, count, tagged, is_matrix in arrays:
                    if (kind := _type(file.read(ALIGNED)) if tagged else ("f32", 4)) is None:
                        return tuple(numbers), size - sum(each.size_bytes for each in numbers)
                    taken = -(-count * kind[1] // ALIGNED) * ALIGNED
                    file.seek(taken, 1)
                    numbers.append(
                        Numbers(layer.name, part, kind[0], count, taken + (ALIGNED if tagged else 0), is_matrix)
                    )
    except struct.error as error:
        raise ArtifactError(f"{path} is truncated: its .param has more layers") from error
    rest = size - sum(each.size_bytes for each in numbers)
    if rest < 0:
        raise ArtifactError(f"{path} is truncated: it has {size} bytes, and its layers need {size - rest}")
    return tuple(numbers), rest


def _type(tag: bytes) -> tuple[str, int] | None:
    return TAGS.get(struct.unpack("<I", tag)[0])


def _arrays(layer: Layer) -> tuple[tuple[str, int, bool, bool], ...] | None:
    """(part, count, whether a tag says its type, whether the layer multiplies by it), in the order in which ncnn reads them.

    None for a layer of which nothing is known here.
    """
    n = layer.number
    match layer.kind:
        case kind if kind in WEIGHTLESS:
            return ()
        case "Convolution" | "ConvolutionDepthWise" if not n(8) and not n(19):
            return ("weight", n(6), True, True), *_bias(n(0) if n(5) else 0)
        case "InnerProduct" if not n(8):
            return ("weight", n(2), True, True), *_bias(n(0) if n(1) else 0)
        case "Gemm" if not n(18):
            rows, columns, inner = n(7), n(8), n(9)
            shared = {0: 1, 1: rows, 2: rows, 3: rows * columns, 4: columns}.get(n(10), 0)
            sizes = ("weight", rows * inner, n(4)), ("weight", columns * inner, n(5)), ("bias", shared, n(6))
            return tuple((part, count, True, part == "weight") for part, count, constant in sizes if constant)
        case "LayerNorm" | "InstanceNorm":
            return (("weight", n(0), False, False), *_bias(n(0))) if n(2, 1) else ()
        case "RMSNorm":
            return (("weight", n(0), False, False),) if n(2, 1) else ()
        case "GroupNorm":
            return (("weight", n(1), False, False), *_bias(n(1))) if n(3, 1) else ()
        case "BatchNorm":
            return tuple((part, n(0), False, False) for part in ("weight", "mean", "variance", "bias"))
        case "MemoryData" if n(21, 1) == 1:
            return (("", math.prod(size for key in (0, 1, 11, 2) if (size := n(key))), False, False),)
        case "PReLU":
            return (("slope", n(0), False, False),)
        case _:
            return None


def _bias(count: int) -> tuple[tuple[str, int, bool, bool], ...]:
    return (("bias", count, False, False),) if count else ()
