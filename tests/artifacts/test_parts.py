"""Size attribution: it names the layer, and it always sums to the bytes on disk."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
from builders import dense_model, random_plan, randomise, write_classifier
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from torch import nn

from toolchain.artifacts import open_artifact
from toolchain.errors import ArtifactError, RecipeError
from toolchain.export.onnx_graph import export_onnx
from toolchain.gate.why import by_layer, size_changes
from toolchain.model import DeployModel, run_stage
from toolchain.surgery.factorised import FactorisedLinear
from toolchain.surgery.mask import mask_model
from toolchain.surgery.replay import factorise_structure, save_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split


def exact(after, before=None):
    """The changes, after checking that they sum to the difference."""
    changes = size_changes(open_artifact(after), None if before is None else open_artifact(before))
    wanted = open_artifact(after).size_bytes - (open_artifact(before).size_bytes if before is not None else 0)
    assert sum(row.change for row in changes) == wanted
    assert sum(row.change for row in by_layer(changes)) == wanted
    return changes


def test_planted_growth_is_found_and_nothing_else(tmp_path):
    old, new = write_classifier(tmp_path / "old.onnx"), write_classifier(tmp_path / "new.onnx", padding=5000)
    first, *rest = exact(new, old)
    assert (first.layer, first.part, first.before) == ("blocks.9.extra", "weight", 0)
    assert 20_000 < first.change < 20_100
    assert [row.layer for row in rest] == ["(graph)"]
    assert exact(old, old) == ()
    assert exact(old, new)[0].change == -first.change


def test_external_data_is_attributed_to_its_tensors(tmp_path):
    path = write_classifier(tmp_path / "m.onnx", padding=100, external=True)
    parts = open_artifact(path).parts
    assert sum(parts.values()) == open_artifact(path).size_bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    assert parts["head", "weight"] == 64 * 10 * 4
    assert parts["blocks.9.extra", "weight"] == 400
    exact(write_classifier(tmp_path / "inline" / "m.onnx"), path)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer[:1]:  # another spelling of the same file
        next(entry for entry in tensor.external_data if entry.key == "location").value = "./m.onnx.data"
    onnx.save(model, path)
    assert (
        sum(open_artifact(path).parts.values())
        == open_artifact(path).size_bytes
        == sum(f.stat().st_size for f in path.parent.glob("m.*"))
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A dense model and its compressed form, as folders and as ONNX files."""
    root = tmp_path_factory.mktemp("exported")
    dense = dense_model()
    plan = random_plan(dense)
    module = copy.deepcopy(dense.module)
    factorise_structure(module, plan)
    for child in module.modules():
        if isinstance(child, FactorisedLinear):  # its factors are unset, and a constant may be folded away
            randomise(child)
            nn.init.normal_(child.down.weight)
            nn.init.normal_(child.up.weight)
    masked = mask_model(dense, module, plan)
    deploy = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact
    for name, model in (("dense", dense), ("deploy", deploy)):
        save_model(model, root / name)
        size = model.preprocess.input_size
        export_onnx(model.module, root / f"{name}.onnx", input_size=size, opset=20, metadata={}, simplify=True)
    return root, dense, deploy


@pytest.mark.slow
def test_weights_without_a_name_are_attributed_by_the_bias_behind_them(exported):
    root, dense, deploy = exported
    for name, model in (("dense", dense), ("deploy", deploy)):
        layers = {layer for layer, part in open_artifact(root / f"{name}.onnx").parts if part == "weight"}
        wanted = {
            module for module, child in model.module.named_modules() if getattr(child, "weight", None) is not None
        }
        assert layers == wanted
    rows = {row.layer: row for row in by_layer(exact(root / "deploy.onnx", root / "dense.onnx"))}
    assert rows["blocks.0.attn.qkv"].after == 0
    assert rows["blocks.0.attn.qkv.down"].before == rows["blocks.0.attn.qkv.up"].before == 0
    assert rows["blocks.1.mlp.fc1"].change < 0


@pytest.mark.slow
def test_folders_are_attributed_by_file_and_tensor(exported):
    root, dense, _ = exported
    rows = exact(root / "deploy", root / "dense")
    assert {"(file model.json)", "blocks.0.mlp.fc1"} <= {row.layer for row in rows}
    parts = open_artifact(root / "dense").parts
    assert parts["head", "weight"] == dense.module.head.weight.numel() * 4
    assert parts["(file model.safetensors)", "header"] > 8
    exact(root / "dense")
    exact(root / "dense.onnx", root / "dense")


def test_parameters_are_counted_from_the_file(exported):
    root, dense, deploy = exported
    for name, model in (("dense", dense), ("deploy", deploy)):
        count = sum(parameter.numel() for parameter in model.module.parameters())
        assert open_artifact(root / name).params == open_artifact(root / f"{name}.onnx").params == count
    assert isinstance(deploy, DeployModel)
    (root / "x.engine").write_bytes(b"engine")
    for what in ("params", "nodes", "inputs"):
        with pytest.raises(RecipeError, match=r"x\.engine"):
            getattr(open_artifact(root / "x.engine"), what)
    exact(root / "x.engine")


def test_nodes_of_subgraphs_and_functions_count(tmp_path):
    def branch(name):
        node = helper.make_node("Identity", ["image"], [name])
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    flag = numpy_helper.from_array(np.array(True), "flag")
    node = helper.make_node("If", ["flag"], ["logits"], then_branch=branch("a"), else_branch=branch("b"))
    image, logits = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("image", "logits"))
    onnx.save(helper.make_model(helper.make_graph([node], "g", [image], [logits], [flag])), tmp_path / "m.onnx")
    assert open_artifact(tmp_path / "m.onnx").nodes == 3
    exact(tmp_path / "m.onnx")


def test_what_is_no_safetensors_file_is_told(tmp_path):
    for content in (b"", b"\xff" * 20, (8).to_bytes(8, "little") + b"[1, 2] ", (2).to_bytes(8, "little") + b"{}"):
        (tmp_path / "w.safetensors").write_bytes(content)
        if content.endswith(b"{}"):
            assert open_artifact(tmp_path).parts == {("(file w.safetensors)", "header"): 10}
            continue
        with pytest.raises(ArtifactError, match=r"w\.safetensors"):
            _ = open_artifact(tmp_path).parts
    save_file({"a.weight": np.ones((2, 3), np.float16)}, tmp_path / "w.safetensors")
    assert open_artifact(tmp_path).parts["a", "weight"] == 12


def test_weights_before_which_no_layer_has_a_name_are_called_that(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "val_1"], ["h"]), helper.make_node("MatMul", ["h", "val_2"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    weights = [numpy_helper.from_array(np.ones((4, 4), np.float32), name) for name in ("val_1", "val_2")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    layers = {layer for layer, part in open_artifact(tmp_path / "m.onnx").parts if part.startswith("weight")}
    assert layers == {"(weights without a name)"}
