"""Rotary position embeddings on the way to a file: constants of the graph, and the same function at any batch."""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import copy

import onnx
import onnxruntime as ort
import pytest
import torch
from builders import EVA, VARIANTS, random_plan, variant

from toolchain.export.onnx_graph import export_onnx, linear_shapes
from toolchain.model import run_stage
from toolchain.surgery.mask import mask_model
from toolchain.surgery.replay import factorise_structure
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split


@pytest.mark.parametrize("case", [case for case in EVA if case in VARIANTS])
def test_a_compressed_model_with_rotations_is_exported_as_it_is(case, tmp_path):
    model = variant(case)
    plan = random_plan(model)
    module = copy.deepcopy(model.module)
    factorise_structure(module, plan)
    with torch.no_grad():
        for low in plan.low_ranks:
            module.get_submodule(low.module).down.weight.normal_(0, 0.1)
            module.get_submodule(low.module).up.weight.normal_(0, 0.1)
            if (bias := module.get_submodule(low.module).up.bias) is not None:
                bias.normal_(0, 0.1)
    deploy = run_stage(Split(), run_stage(Slice(), mask_model(model, module, plan)).artifact).artifact
    path = tmp_path / "model.onnx"
    export_onnx(deploy.module, path, input_size=model.preprocess.input_size, opset=20, metadata={}, simplify=True)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = torch.randn(batch, *model.preprocess.input_size)
        with torch.no_grad():
            wanted = deploy.module(x)
        (got,) = session.run(None, {"image": x.numpy()})
        assert (torch.from_numpy(got) - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()))
    graph = onnx.load(path)
    assert not {"Sin", "Cos", "Range", "If", "Loop"} & {node.op_type for node in graph.graph.node}
    ranks = {low.rank for low in plan.low_ranks}
    assert all(any(rank in shape for shape in linear_shapes(graph)) for rank in ranks), "a pair was merged"
