"""Reads the linears that XNNPACK computes back from a program's bytes."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

FLOAT, INT8 = "FLOAT", "INT8-DYNAMIC"
KINDS = {"xnn_datatype_fp32": FLOAT, "xnn_datatype_qcint8": INT8}
"""XNNPACK's type of a weight → the type of its product, as engine.json has it for all targets."""


@dataclass(frozen=True)
class Linear:
    """A product with a stored weight.

    Attributes:
        kind: type of the product.
        shape: of the weight, (out, in).
        weight: its numbers, row by row.
        scales: float32, one for each row of an int8 weight; empty otherwise.
    """

    kind: str
    shape: tuple[int, ...]
    weight: bytes
    scales: bytes


def linears_of(content: bytes) -> dict[str, list[Linear]]:
    """Method → the linears that XNNPACK computes in it, in their order.

    Args:
        content: of a .pte file that XNNPACK's partitioner made.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary

    file = deserialize_pte_binary(content)
    named = file.named_data
    stored = {} if named is None else {key: named.buffers[each.buffer_index] for key, each in named.pte_data.items()}
    parts = file.program.backend_delegate_data
    return {
        plan.name: [each for part in plan.delegates for each in _linears(parts[part.processed.index].data, stored)]
        for plan in file.program.execution_plan
    }


def _linears(payload: bytes, stored: Mapping[str, bytes]) -> Iterator[Linear]:
    """Those of one delegate."""
    graph = _graph(payload)
    values = {}
    for each in graph["xvalues"]:
        value = each["xvalue_union"]
        tensor = value.get("tensor_value", value)
        values[tensor["id_out"]] = tensor, value.get("quant_params", {})
    keys = [each["named_key"] for each in graph["constant_data"]]
    for node in graph["xnodes"]:
        if node["xnode_union_type"] != "XNNFullyConnected":
            continue
        tensor, rounding = values[node["xnode_union"]["filter_id"]]
        if tensor["constant_buffer_idx"]:  # 0 is that of a product of two activations
            kind = KINDS.get(tensor["datatype"], tensor["datatype"])
            scales = stored[keys[rounding["scale_buffer_idx"]]] if kind == INT8 else b""
            yield Linear(kind, tuple(tensor["dims"]), bytes(stored[keys[tensor["constant_buffer_idx"]]]), bytes(scales))


def _graph(payload: bytes) -> dict[str, Any]:
    """XNNPACK's graph as JSON."""
    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory(prefix="slimvit-executorch-") as folder:
        schema, graph = Path(folder, "schema.fbs"), Path(folder, "graph.bin")
        schema.write_bytes(files(serialization).joinpath("schema.fbs").read_bytes())
        graph.write_bytes(payload[header.flatbuffer_offset :][: header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(graph), ["--raw-binary"])
        text = graph.with_suffix(".json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(re.sub(r": (-?)inf\b", r": \1Infinity", text))  # the bound of an open clamp
    return found
