"""A torch module → one ONNX file: torch.export-based, dynamic batch, equal bytes in every process and folder."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx.external_data_helper import uses_external_data
from torch import nn

from toolchain.artifacts.onnx_walk import linked
from toolchain.errors import ArtifactError, StorageError, fault_words
from toolchain.export.attention import lean
from toolchain.export.large import KEPT_BYTES, detached, is_large, module_bytes, stored_bytes
from toolchain.export.scratch import folder_beside
from toolchain.export.selection import selected_early
from toolchain.families.constants import constants
from toolchain.foreign import first_line, root
from toolchain.model import BATCH, IMAGE
from toolchain.outputs import LOGITS
from toolchain.parity import RANK

log = logging.getLogger(__name__)

GRAPH, DATA = "graph.onnx", "graph.onnx.data"
"""What torch calls the files of a model that is too large for one message, before they have their own names."""


@dataclass(frozen=True)
class GraphFacts:
    """Facts of an exported graph.

    Attributes:
        files: every file that belongs to the model, the graph first.
        size_bytes: the sum of their sizes.
        opset: version of the default ONNX domain.
        nodes_before: operator → number of nodes as torch exported them.
        nodes_after: operator → number of nodes in the file.
        simplified: whether the file is onnxsim's result.
        notes: one sentence for each option that was not carried out, with the reason.
    """

    files: tuple[Path, ...]
    size_bytes: int
    opset: int
    nodes_before: Mapping[str, int]
    nodes_after: Mapping[str, int]
    simplified: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What a graph must be: (C, H, W) of its images, its opset, and what its outputs are called."""

    input_size: tuple[int, int, int]
    opset: int
    outputs: tuple[str, ...]


def export_onnx(
    module: nn.Module,
    path: Path,
    *,
    input_size: tuple[int, int, int],
    opset: int,
    metadata: Mapping[str, str],
    simplify: bool,
    finish: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None,
    outputs: Sequence[str] = (LOGITS,),
) -> GraphFacts:
    """What was written to `path`: the module in eval mode, "image" [batch, C, H, W] → its outputs [batch, …].

    Attention is exported unfused: its MatMul and Softmax nodes run in fp32 on every runtime, where the fused operator
    of opset 23 does not. It is exported lean (`attention`), from a copy: the module itself is left as it is.

    Args:
        module: any module of one image batch; linears may be `nn.Sequential(nn.Linear, nn.Linear)`.
        path: the file; weights above `large.INLINE_LIMIT_BYTES` go to `<name>.data` beside it.
        input_size: (C, H, W).
        opset: version of the default ONNX domain.
        metadata: becomes the file's `metadata_props`, sorted by key.
        simplify: run onnxsim and keep its result if it is the same model by every check here.
        finish: a last change of the graph before it is written.
        outputs: what the module's outputs are to be called.

    Raises:
        ArtifactError: torch cannot export the module, or the graph has another input, opset or outputs than requested.
        StorageError: the file cannot be written.
    """
    plain, asked = _plain(module), Asked(input_size, opset, tuple(outputs))
    with folder_beside(path) if is_large(module_bytes(plain)) else nullcontext() as folder:
        exported = _from_torch(plain, asked, folder)
        linears = linear_shapes(exported)
        once = {
            part for constant in constants(module) for part in constant.part.modules()
        }  # the file holds its outcome
        counted = [part for part in module.modules() if isinstance(part, nn.Linear) and part not in once]
        wanted = Counter((linear.in_features, linear.out_features) for linear in counted)
        if missing := wanted - linears:
            raise ArtifactError(
                f"the ONNX graph of {type(module).__name__} lost linears of shape (in, out) {_show(missing)}: "
                "they were merged or folded on the way, so the file would not be the model that was planned."
            )
        if (fault := _fault(exported, asked, linears)) is not None:
            raise ArtifactError(f"the ONNX graph of {type(module).__name__} {fault}")
        early, notes = selected_early(exported), []
        if (fault := _fault(early, asked, linears)) is not None:
            raise ArtifactError(f"the ONNX graph of {type(module).__name__}, once tokens are selected early, {fault}")
        graph = early
        if simplify:
            try:
                graph = _simplified(early, asked, linears)
            except ArtifactError as reason:
                notes.append(f"not simplified: {reason}")
                log.warning("%s: %s", path.name, notes[-1])
        simplified = graph is not early
        graph = finish(graph) if finish is not None else graph
        for key in sorted(metadata):
            graph.metadata_props.add(key=key, value=metadata[key])
        files = write_onnx(graph, path, None if folder is None else folder / DATA)
    return GraphFacts(
        files=files,
        size_bytes=sum(file.stat().st_size for file in files),
        opset=opset,
        nodes_before=census(exported),
        nodes_after=census(graph),
        simplified=simplified,
        notes=tuple(notes),
    )


def linear_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The MatMul and Gemm nodes that multiply by a constant weight matrix."""
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    return [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights]


def last_linears(model: onnx.ModelProto) -> set[str]:
    """Names of the linears that the logits come from: one, or several whose outputs are averaged; none of features."""
    linears, found = {node.name for node in linear_nodes(model)}, set()
    waiting = [value for value in linked(model).graph.outputs if value.name == LOGITS]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node.name in linears:
            found.add(node.name)
        elif node is not None:
            waiting += filter(None, node.inputs)
    return found


def inner_linears(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of all other linears, in the order of the graph."""
    last = last_linears(model)
    return tuple(node.name for node in linear_nodes(model) if node.name not in last)


def linear_shapes(model: onnx.ModelProto) -> Counter[tuple[int, int]]:
    """(in, out) → number of MatMul and Gemm nodes that multiply by a constant weight of that shape."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    shapes: Counter[tuple[int, int]] = Counter()
    for node in linear_nodes(model):
        rows, columns = weights[node.input[1]]
        turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        shapes[(columns, rows) if turned else (rows, columns)] += 1
    return shapes


def _plain(module: nn.Module) -> nn.Module:
    """A copy whose attention is neither fused nor computes what is known before."""
    plain = copy.deepcopy(module).eval().cpu().requires_grad_(False)
    for part in plain.modules():
        if hasattr(part, "fused_attn"):  # not timm's global switch: that one is read when a module is built
            setattr(part, "fused_attn", False)  # noqa: B010
    return lean(plain)


def _from_torch(plain: nn.Module, asked: Asked, folder: Path | None = None) -> onnx.ModelProto:
    """The graph as torch exports it, stripped of everything that is not the model.

    In a folder, the weights go into the file `DATA` there and never through a protobuf message.
    """
    example = torch.zeros(2, *asked.input_size)  # a batch of 1 would be taken for a constant
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch and its exporter deprecate parts of each other between releases.
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            program = torch.onnx.export(
                plain,
                (example,),
                dynamo=True,
                opset_version=asked.opset,
                input_names=[IMAGE],
                output_names=[*asked.outputs],
                dynamic_shapes=({0: BATCH},),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # its own errors, and whatever torch makes of a model on the way
        raise ArtifactError(f"torch cannot export {type(plain).__name__} to ONNX: {first_line(root(error))}") from error
    if program is None:  # only in torch's old exporter
        raise ArtifactError(f"torch exported nothing for {type(plain).__name__}")
    if folder is None:
        model: onnx.ModelProto = program.model_proto
    else:
        try:
            program.save(folder / GRAPH, external_data=True)
        except OSError as error:
            raise StorageError(f"cannot write {folder}: {fault_words(error)}") from error
        model = onnx.load(folder / GRAPH, load_external_data=False)
    strip(model)
    return model


def _simplified(exported: onnx.ModelProto, asked: Asked, linears: Counter[tuple[int, int]]) -> onnx.ModelProto:
    """The graph as onnxsim leaves it; raises ArtifactError where that is not the same model, or stores more.

    Nodes and their shapes may become more: it writes a linear as three nodes, which are faster (ADR 9).
    """
    if is_large(all_bytes := stored_bytes(exported)):
        raise ArtifactError(f"{all_bytes} bytes are more than onnxsim can take in one piece")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxsim loads onnxruntime
    import onnxsim

    try:
        graph, checked = onnxsim.simplify(exported)
    except Exception as error:
        raise ArtifactError(f"onnxsim failed: {first_line(root(error))}") from error
    if not checked:
        raise ArtifactError("onnxsim's own check failed")
    strip(graph)
    if (fault := _fault(graph, asked, linears)) is not None:
        raise ArtifactError(f"onnxsim's graph {fault}")
    before, after = (stored_bytes(each, over=KEPT_BYTES) for each in (exported, graph))
    if after > before:  # a constant that was folded into the file
        raise ArtifactError(f"onnxsim's graph stores {after} bytes, the exported one {before}")
    result: onnx.ModelProto = graph
    return result


def _fault(model: onnx.ModelProto, asked: Asked, linears: Counter[tuple[int, int]]) -> str | None:
    """How the graph differs from what was asked for, as the end of a sentence; None if it does not."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets.get("") != asked.opset:
        return f"has opset {opsets.get('')}, expected {asked.opset}. Set export.opset to one that torch can write."
    names = ([i.name for i in model.graph.input], [o.name for o in model.graph.output])
    if names != ([IMAGE], [*asked.outputs]):
        expected = " and ".join(map(repr, asked.outputs))
        return f"has inputs and outputs {names}, expected one {IMAGE!r} and one {expected}"
    image = _shape(model.graph.input[0])
    if image != (BATCH, *asked.input_size):
        return f"has an input of shape {image}, expected {(BATCH, *asked.input_size)}"
    for value in model.graph.output:
        shape = _shape(value)
        if len(shape) < RANK or shape[0] != BATCH or not all(isinstance(size, int) for size in shape[1:]):
            what = "classes" if value.name == LOGITS else "…"
            return f"has an output of shape {shape}, expected ({BATCH!r}, {what}): the batch must stay dynamic"
    found = linear_shapes(model)
    if found != linears:
        return f"has other linears: gained {_show(found - linears)}, lost {_show(linears - found)}, as (in, out)"
    if not is_large(stored_bytes(model)):  # a larger one is checked as a file
        try:
            onnx.checker.check_model(model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            return f"is not valid ONNX: {first_line(root(error))}"
    return None


def oldest_ir_version(model: onnx.ModelProto) -> int:
    """The IR version that a graph's opsets came with: runtimes that know them and nothing newer read the file.

    No later feature can be lost by it. Functions and types of an opset came no later than its IR version, and what IR 10
    added to nodes, metadata and overloads, is never in a file of slimvit's: `strip` and the exporter see to it.
    """
    version: int = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    return version


def write_onnx(model: onnx.ModelProto, path: Path, weights: Path | None = None) -> tuple[Path, ...]:
    """The files written for the model, the graph first; they appear whole or not at all.

    The IR version of the graph becomes that of its opsets. Types and shapes of values within it are left out: who reads the file
    infers them, and ONNX Runtime is faster with its own (ADR 26).

    Args:
        model: the graph.
        path: the file.
        weights: a file on the same disk, which is moved, with the weights that the graph refers to; None where it holds them.

    Raises:
        StorageError: they cannot be written.
    """
    model.ir_version = oldest_ir_version(model)
    del model.graph.value_info[:]
    data = data_beside(path)
    try:
        with replacing(path) as partial:
            beside = data_beside(partial)
            if weights is not None and any(map(uses_external_data, model.graph.initializer)):
                weights.replace(beside)
                _refer_to(model, data.name)
            elif is_large(stored_bytes(model)):
                model = detached(model, beside)
            onnx.save_model(model, partial)
            onnx.checker.check_model(str(partial), full_check=True)
            files = (path, data) if beside.exists() else (path,)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {fault_words(error)}") from error
    return files


def data_beside(path: Path) -> Path:
    """The path of the weights of a large ONNX file."""
    return path.with_name(f"{path.name}.data")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder beside; what lies there when the block ends well replaces an ONNX file and its weights.

    A block that does not end well leaves what was there.

    Raises:
        StorageError: it cannot be written.
    """
    with folder_beside(path) as folder:
        partial, data = folder / path.name, data_beside(path)
        yield partial
        beside = data_beside(partial)
        try:
            with_data = beside.exists()
            for source, target in ((beside, data), (partial, path)) if with_data else ((partial, path),):
                with source.open("rb") as written:  # the graph last: it is what others look for
                    os.fsync(written.fileno())
                source.replace(target)
            if not with_data:
                data.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {fault_words(error)}") from error


def _refer_to(model: onnx.ModelProto, name: str) -> None:
    """Names the file that holds the weights of a graph."""
    for tensor in model.graph.initializer:
        for entry in tensor.external_data if uses_external_data(tensor) else ():
            if entry.key == "location":
                entry.value = name


def strip(message: Any) -> None:
    """Clears doc strings and metadata of a protobuf message and all in it: they hold stack traces and local paths."""
    for name in ("doc_string", "metadata_props"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    if isinstance(message, onnx.TensorProto):  # nothing below but the weights, which need no copy
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in [value] if hasattr(value, "ListFields") else value:
                strip(item)


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


def census(model: onnx.ModelProto) -> dict[str, int]:
    """Operator → number of nodes."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def _show(shapes: Counter[tuple[int, int]]) -> str:
    return ", ".join(f"{shape} ×{count}" for shape, count in sorted(shapes.items())) or "none"
