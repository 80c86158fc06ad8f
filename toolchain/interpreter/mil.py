"""A Core ML package as a function: its program, read back with its weights and carried out operator by operator in torch.

Apple's runtime exists only on Apple's systems, so this interpreter is how a package is compared with its source file.
Each operator is computed in fp32 and rounded once to the type that the program gives its output: an overflow of fp16 shows.
Without that rounding the program shows what it is, apart from what its types cost.
Neither is the arithmetic of the Neural Engine, nor of any other device.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolchain.errors import ArtifactError, StorageError
from toolchain.interpreter.lifetimes import last_uses
from toolchain.interpreter.mil_operators import OPERATORS

Array = NDArray[Any]
CONST, SHIFT_SCALE = "const", "constexpr_blockwise_shift_scale"
PRODUCTS, WEIGHTED = ("linear", "matmul"), ("linear", "conv")
STORED = {"fp16": "f16", "fp32": "f32", "int8": "i8"}
FLOATS = ("fp16", "fp32")
"""MIL's floating types that are understood; all are held as fp32."""


class MilProgram:
    """The one function of a package.

    Attributes:
        input_names, output_names: the package's own, in its order.
    """

    def __init__(self, path: Path, *, rounded: bool = True) -> None:
        """Reads a package; coremltools must be there.

        Args:
            path: the package.
            rounded: whether `infer` rounds what is computed to the types that the program declares.

        Raises:
            StorageError: there is none.
            ArtifactError: it is damaged, or has an operator that is not understood, which the message names.
        """
        self.path, self._rounded = path, rounded
        program = _loaded(path)
        if [*program.functions] != ["main"]:
            raise ArtifactError(
                f"{path} has the functions {', '.join(program.functions)}; one called main is understood"
            )
        function = program.functions["main"]
        self.input_names: tuple[str, ...] = tuple(function.inputs)
        self._outputs: Sequence[Any] = function.outputs
        self.output_names: tuple[str, ...] = tuple(var.name for var in function.outputs)
        self._operations = [op for op in function.operations if op.op_type != CONST]
        for op in self._operations:
            if op.op_type not in OPERATORS:
                raise ArtifactError(
                    f"{path}: {op.name!r} is a {op.op_type}, which the interpreter of Core ML programs does not understand"
                )
        used = [[var.name for var in (*_read(op), *op.outputs)] for op in self._operations]
        self._done = last_uses(used, self.output_names)
        self._constants: dict[str, object] = {}

    @property
    def operators(self) -> Counter[str]:
        """Operator → how often the program has it."""
        return Counter(op.op_type for op in self._operations)

    @property
    def products(self) -> Counter[str]:
        """MIL's type → how many linears and matrix products give it."""
        return Counter(_type(op.outputs[0]) for op in self._operations if op.op_type in PRODUCTS)

    @property
    def weights(self) -> Counter[str]:
        """Type, as engine.json has it → how many linears and convolutions hold their weight in it."""
        held: Counter[str] = Counter()
        for op in self._operations:
            if op.op_type in WEIGHTED and (weight := op.inputs["weight"]).op is not None:
                packed = weight.op.op_type == SHIFT_SCALE
                held[STORED.get(kind := _type(weight.op.inputs["data"] if packed else weight), kind)] += 1
        return held

    @property
    def codes(self) -> dict[str, tuple[Array, Array]]:
        """Linear → (its int8 weight [out, in], its scales [out, 1]), for those that hold one."""
        found = {}
        for op in self._operations:
            weight = op.inputs["weight"] if op.op_type in WEIGHTED else None
            if weight is not None and weight.op is not None and weight.op.op_type == SHIFT_SCALE:
                given = weight.op.inputs
                found[op.name] = given["data"].val, given["scale"].val
        return found

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Output name → array for one call.

        Raises:
            ArtifactError: an operator has an argument that is not understood, or gives another shape than the program says.
        """
        if set(feeds) != set(self.input_names):
            raise ArtifactError(
                f"{self.path} takes {', '.join(self.input_names)} and got {', '.join(feeds) or 'nothing'}"
            )
        values: dict[str, object] = {name: torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in feeds}
        with torch.no_grad():
            for op, done in zip(self._operations, self._done, strict=True):
                found = self._carried_out(op, values)
                for var, value in zip(op.outputs, found, strict=True):
                    values[var.name] = self._declared(var, value)
                for name in done:
                    values.pop(name, None)
        return {var.name: _array(var, self._value(var, values)) for var in self._outputs}

    def _carried_out(self, op: Any, values: Mapping[str, object]) -> Sequence[Tensor]:
        """The outputs of one operation."""
        function = OPERATORS[op.op_type]
        given = {
            name: [self._value(each, values) for each in var]
            if isinstance(var, (list, tuple))
            else self._value(var, values)
            for name, var in op.inputs.items()
            if var is not None
        }
        try:
            found = function(**given)
        except (TypeError, ValueError, IndexError, RuntimeError, ArtifactError) as error:
            raise ArtifactError(f"{self.path}: {op.name!r}, a {op.op_type}: {error}") from error
        return found if isinstance(found, (tuple, list)) else (found,)

    def _value(self, var: Any, values: Mapping[str, object]) -> Any:
        """What a variable holds: what was computed, or a constant as `_constant` has it."""
        if var.name in values:
            return values[var.name]
        if var.name not in self._constants:
            if var.op is None or var.op.op_type != CONST:
                raise ArtifactError(f"{self.path}: {var.name!r} is read before it is computed")
            self._constants[var.name] = _constant(var.val)
        return self._constants[var.name]

    def _declared(self, var: Any, value: Tensor) -> Tensor:
        """A value in the type that the program declares, floats rounded to it if any are; raises ArtifactError for another shape."""
        kind, shape = _type(var), tuple(value.shape)
        if len(shape) != len(var.shape) or any(
            isinstance(wanted, (int, np.integer)) and wanted != got
            for wanted, got in zip(var.shape, shape, strict=True)
        ):
            raise ArtifactError(
                f"{self.path}: {var.name!r} is {list(var.shape)} by the program and comes to {list(shape)}"
            )
        if kind in FLOATS and value.is_floating_point():
            return value.half().float() if kind == "fp16" and self._rounded else value.float()
        if kind in FLOATS or value.is_floating_point():
            raise ArtifactError(f"{self.path}: {var.name!r} is {kind} by the program and comes to {value.dtype}")
        return value


def _loaded(path: Path) -> Any:
    """The program of a package, as coremltools holds it, with its weights."""
    if not path.is_dir():
        raise StorageError(f"there is no Core ML package {path}")
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.models import MLModel

    try:
        with redirect_stderr(io.StringIO()):
            model = MLModel(str(path), skip_model_load=True)
            spec = model.get_spec()
            return load(spec, spec.specificationVersion, model.weights_dir)
    except Exception as error:  # protobuf's, the blob reader's and coremltools' own have no common base
        first = (str(error).splitlines() or [""])[0]
        raise ArtifactError(f"{path} is no Core ML program, or is damaged: {first}") from error


def _read(op: Any) -> Iterator[Any]:
    """The variables that an operation reads, also those of lists."""
    for given in op.inputs.values():
        yield from given if isinstance(given, (list, tuple)) else [] if given is None else [given]


def _constant(value: Any) -> Any:
    """Floats as tensors of fp32, other arrays and what they hold as they are, single values as Python's."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f":
            return torch.from_numpy(value.astype(np.float32))
        return value
    return value.item() if isinstance(value, np.generic) else value


def _type(var: Any) -> str:
    """MIL's name of the type of a variable's elements."""
    from coremltools.converters.mil.mil import types

    return str(types.builtin_to_string(var.dtype))


def _array(var: Any, value: Tensor) -> Array:
    """An output as an array of the type that the program declares."""
    found: Array = value.numpy()
    return found.astype(np.float16) if _type(var) == "fp16" else found
