"""Folds constants around the linears of a plain graph into their weights, before a converter does it in its own way.

A layer scale behind a linear becomes part of its weight and bias, and a linear of a constant becomes a constant. Where a
converter does this, its rounded weights are no longer those of the file, and nothing says which they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from toolchain.artifacts.onnx_plain import Codes, Plain, copied, replace_nodes

Array = NDArray[Any]
KEEPS = frozenset({"Reshape", "Cast", "Identity"})
"""Operators that leave the numbers of a row as they are, a Reshape where its last axis is that of what it is given."""
SMALLEST = np.finfo(np.float32).tiny
"""Runtimes take no scale below it."""


def folded(content: Plain) -> Plain:
    """The same graph with fewer nodes; what it computes differs by rounding alone.

    Codes of int8 linears stay the integers that they were, but for their sign, and for the columns whose factor is 0: there they
    become 0. Their scales, one for each output, are multiplied.
    """
    model = copied(content.model)
    graph = _Graph(model.graph, dict(content.codes))
    constant = {each.weight for each in [*graph.linears()] if graph.made_constant(each)}
    for linear in [*graph.linears()]:
        graph.scale(linear)
    graph.written()
    return replace(content, model=model, codes=graph.codes, halves=content.halves - constant)


@dataclass(frozen=True)
class _Linear:
    """A product with a stored matrix, and the bias that is added to it alone.

    Attributes:
        nodes: the product, and the Add where there is one.
        weight: the initializer.
        bias: the initializer; "" where there is none.
        turned: whether the weight is [out, in].
        widths: (in, out).
    """

    nodes: tuple[onnx.NodeProto, ...]
    weight: str
    bias: str
    turned: bool
    widths: tuple[int, int]

    @property
    def output(self) -> str:
        return str(self.nodes[-1].output[0])


class _Graph:
    """A graph whose initializers are changed first, and written back at the end."""

    def __init__(self, graph: onnx.GraphProto, codes: dict[str, Codes]) -> None:
        self.codes = codes
        self._graph = graph
        self._nodes = list(graph.node)
        self._stored: dict[str, Array] = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self._changed: dict[str, Array] = {}
        names = (*(name for node in self._nodes for name in node.input), *(each.name for each in graph.output))
        self._uses = Counter(names)

    def linears(self) -> Iterator[_Linear]:
        """The linears whose weight and bias nothing else reads."""
        for node in self._nodes:
            if node.op_type not in ("MatMul", "Gemm") or (weight := self._stored.get(node.input[1])) is None:
                continue
            told = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            plainly = not told.get("transA") and told.get("alpha", 1.0) == told.get("beta", 1.0) == 1.0
            if weight.ndim != 2 or not plainly or self._uses[node.input[1]] != 1:
                continue
            turned = bool(told.get("transB"))
            widths = weight.shape[::-1] if turned else weight.shape
            bias = node.input[2] if len(node.input) > 2 else ""
            nodes: tuple[onnx.NodeProto, ...] = (node,)
            following = self._reader(node.output[0])
            if not bias and following is not None and following.op_type == "Add":
                (other,) = {*following.input} - {node.output[0]} or {""}
                if other in self._stored and self._stored[other].shape == (widths[1],):
                    bias, nodes = other, (node, following)
            if not bias or (bias in self._stored and self._uses[bias] == 1 and self._stored[bias].ndim == 1):
                yield _Linear(nodes, node.input[1], bias, turned, (int(widths[0]), int(widths[1])))

    def made_constant(self, linear: _Linear) -> bool:
        """Whether a linear was of a constant, which then is the product, before it is repeated for a batch and reshaped."""
        inner, outer = linear.widths
        value, passed = linear.nodes[0].input[0], list[onnx.NodeProto]()
        while value not in self._stored:
            node = self._maker(value)
            if node is None or self._uses[value] != 1 or not self._keeps(node, inner, outer):
                return False
            passed.append(node)
            value = node.input[0]
        constant = self._stored[value]
        if not passed or self._uses[value] != 1 or constant.ndim < 2 or constant.shape[-1] != inner:
            return False
        weight = self._stored[linear.weight].T if linear.turned else self._stored[linear.weight]
        bias = self._stored[linear.bias] if linear.bias else np.float32(0)
        self._change(value, (constant.astype(np.float64) @ weight + bias).astype(np.float32))
        for node in passed:
            if node.op_type == "Reshape" and inner != outer:
                name = f"{node.input[1]}.{outer}"
                self._change(name, np.array([*self._stored[node.input[1]][:-1], outer], np.int64))
                node.input[1] = name
        self._drop(linear.nodes, linear.nodes[0].input[0], linear.output)
        self.codes.pop(linear.weight, None)
        return True

    def scale(self, linear: _Linear) -> None:
        """Takes into a linear what multiplies each of its outputs by a constant."""
        outer = linear.widths[1]
        value = linear.output
        while (node := self._reader(value)) is not None and node.op_type in KEEPS and self._keeps(node, outer, outer):
            value = node.output[0]
        if node is None or node.op_type != "Mul":
            return
        (other,) = {*node.input} - {value} or {""}
        factor = self._stored.get(other)
        if factor is None or factor.shape not in ((), (1,), (outer,)):
            return
        factor = np.broadcast_to(factor, (outer,))
        codes = self.codes.get(linear.weight)
        if codes is None:
            weight = self._stored[linear.weight] * (factor[:, None] if linear.turned else factor)
        elif (codes.codes[:, factor < 0] == np.iinfo(np.int8).min).any():
            return  # it has no counterpart of the other sign
        else:
            self.codes[linear.weight] = codes = _scaled(codes, factor)
            weight = codes.weight
        self._change(linear.weight, weight)
        if linear.bias:
            self._change(linear.bias, self._stored[linear.bias] * factor)
        self._drop((node,), value, node.output[0])

    def written(self) -> None:
        """Puts the nodes that are left, and what changed, into the graph."""
        for tensor in self._graph.initializer:
            if tensor.name in self._changed:
                tensor.CopyFrom(numpy_helper.from_array(self._changed.pop(tensor.name), tensor.name))
        self._graph.initializer.extend(numpy_helper.from_array(each, name) for name, each in self._changed.items())
        replace_nodes(self._graph, self._nodes)

    def _change(self, name: str, values: Array) -> None:
        self._stored[name] = self._changed[name] = values

    def _drop(self, nodes: tuple[onnx.NodeProto, ...], value: str, output: str) -> None:
        """Takes out the nodes from a value, which nobody else reads, to an output; the value then has its name."""
        self._nodes = [node for node in self._nodes if not any(node is each for each in nodes)]
        for node in self._nodes:
            node.output[:] = [output if name == value else name for name in node.output]

    def _maker(self, value: str) -> onnx.NodeProto | None:
        return next((node for node in self._nodes if value in node.output), None)

    def _reader(self, value: str) -> onnx.NodeProto | None:
        """The one node that reads a value, once; None where there are more, or it is an output of the graph."""
        if self._uses[value] != 1:
            return None
        return next((node for node in self._nodes if value in node.input), None)

    def _keeps(self, node: onnx.NodeProto, width: int, fresh: int) -> bool:
        """Whether a node leaves rows of a width as they are, and would do so with rows of another."""
        if node.op_type == "Expand":
            return width > 1 and (width == fresh or self._last(node.input[1]) == 1)
        if node.op_type == "Cast":
            return any(each.name == "to" and each.i == onnx.TensorProto.FLOAT for each in node.attribute)
        if node.op_type != "Reshape":
            return node.op_type in KEEPS
        return self._last(node.input[1]) == width and (width == fresh or node.input[1] in self._stored)

    def _last(self, shape: str) -> int | None:
        """The last number of a shape; None where it is not known."""
        if shape in self._stored:
            values = self._stored[shape].reshape(-1)
            return int(values[-1]) if values.size else None
        maker = self._maker(shape)
        return self._last(maker.input[-1]) if maker is not None and maker.op_type == "Concat" else None


def _scaled(codes: Codes, factor: Array) -> Codes:
    """Codes and scales of the weight times a factor for each output."""
    scales = (codes.scales * np.abs(factor)).astype(np.float32)
    sign = np.where(scales < SMALLEST, 0, np.sign(factor)).astype(np.int8)
    return Codes(codes.codes * sign, np.where(sign == 0, codes.scales, scales))
