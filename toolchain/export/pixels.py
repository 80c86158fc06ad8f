"""Preprocessing inside a graph: uint8 pixels in, as a camera or a decoder gives them, behind them what the model saw before.

x = (p / 255 − mean) / std per channel, and [batch, H, W, C] → [batch, C, H, W], as four nodes before the model. Resizing is
left to the app, whose image library knows how.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from toolchain.artifacts.onnx_plain import copied
from toolchain.errors import ArtifactError
from toolchain.model import BATCH, IMAGE, Preprocess

Array = NDArray[Any]
OWN = "slimvit.pixels."
"""What the names of the nodes, values and constants before the model begin with."""


def with_pixels(model: onnx.ModelProto, preprocess: Preprocess) -> onnx.ModelProto:
    """A copy of a graph that takes uint8 pixels [batch, H, W, C] and does the preprocessing itself.

    Args:
        model: with the input "image", float32 [batch, C, H, W].
        preprocess: whose mean and std are applied.
    """
    result = copied(model)
    channels, height, width = preprocess.input_size
    scale, shift = _affine(preprocess)
    inner = f"{OWN}image"
    for node in result.graph.node:
        for index, name in enumerate(node.input):
            if name == IMAGE:
                node.input[index] = inner
    steps = [
        helper.make_node("Cast", [IMAGE], [f"{OWN}float"], f"{OWN}cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{OWN}float", f"{OWN}scale"], [f"{OWN}scaled"], f"{OWN}mul"),
        helper.make_node("Add", [f"{OWN}scaled", f"{OWN}shift"], [f"{OWN}shifted"], f"{OWN}add"),
        helper.make_node("Transpose", [f"{OWN}shifted"], [inner], f"{OWN}transpose", perm=[0, 3, 1, 2]),
    ]
    nodes = [*steps, *result.graph.node]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(
        [numpy_helper.from_array(scale, f"{OWN}scale"), numpy_helper.from_array(shift, f"{OWN}shift")]
    )
    pixels = helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, [BATCH, height, width, channels])
    result.graph.input[0].CopyFrom(pixels)
    return result


def without_pixels(model: onnx.ModelProto, preprocess: Preprocess) -> onnx.ModelProto:
    """The inverse of `with_pixels`; a graph that takes images already is given back as it is.

    Raises:
        ArtifactError: the graph takes pixels, and not by nodes of `with_pixels`.
    """
    if not takes_pixels(model):
        return model
    result = copied(model)
    inner = [node for node in result.graph.node if not node.name.startswith(OWN)]
    if len(inner) != len(result.graph.node) - 4:
        raise ArtifactError("the file takes pixels, but its preprocessing is not slimvit's")
    for node in inner:
        for index, name in enumerate(node.input):
            if name == f"{OWN}image":
                node.input[index] = IMAGE
    kept = [tensor for tensor in result.graph.initializer if not tensor.name.startswith(OWN)]
    nodes = list(inner)
    del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(kept)
    image = helper.make_tensor_value_info(IMAGE, TensorProto.FLOAT, [BATCH, *preprocess.input_size])
    result.graph.input[0].CopyFrom(image)
    return result


def takes_pixels(model: onnx.ModelProto) -> bool:
    """Whether a graph's input is uint8."""
    return bool(model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8)


def to_pixels(images: Array, preprocess: Preprocess) -> Array:
    """uint8 [B, H, W, C] whose preprocessing is closest to images [B, C, H, W]."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocess.mean, preprocess.std))
    pixels: Array = np.rint((images * std + mean) * 255).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels)


def of_pixels(pixels: Array, preprocess: Preprocess) -> Array:
    """float32 images [B, C, H, W] of pixels [B, H, W, C], by the same arithmetic as the graph's."""
    scale, shift = _affine(preprocess)
    images: Array = (pixels.astype(np.float32) * scale + shift).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images)


def representable(images: Array, preprocess: Preprocess) -> Array:
    """The images [B, C, H, W] closest to given ones that pixels can say."""
    return of_pixels(to_pixels(images, preprocess), preprocess)


def _affine(preprocess: Preprocess) -> tuple[Array, Array]:
    """(scale, shift) of each channel [C], float32: x = p · scale + shift."""
    mean, std = (np.array(values, np.float64) for values in (preprocess.mean, preprocess.std))
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
