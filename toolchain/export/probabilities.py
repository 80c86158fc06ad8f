"""Probabilities as a second output of a graph, so that an app need not know what logits are.

The logits stay the first output: every file is compared by them, and calibration tools want them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from toolchain.artifacts.onnx_file import PROBABILITIES, SOFTMAX
from toolchain.artifacts.onnx_plain import copied
from toolchain.errors import ArtifactError, RecipeError
from toolchain.outputs import LOGITS, WORDS, Output
from toolchain.parity import Rung, Tolerance
from toolchain.targets import get_target

Array = NDArray[Any]
ROUNDING = 1e-6
"""Largest allowed difference of a probability from the softmax, in float64, of the logits."""


ACTIVATIONS: dict[Output, str] = {"logits": "Softmax", "multi-label": "Sigmoid"}
"""Kind of output → the operator that makes probabilities of it; other kinds have none."""


def require_probabilities(output: Output) -> None:
    """Nothing, if outputs of this kind have probabilities; else RecipeError."""
    if output not in ACTIVATIONS:
        raise RecipeError(
            f"export.softmax asks for probabilities, and the outputs are {WORDS[output]}: set it to false"
        )


def with_probabilities(model: onnx.ModelProto, output: Output = "logits") -> onnx.ModelProto:
    """A copy of a graph with the second output "probabilities" [batch, classes], float32: softmax or sigmoid of "logits"."""
    result = copied(model)
    node = helper.make_node(ACTIVATIONS[output], [LOGITS], [PROBABILITIES], SOFTMAX)
    if node.op_type == "Softmax":
        node.attribute.append(helper.make_attribute("axis", -1))
    result.graph.node.append(node)
    shape = [dim.dim_param or dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim]
    result.graph.output.append(helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, shape))
    return result


def without_probabilities(model: onnx.ModelProto) -> onnx.ModelProto:
    """The inverse of `with_probabilities`; a graph without that output is given back as it is.

    Raises:
        ArtifactError: the graph has that output, and not by the node of `with_probabilities`.
    """
    if not gives_probabilities(model):
        return model
    result = copied(model)
    last = result.graph.node.pop()
    if (last.name, list(last.input), list(last.output)) != (SOFTMAX, [LOGITS], [PROBABILITIES]):
        raise ArtifactError("the file gives probabilities, but not by a node of slimvit's")
    kept = [value for value in result.graph.output if value.name != PROBABILITIES]
    del result.graph.output[:]
    result.graph.output.extend(kept)
    return result


def gives_probabilities(model: onnx.ModelProto) -> bool:
    """Whether a graph has the second output."""
    return any(value.name == PROBABILITIES for value in model.graph.output)


def probabilities_rung(path: Path, target: str, feeds: dict[str, Array], output: Output = "logits") -> Rung:
    """Whether the probabilities of a file are the softmax, or the sigmoid, of its own logits.

    Args:
        path: an ONNX file with both outputs.
        target: what runs it.
        feeds: its input.
        output: what its logits are.
    """
    with get_target(target).open(path, 1) as runner:
        found = runner.infer(feeds)
    logits = np.asarray(found[LOGITS], np.float64)
    if ACTIVATIONS[output] == "Sigmoid":
        expected = 1 / (1 + np.exp(-logits))
    else:
        expected = np.exp(logits - logits.max(axis=1, keepdims=True))
        expected /= expected.sum(axis=1, keepdims=True)
    error = float(np.abs(np.asarray(found[PROBABILITIES], np.float64) - expected).max())
    reason = "" if error <= ROUNDING else f"a probability is {error:.3g} off"
    name = f"{path.name}, probabilities"
    tolerance = Tolerance(ROUNDING, -1.0, None)
    return Rung(
        f"{ACTIVATIONS[output].lower()} of the logits",
        name,
        error,
        None,
        None,
        tolerance,
        "fail" if reason else "pass",
        reason,
    )
