"""What rounding to int8 loses of a graph's outputs, and which linears stay in fp32 because most of it is theirs.

The loss is Σ‖y − z‖² / Σ‖y − ȳ‖², with y the outputs of the fp32 graph on calibration images, ȳ their mean over images and z those
of the int8 file. Each image is a call of its own, as in an app with batch 1: where scales are those of each call, a batch would
have others. A linear stays in fp32 if it alone, in int8, loses many times its share of that: one channel of what it reads is
then so much larger than all others that they are left a handful of values. Linears are tried in the order of how far the largest
number that they read is from the usual ones. Nothing is changed in a file that loses little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from toolchain.artifacts.base import layer_and_part
from toolchain.artifacts.onnx_layers import named_weights
from toolchain.artifacts.onnx_plain import copied
from toolchain.artifacts.onnx_walk import linked
from toolchain.export.conversion import Conversion
from toolchain.export.large import is_large, stored_bytes
from toolchain.export.observe import peaks, session, steps
from toolchain.export.onnx_graph import inner_linears
from toolchain.parity import spread_error

Array = NDArray[Any]
Make = Callable[[frozenset[str]], Conversion]
"""The linears that stay in fp32, by the names of their nodes → the int8 graph."""
BOUND = 0.01
"""Loss up to which a file stays as it is."""
STANDS_OUT = 5.0
"""A linear stays in fp32 only if it alone loses this many times an equal share of the file's loss; so one in this many can, at most, and only so many are tried."""
BETTER = 0.8
"""A file made in another way, or with linears in fp32, replaces the first if its loss is at most this share of it."""
MEASURED, FEWEST = 16, 8
"""Number of calibration images that a loss is measured on, and the number below which none is measured."""
WEIGHT_MAX, ACTIVATION_MAX = 64, 127
"""The largest code of a weight, and of an activation whose scale is fixed."""
OF_SPREAD = "of how outputs differ between calibration images"


@dataclass(frozen=True)
class Yardstick:
    """Outputs of the fp32 graph for a few images, as reference for losses.

    Attributes:
        images: [N, C, H, W].
        expected: each output [N, …].
    """

    images: Array
    expected: tuple[Array, ...]

    @staticmethod
    def of(model: onnx.ModelProto, images: Array) -> Yardstick:
        """That of an fp32 graph on MEASURED of these images; raises ArtifactError where ONNX Runtime cannot run it."""
        chosen = images[np.unique(np.linspace(0, len(images) - 1, MEASURED).round().astype(int))]
        return Yardstick(chosen, _outputs(model, chosen))

    def lost(self, model: onnx.ModelProto) -> float:
        """The loss of another graph, of several outputs the largest; raises ArtifactError where ONNX Runtime cannot run it."""
        return max(map(spread_error, self.expected, _outputs(model, self.images)))


def least_lossy(model: onnx.ModelProto, makes: Sequence[Make], images: Array) -> Conversion:
    """An int8 graph: the first way to make it, unless that loses more than BOUND; then the way and the linears that lose least.

    Args:
        model: fp32.
        makes: the ways, the plain one first.
        images: calibration images [N, C, H, W]; on fewer than FEWEST nothing is measured, nor of weights that need a second file,
            and a note says so.

    Raises:
        ArtifactError: ONNX Runtime cannot quantise or run the graph.
    """
    make, all_int8 = makes[0], frozenset[str]()
    made = make(all_int8)
    if why := _unmeasured(model, images):
        return replace(made, notes=(f"What int8 loses was not measured: {why}.",))
    yardstick = Yardstick.of(model, images)
    first = lost = yardstick.lost(made.model)
    if lost <= BOUND:
        return made
    notes = []
    for other in makes[1:]:
        found = other(all_int8)
        if (now := yardstick.lost(found.model)) <= BETTER * lost:
            make, lost = other, now
            made = replace(found, plain=lambda: least_lossy(model, makes[:1], images))
            notes = [f"Normalizations are smoothed: {lost:.2g} {OF_SPREAD} is lost, {first:.2g} without."]
    if lost > BOUND and (costs := standing_out(made, inner_linears(model), yardstick, lost)):
        found = make(frozenset(costs))
        if (now := yardstick.lost(found.model)) <= BETTER * lost:
            notes += _left_notes(model, costs, now, lost)
            made, lost = replace(found, left=frozenset(costs), plain=made.plain), now
    if lost > BOUND:
        notes.append(f"{lost:.2g} {OF_SPREAD} is lost. Where that is too much, take fp16.")
    return replace(made, notes=tuple(notes))


def standing_out(made: Conversion, inner: Sequence[str], yardstick: Yardstick, lost: float) -> dict[str, float]:
    """Linear → what it alone loses, of those that lose STANDS_OUT times their share of all.

    Args:
        made: the int8 graph.
        inner: its int8 linears, by the names of their nodes.
        yardstick: what a loss is measured by.
        lost: the loss of the whole graph.
    """
    read = {node.name: node.input[0] for node in made.reference.graph.node if node.name in set(inner)}
    peaked = peaks(made.reference, sorted(set(read.values())), yardstick.images)
    tried = sorted(inner, key=lambda name: (-peaked[read[name]], name))[: int(len(inner) / STANDS_OUT)]
    costs = {name: yardstick.lost(alone(made.reference, name, made.ranges)) for name in tried}
    return {name: cost for name, cost in costs.items() if cost >= STANDS_OUT * lost / len(inner)}


def alone(model: onnx.ModelProto, name: str, ranges: Mapping[str, float]) -> onnx.ModelProto:
    """A copy of an fp32 graph in which one linear computes what it does in int8.

    Args:
        model: fp32.
        name: of the linear's node.
        ranges: what is read → its max|x|, by which it is rounded; what is not here, by its own range in each call.
    """
    result = copied(model)
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    at, node = next((at, node) for at, node in enumerate(result.graph.node) if node.name == name)
    turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    read, weight = node.input[0], numpy_helper.to_array(stored[node.input[1]])
    start = f"{name}.alone"
    step = np.abs(weight).max(axis=1 if turned else 0, keepdims=True) / WEIGHT_MAX
    step = np.where(step > 0, step, 1).astype(np.float32)
    constants = {f"{start}.weight": np.rint(weight / step).astype(np.float32) * step}
    codes, scale, zero = (f"{start}.{part}" for part in ("codes", "scale", "zero"))
    if read in ranges:
        constants |= {scale: np.float32(ranges[read] / ACTIVATION_MAX or 1), zero: np.int8(0)}
        rounded = helper.make_node("QuantizeLinear", [read, scale, zero], [codes])
    else:
        rounded = helper.make_node("DynamicQuantizeLinear", [read], [codes, scale, zero])
    result.graph.initializer.extend(numpy_helper.from_array(np.asarray(each), key) for key, each in constants.items())
    result.graph.node.insert(at, rounded)
    result.graph.node.insert(at + 1, helper.make_node("DequantizeLinear", [codes, scale, zero], [f"{start}.read"]))
    node = result.graph.node[at + 2]
    node.input[0], node.input[1] = f"{start}.read", f"{start}.weight"
    return result


def _unmeasured(model: onnx.ModelProto, images: Array) -> str:
    """Why nothing is measured, as the end of a sentence, or ""."""
    if len(images) < FEWEST:
        return f"that takes at least {FEWEST} calibration images, and there are {len(images)}"
    return "the weights need a second file" if is_large(stored_bytes(model)) else ""


def _outputs(model: onnx.ModelProto, images: Array) -> tuple[Array, ...]:
    names = [value.name for value in model.graph.output]
    with session(model) as run:
        parts = [run(names, feeds) for feeds in steps(images, 1)]
    return tuple(np.concatenate([part[name] for part in parts]) for name in names)


def _left_notes(model: onnx.ModelProto, costs: Mapping[str, float], now: float, before: float) -> list[str]:
    """A sentence for each linear that stays in fp32, and one on what all of them save."""
    why = [
        f"{layer_of(model, name)} stays in fp32: in int8 it alone loses {cost:.2g} {OF_SPREAD}."
        for name, cost in costs.items()
    ]
    return [*why, f"With that {now:.2g} is lost, and {before:.2g} with all linears in int8."]


def layer_of(model: onnx.ModelProto, name: str) -> str:
    """The layer of a linear as the model calls it."""
    weight = next(node.input[1] for node in model.graph.node if node.name == name)
    named = dict(named_weights(linked(model).graph))
    return named.get(weight, layer_and_part(weight))[0]
