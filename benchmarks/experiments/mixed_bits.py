"""What eight bits for some linears are worth in an int4 file, against a wider model in int4 whose file is as large.

Each linear is rounded to four bits alone, the others to eight. Those that then lose most for the bytes that they save keep eight
bits. Losses are of calibration images. Files are judged as ONNX Runtime runs them, one image in a call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from kinds.compression import Clock
from onnx import TensorProto, numpy_helper
from records import Record
from torch import Tensor, nn

from experiments.product import compressed
from experiments.starts import BACKBONE, Start, earlier, figures, parser, record, start
from toolchain.artifacts.onnx_walk import linked
from toolchain.data import batches
from toolchain.export.int4 import OPSET, int4
from toolchain.export.loss import Yardstick, layer_of
from toolchain.export.observe import session
from toolchain.export.onnx_graph import export_onnx, inner_linears, linear_nodes
from toolchain.export.quantise import dynamic
from toolchain.export.weights import bias_of
from toolchain.model import IMAGE, MaskedModel, run_stage
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split

KIND = "mixed-bits"
SHARES = (0.125, 0.25, 0.5)
"""Of the weights of linears: how many keep eight bits."""
WIDER = (0.25, 0.5)
"""Those of SHARES whose bytes a wider model gets as well."""
FP32, EIGHT, FOUR = "fp32", "int8", "int4"
WHOLE, LOGITS = ("class", "patches"), ("logits",)
NONE = frozenset[str]()
"""No linear keeps eight bits."""
Array = np.ndarray[Any, Any]


class Tokens(nn.Module):
    """The tokens of a backbone after its last norm, as two outputs: that of the class, and those of patches."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] → [N, 1, D], [N, P, D]."""
        tokens = self.module.forward_features(images)  # type: ignore[operator]
        return tokens[:, :1], tokens[:, 1:]


class Opened(nn.Module):
    """A graph as ONNX Runtime runs it, one image in a call, in the place of the module that it was exported from."""

    def __init__(self, run: Any, outputs: Sequence[str]) -> None:
        super().__init__()
        self.run, self.outputs = run, list(outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] → outputs, one after the other along the tokens."""
        calls = [self.run(self.outputs, {IMAGE: image[None].numpy()}) for image in images]
        return torch.cat([torch.cat([torch.from_numpy(call[name]) for name in self.outputs], dim=1) for call in calls])

    forward_features = forward


@contextmanager
def opened(model: onnx.ModelProto) -> Iterator[Opened]:
    """A graph to be judged, in a block."""
    with session(model) as run:
        yield Opened(run, [value.name for value in model.graph.output])


def exported(begun: Start, masked: MaskedModel) -> onnx.ModelProto:
    """The fp32 graph of a compressed model in its final form; of a backbone with all tokens."""
    module = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact.module.eval()
    whole = begun.name == BACKBONE
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        export_onnx(
            Tokens(module) if whole else module,
            path,
            input_size=masked.preprocess.input_size,
            opset=OPSET,
            metadata={},
            simplify=True,
            outputs=WHOLE if whole else LOGITS,
        )
        return onnx.load(path)


def mixed(
    four: onnx.ModelProto, model: onnx.ModelProto, eight: onnx.ModelProto, kept: frozenset[str]
) -> onnx.ModelProto:
    """An int4 graph in which some linears have eight bits.

    Args:
        four: what `int4` made of `model`.
        model: fp32.
        eight: what `dynamic` made of `model`.
        kept: those linears, by the names of their nodes.
    """
    result = onnx.ModelProto()
    result.CopyFrom(four)
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    before = {tensor.name: tensor for tensor in model.graph.initializer}
    rounded = {tensor.name: tensor for tensor in eight.graph.initializer}
    for weight, bias in parts(model, kept):
        codes = f"{weight}_quantized"
        for name in (codes, f"{weight}_scale"):
            stored[name].CopyFrom(rounded[name])
        if bias:
            half = stored[bias].data_type == TensorProto.FLOAT16
            values = numpy_helper.to_array(before[bias])
            stored[bias].CopyFrom(numpy_helper.from_array(values.astype(np.float16 if half else np.float32), bias))
        cast = next(node for node in result.graph.node if node.op_type == "Cast" and node.input[0] == codes)
        for node in result.graph.node:
            for at, name in enumerate(node.input):
                node.input[at] = codes if name == cast.output[0] else name
        result.graph.node.remove(cast)
    return result


def parts(model: onnx.ModelProto, names: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(weight, bias or "") of some linears of an fp32 graph, by the names of their nodes."""
    nodes = {node.name: node for node in linked(model).graph}
    for proto in linear_nodes(model):
        if proto.name in names:
            node = nodes[proto.name]
            turned = bool(node.attributes.get_int("transB", 0))
            sizes = node.inputs[1].shape.numpy()  # type: ignore[union-attr]
            bias = bias_of(node, int(sizes[0 if turned else 1]))
            yield proto.input[1], str(bias.name) if bias is not None and bias.is_initializer() else ""


def sizes_of(model: onnx.ModelProto) -> dict[str, int]:
    """Inner linear → count of its weights."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    inner = set(inner_linears(model))
    return {node.name: int(np.prod(stored[node.input[1]].dims)) for node in linear_nodes(model) if node.name in inner}


def losses(four: onnx.ModelProto, model: onnx.ModelProto, eight: onnx.ModelProto, images: Array) -> dict[str, float]:
    """Inner linear → what four bits for it alone lose more than eight for all."""
    yardstick, inner = Yardstick.of(model, images), frozenset(inner_linears(model))
    least = yardstick.lost(mixed(four, model, eight, inner))
    return {name: yardstick.lost(mixed(four, model, eight, inner - {name})) - least for name in sorted(inner)}


def taken(lost: Mapping[str, float], sizes: Mapping[str, int], share: float) -> frozenset[str]:
    """The linears that keep eight bits: those with the largest loss for each weight, up to a share of all weights."""
    left, chosen = share * sum(sizes.values()), set[str]()
    for name in sorted(sizes, key=lambda name: (-lost[name] / sizes[name], name)):
        if sizes[name] <= left:
            chosen.add(name)
            left -= sizes[name]
    return frozenset(chosen)


def calibration(begun: Start) -> Array:
    """The images that were calibrated on, [N, C, H, W]."""
    seen = batches(begun.job.source.split("calibration"), 64)
    return np.concatenate([images.numpy() for images, _ in seen])


class Trial:
    """Files of one dense model, made and judged one after the other; those of the record that is there stay."""

    def __init__(self, begun: Start, work: Path, budget: float, old: Record | None) -> None:
        self.begun, self.work, self.budget, self.clock = begun, work, budget, Clock()
        self.clock.seconds |= old.seconds if old else {}
        self.definition = definition(budget)
        self.result: dict[str, Any] = {
            "dense": begun.job.problem.shape.params,
            "judged": old.result["judged"] if old else begun.by_image(begun.job.dense.module),
            "outcomes": list(old.result["outcomes"]) if old else [],
        }

    def size(self, way: str) -> int:
        """Bytes of a file that was judged; 0 if it was not."""
        return next((each["bytes"] for each in self.result["outcomes"] if each["way"] == way), 0)

    def add(self, way: str, model: onnx.ModelProto, **facts: Any) -> None:
        """Judges a file and records it, unless it is there."""
        if self.size(way):
            return
        with opened(model) as module:
            judged = self.begun.by_image(module)
        found = {"budget": self.budget, "way": way, "bytes": len(model.SerializeToString()), **facts, "judged": judged}
        self.result["outcomes"].append(found)
        self.clock.lap("files")
        self.save()
        print(way, found["bytes"], figures(judged), flush=True)

    def save(self) -> None:
        """Records what was judged so far."""
        record(KIND, self.begun, self.definition, self.result, self.clock.seconds)

    def files(self, images: Array) -> None:
        """Those of the budget: fp32, int8, int4, and int4 with some linears in eight bits."""
        if all(self.size(way) for way in (FP32, EIGHT, FOUR, *map(mixture, SHARES))):
            return
        model = exported(self.begun, compressed(self.begun, self.budget, self.work))
        self.clock.lap("models")
        four, eight = int4(model, images, NONE).model, dynamic(model)
        for way, graph in ((FP32, model), (EIGHT, eight), (FOUR, four)):
            self.add(way, graph)
        lost, sizes = losses(four, model, eight, images), sizes_of(model)
        for share in SHARES:
            kept = taken(lost, sizes, share)
            self.add(
                mixture(share), mixed(four, model, eight, kept), eights=sorted(layer_of(model, name) for name in kept)
            )

    def wider(self, images: Array, share: float) -> None:
        """The int4 file of a wider model that has the bytes of a mixed one, but for what else is in it."""
        more = 2 * (self.size(mixture(share)) - self.size(FOUR)) / self.result["dense"]
        if self.size(way := f"{FOUR}, wider by the bytes of {100 * share:g} %"):
            return
        params = round(self.budget + more, 3)
        model = exported(self.begun, compressed(self.begun, params, self.work))
        self.clock.lap("models")
        self.add(way, int4(model, images, NONE).model, params=params)


def mixture(share: float) -> str:
    """What an int4 file is called in which a share of the weights has eight bits."""
    return f"{FOUR}, {100 * share:g} % in {EIGHT}"


def definition(budget: float) -> dict[str, Any]:
    """What the experiment is about."""
    return {"budget": budget, "shares": list(SHARES), "wider": list(WIDER)}


def main(arguments: Sequence[str]) -> int:
    """0 after the record was written, anew after each file."""
    options = parser(__doc__)
    options.add_argument("--resume", action="store_true", help="keep the files of the record that is there")
    asked = options.parse_args(arguments)
    begun = start(asked.model, asked.work, asked.images)
    (budget,) = asked.budgets or (0.5,)
    old = earlier(KIND, begun, definition(budget)) if asked.resume else None
    trial, images = Trial(begun, asked.work, budget, old), calibration(begun)
    trial.files(images)
    for share in WIDER:
        trial.wider(images, share)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
