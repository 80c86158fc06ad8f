"""An ONNX graph as a torch module, for converters of other runtimes that start from torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional

from toolchain.errors import ArtifactError, SlimvitError, StorageError, fault_words
from toolchain.foreign import reason
from toolchain.interpreter.lifetimes import last_uses
from toolchain.interpreter.operators import OPERATORS, SHAPES, Operator

DOMAINS = ("", "ai.onnx")
"""Where the operators live that are understood."""
OLDEST = 13
"""The first opset whose axes and sizes are inputs, and whose Softmax is over one axis, as the operators here have them."""
Array = NDArray[Any]
Value = Tensor | Array | None


def module_of(model: onnx.ModelProto | Path, operators: Mapping[str, Operator] = OPERATORS) -> GraphModule:
    """A module that computes what an ONNX file says, as strictly as the file says it; its weights ask for no gradient.

    It can be traced by `torch.export` where shapes follow from the batch that it is traced at. A matrix product with a constant
    becomes a linear, with the bias that is added to it: what converters and quantisers look for.

    Args:
        model: the file, or what is in it.
        operators: what each is in torch; a converter may want some in another form that computes the same. Linears stay what they
            are.

    Raises:
        StorageError: it cannot be read.
        ArtifactError: it is no ONNX model, or has an opset, an operator, an attribute or a type that is not understood.
    """
    return GraphModule(graph_of(model) if isinstance(model, Path) else model, operators)


def graph_of(path: Path) -> onnx.ModelProto:
    """What is in an ONNX file, with its weights; raises as `module_of`."""
    try:
        return onnx.load(path)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {fault_words(error)}") from error
    except Exception as error:  # protobuf's own, which has no public base
        raise ArtifactError(f"{path} is no ONNX model, or is truncated: {error}") from error


@contextmanager
def traced(path: Path) -> Iterator[None]:
    """A block in which torch carries out or traces the graph of a file; what torch raises in it becomes an ArtifactError."""
    try:
        yield
    except SlimvitError:
        raise
    except Exception as error:  # torch's own, of any class
        raise ArtifactError(f"torch cannot export {path}: {reason(error)}") from error


@dataclass(frozen=True)
class Step:
    """One node: its function, its inputs and outputs, and the values that are freed after it."""

    name: str
    run: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    known: Callable[..., Any] | None
    shapes: tuple[int, ...]
    done: tuple[str, ...] = ()


class GraphModule(nn.Module):
    """The nodes of an ONNX graph in their order.

    Attributes:
        input_names, output_names: those of the file, in its order; `forward` takes and gives tensors in this order, a single
            one not in a tuple.
    """

    def __init__(self, model: onnx.ModelProto, operators: Mapping[str, Operator] = OPERATORS) -> None:
        """Reads the graph; raises ArtifactError for an unknown operator, attribute or type."""
        super().__init__()
        opset = max((each.version for each in model.opset_import if each.domain in DOMAINS), default=OLDEST)
        if opset < OLDEST:
            raise ArtifactError(
                f"the graph is of opset {opset}, and the interpreter of ONNX files understands {OLDEST} and later ones: export it "
                "anew, or bring it there with onnx.version_converter"
            )
        self._operators = operators
        graph = model.graph
        self._constants: dict[str, Array] = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        nodes = [node for node in graph.node if not self._is_constant(node)]
        if graph.sparse_initializer or model.functions:
            raise ArtifactError("sparse weights and functions in an ONNX graph are not understood")
        self.input_names = tuple(each.name for each in graph.input if each.name not in self._constants)
        self.output_names = tuple(each.name for each in graph.output)
        self._weights: dict[tuple[str, bool], str] = {}
        readers = Counter(name for node in nodes for name in node.input) + Counter(self.output_names)
        self._steps = _freed([*self._read(nodes, readers)], self.output_names)
        used = {name for step in self._steps for name in step.inputs} | {*self.output_names}
        self._constants = {name: values for name, values in self._constants.items() if name in used}
        self.requires_grad_(False)
        self.eval()

    @property
    def stored(self) -> dict[str, str]:
        """Parameter or buffer → the initializer that it holds; the weight of a linear is [out, in], however the file has it."""
        return {attribute: name for (name, _), attribute in self._weights.items()}

    def _is_constant(self, node: onnx.NodeProto) -> bool:
        """Whether a node is a Constant, which then stands with the weights."""
        if node.op_type != "Constant":
            return False
        for attribute in node.attribute:
            value = helper.get_attribute_value(attribute)
            self._constants[node.output[0]] = (
                numpy_helper.to_array(value) if attribute.name == "value" else np.asarray(value, _TYPES[attribute.name])
            )
        return True

    def _read(self, nodes: Sequence[onnx.NodeProto], readers: Counter[str]) -> Iterator[Step]:
        """The steps of the nodes; a product with a constant takes up the bias that alone reads it."""
        taken: set[int] = set()
        reader_of = {name: index for index, node in enumerate(nodes) for name in node.input}
        for index, node in enumerate(nodes):
            if index in taken:
                continue
            if node.domain not in DOMAINS or node.op_type not in self._operators:
                raise ArtifactError(
                    f"the node {node.name!r} is a {node.domain + '.' if node.domain else ''}{node.op_type}, which the "
                    "interpreter of ONNX files does not understand"
                )
            weight = self._linear_weight(node)
            if weight is None:
                yield self._step(node)
                continue
            bias, output = self._gemm_bias(node), node.output[0]
            after = reader_of.get(output)
            if node.op_type == "MatMul" and readers[output] == 1 and after is not None:
                other = nodes[after]
                added = next((name for name in other.input if name != output), "")
                if other.op_type == "Add" and self._is_bias(added, len(weight)):
                    bias, output = added, other.output[0]
                    taken.add(after)
            names = [self._kept(node.input[1], weight, turned=weight is not self._constants[node.input[1]])]
            if bias:
                names.append(self._kept(bias, self._constants[bias]))
            yield Step(node.name, functional.linear, (node.input[0], *names), (output,), None, ())

    def _linear_weight(self, node: onnx.NodeProto) -> Array | None:
        """[out, in] of a product with a constant matrix that is a linear, else None."""
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in self._constants:
            return None
        weight = self._constants[node.input[1]]
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        plain = not attributes.get("transA") and all(attributes.get(name, 1.0) == 1.0 for name in ("alpha", "beta"))
        if weight.ndim != 2 or weight.dtype.kind != "f" or not plain:
            return None
        if node.op_type == "Gemm" and len(node.input) > 2 and not self._is_bias(node.input[2], None):
            return None
        return weight if attributes.get("transB") else weight.T

    def _gemm_bias(self, node: onnx.NodeProto) -> str:
        return node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""

    def _is_bias(self, name: str, width: int | None) -> bool:
        """Whether a value is a constant vector, of some width if one is given."""
        found = self._constants.get(name)
        return found is not None and found.ndim == 1 and width in (None, len(found))

    def _step(self, node: onnx.NodeProto) -> Step:
        shapes, inputs = SHAPES.get(node.op_type, ()), []
        for position, name in enumerate(node.input):
            constant = self._constants.get(name)
            # Integers stay what they are until they are used, so that shapes computed from them are known.
            as_it_is = constant is None or position in shapes or constant.dtype.kind in "iub"
            inputs.append(name if constant is None or as_it_is else self._kept(name, constant))
        return Step(
            node.name or node.op_type,
            partial(self._operators[node.op_type], _attributes(node)),
            tuple(inputs),
            tuple(node.output),
            _evaluated(node),
            shapes,
        )

    def _kept(self, name: str, values: Array, *, turned: bool = False) -> str:
        """The name of a constant, or of its transpose, among the parameters and buffers; it is put there if it is not yet."""
        key = name, turned
        if key not in self._weights:
            attribute = "".join(each if each.isalnum() else "_" for each in name)
            while hasattr(self, attribute):
                attribute += "_"
            tensor = torch.from_numpy(np.array(values, order="C"))  # its own memory
            if tensor.is_floating_point():
                self.register_parameter(attribute, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(attribute, tensor)
            self._weights[key] = attribute
        return _WEIGHT + self._weights[key]

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs for the inputs, in the order of the file's names."""
        values: dict[str, Value] = dict(zip(self.input_names, inputs, strict=True))
        for step in self._steps:
            given = [self._value(name, values) for name in step.inputs]
            if step.known is not None and given and all(each is None or isinstance(each, np.ndarray) for each in given):
                outputs = step.known(*given)
            else:
                fed = [each if at in step.shapes else _tensor(each) for at, each in enumerate(given)]
                try:
                    found = step.run(*fed)
                except ArtifactError as error:
                    raise ArtifactError(f"node {step.name!r}: {error}") from error
                outputs = found if isinstance(found, (tuple, list)) else (found,)
            values.update(zip(step.outputs, outputs, strict=False))
            for name in step.done:
                values.pop(name, None)
        results = tuple(cast("Tensor", _tensor(self._value(name, values))) for name in self.output_names)
        return results if len(results) > 1 else results[0]

    def _value(self, name: str, values: Mapping[str, Value]) -> Value:
        if name.startswith(_WEIGHT):
            tensor: Tensor = getattr(self, name.removeprefix(_WEIGHT))
            return tensor
        if not name:
            return None
        found = values.get(name, self._constants.get(name))
        if found is None:
            raise ArtifactError(
                f"{name!r} is an output beside the first of its node, which the interpreter does not understand"
            )
        return found


_WEIGHT = "weight:"
"""Before the name of a parameter or buffer among a step's inputs."""
_TYPES = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
"""Attribute of a Constant that is no tensor → its type."""


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Name → value, strings decoded; and "outputs", how many the node has."""
    found = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    decoded = {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}
    return decoded | {"outputs": len(node.output)}


def _tensor(value: Value) -> Tensor | None:
    """The value as a tensor of its own memory, since what is known belongs to nobody who may be written to."""
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


def _evaluated(node: onnx.NodeProto) -> Callable[..., Sequence[Array]]:
    """The node by ONNX's own reference, for inputs that are all known."""
    evaluator = cache(
        lambda: ReferenceEvaluator(node)
    )  # most nodes never meet such inputs, and it has not all operators

    def run(*given: Array | None) -> Sequence[Array]:
        feeds = {name: value for name, value in zip(node.input, given, strict=True) if value is not None}
        return [np.asarray(each) for each in evaluator().run(None, feeds)]

    return run


def _freed(steps: Sequence[Step], kept: Sequence[str]) -> list[Step]:
    """The steps, each with the values that no later one reads."""
    done = last_uses([(*step.inputs, *step.outputs) for step in steps], kept)
    return [replace(step, done=names) for step, names in zip(steps, done, strict=True)]
