"""Puts the int8 linears of the ONNX file into a program, and checks them in the written file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

from toolchain.artifacts.onnx_plain import Codes
from toolchain.errors import ArtifactError
from toolchain.targets.executorch.reading import INT8, Linear

RANGE = (-128, 127)
STEP = float(np.finfo(np.float32).eps)
"""The smallest step of a rounded input; XNNPACK chooses its own."""
PLACE = "int8."
"""Before the parameter that an int8 linear stands for, in its name."""


class Int8Linear(nn.Module):
    """A linear of integers, in the one form that XNNPACK computes as such: [..., in] → [..., out].

    Its input is rounded in each call by its own range.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.register_buffer("codes", torch.from_numpy(np.array(codes.codes.T, order="C")))  # [out, in]
        self.register_buffer("scales", torch.from_numpy(np.array(codes.scales)))  # [out]
        self.register_buffer("zeros", torch.zeros(len(self.scales), dtype=torch.int64))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of x [..., in] and the weight, and a bias [out] added to it."""
        named = torch.ops.quantized_decomposed
        scale, zero = named.choose_qparams.tensor(x, *RANGE, STEP, torch.int8)
        rounded = named.quantize_per_tensor.tensor(x, scale, zero, *RANGE, torch.int8)
        restored = named.dequantize_per_tensor.tensor(rounded, scale, zero, *RANGE, torch.int8)
        weight = named.dequantize_per_channel.default(self.codes, self.scales, self.zeros, 0, *RANGE, torch.int8)
        return functional.linear(restored, weight, bias)


def with_codes(exported: ExportedProgram, feeds: tuple[Tensor, ...], codes: Mapping[str, Codes]) -> ExportedProgram:
    """The same graph, in which some linears have integers.

    Args:
        exported: the graph in fp32.
        feeds: inputs that it takes; their values do not matter.
        codes: parameter → what stands for it; only linears read it.
    """
    module = exported.module()
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        x, weight, *bias = node.args
        if (attribute := str(weight.target)) in codes:
            place = PLACE + attribute
            module.add_submodule(place, Int8Linear(codes[attribute]))
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.call_module(place, (x, *bias)))
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return torch.export.export(module, feeds)


def original(parameter: str) -> str:
    """The parameter of the fp32 graph that one of an int8 linear stands for; any other is its own."""
    return parameter.removeprefix(PLACE).removesuffix(".codes") if parameter.startswith(PLACE) else parameter


def require_scales(name: str, codes: Codes) -> None:
    """Raises ArtifactError for scales that XNNPACK does not multiply by."""
    wrong = codes.scales[~(codes.scales >= np.finfo(np.float32).tiny) | np.isinf(codes.scales)]
    if wrong.size:
        raise ArtifactError(
            f"a scale of {name!r} is {wrong[0]}; XNNPACK takes finite ones of at least {np.finfo(np.float32).tiny}"
        )


def require_codes(where: str, linears: Iterable[Linear], expected: Iterable[tuple[str, Codes]]) -> None:
    """Raises ArtifactError unless the int8 linears of a method are those of the ONNX file, integer for integer and bit for bit.

    They are compared in any order: of two that changed places parity tells.

    Args:
        where: the method, for messages.
        linears: those of the written program.
        expected: (initializer, integers and scales) of each int8 linear of the ONNX file.
    """
    written = Counter((each.shape, each.weight, each.scales) for each in linears if each.kind == INT8)
    for name, codes in expected:
        weight = codes.codes.T
        wanted = weight.shape, weight.tobytes(), codes.scales.tobytes()
        if not written[wanted]:
            same = any(wanted[:2] == each[:2] for each in written)
            raise ArtifactError(
                f"{where}: the {'scales' if same else 'int8 numbers'} of {name!r} are not those of the ONNX file"
            )
        written[wanted] -= 1
    if more := written.total():
        raise ArtifactError(f"{where} has {more} int8 linears more than the ONNX file")
