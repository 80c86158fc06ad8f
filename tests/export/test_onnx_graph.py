"""The exported file is the module: same function, same linears, dynamic batch, and the same bytes everywhere."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
import onnxruntime as ort
import onnxsim
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import nn

from toolchain.errors import ArtifactError, StorageError
from toolchain.export import large, onnx_graph
from toolchain.export.large import KEPT_BYTES, stored_bytes
from toolchain.export.onnx_graph import export_onnx, linear_shapes
from toolchain.parity import TOLERANCES, compare

SIZE = (3, 32, 32)
METADATA = {"tool": "slimvit", "model": "tiny", "preprocess": '{"mean": [0.5, 0.5, 0.5]}'}


def low_rank_vit(rank: int = 8) -> nn.Module:
    """Two blocks of width 64 with LayerScale, everything random; blocks.0.attn.qkv is a low-rank pair."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=64, depth=2, num_heads=2, num_classes=10, init_values=1.0
    )
    model.blocks[0].attn.qkv = nn.Sequential(nn.Linear(64, rank, bias=False), nn.Linear(rank, 192))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.head.weight.mul_(50)
    return model.train()


def session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def module():
    return low_rank_vit()


@pytest.fixture(scope="module")
def traced(module):
    """The graph as torch exports it, made once: it is the slow part."""
    asked = onnx_graph.Asked(SIZE, 20, ("logits",))
    return onnx_graph._from_torch(onnx_graph._plain(module), asked)


@pytest.fixture(scope="module")
def exported(module, tmp_path_factory):
    path = tmp_path_factory.mktemp("simplified") / "model.onnx"
    return path, export_onnx(module, path, input_size=SIZE, opset=20, metadata=METADATA, simplify=True)


@pytest.fixture(scope="module")
def plain(module, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "model.onnx"
    return path, export_onnx(module, path, input_size=SIZE, opset=20, metadata=METADATA, simplify=False)


@pytest.fixture
def from_torch(monkeypatch, traced):
    """Replaces torch's part by its recorded result, changed, so that what follows is tested in milliseconds."""

    def replace(change=lambda model: None):
        model = copy.deepcopy(traced)
        change(model)
        monkeypatch.setattr(onnx_graph, "_from_torch", lambda *_: model)

    return replace


@pytest.mark.parametrize("form", ["exported", "plain"])
def test_the_file_computes_what_the_module_computes_at_batch_1_and_3(form, module, request):
    path, _ = request.getfixturevalue(form)
    run, reference = session(path), copy.deepcopy(module).eval()
    images = np.random.default_rng(0).standard_normal((3, *SIZE)).astype(np.float32)

    def torch_logits(batch):
        with torch.inference_mode():
            return reference(torch.from_numpy(batch)).numpy()

    rung = compare(
        "torch",
        "onnx",
        torch_logits,
        lambda batch: run.run(None, {"image": batch})[0],
        images,
        tolerance=TOLERANCES["fp32"],
        real_images=False,
    )
    assert rung.verdict == "pass", rung


@pytest.mark.parametrize("form", ["exported", "plain"])
def test_the_signature_opset_and_metadata_are_as_asked(form, request):
    path, facts = request.getfixturevalue(form)
    model = onnx.load(path)
    run = session(path)
    assert [(i.name, i.shape) for i in run.get_inputs()] == [("image", ["batch", *SIZE])]
    assert [(o.name, o.shape) for o in run.get_outputs()] == [("logits", ["batch", 10])]
    assert facts.opset == 20 == next(o.version for o in model.opset_import if o.domain == "")
    assert run.get_modelmeta().custom_metadata_map == METADATA
    assert facts.files == (path,)
    assert facts.size_bytes == path.stat().st_size
    assert list(path.parent.iterdir()) == [path], "nothing else is left in the folder"


@pytest.mark.parametrize(("opset", "version"), [(18, 8), (19, 9), (20, 9), (21, 10), (22, 10), (23, 11)])
def test_the_ir_version_is_the_one_that_the_opset_came_with(opset, version, tmp_path):
    """Kind: a file that old runtimes refuse for its IR version, though they know its opset.

    ONNX Runtime 1.14 (opset 18) reads IR versions up to 8, 1.17 (opset 20) up to 9.
    """
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=13)
    onnx_graph.write_onnx(model, tmp_path / "a.onnx")
    assert onnx.load(tmp_path / "a.onnx").ir_version == version


def test_every_file_that_is_written_has_it(exported, plain, tmp_path):
    for path, _ in (exported, plain):
        assert onnx.load(path).ir_version == 9
    from toolchain.measure.calibration import built_in

    assert onnx.load(built_in(tmp_path / "b.onnx")).ir_version == 9, "it is sent to devices as well"


def test_a_low_rank_pair_stays_two_products(module, exported, plain):
    wanted = Counter((m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear))
    assert wanted[(64, 8)] == wanted[(8, 192)] == wanted[(64, 192)] == 1
    for path, _ in (exported, plain):
        assert linear_shapes(onnx.load(path)) == wanted


def test_simplifying_changes_the_graph_and_folds_no_constant_into_the_file(exported, plain):
    assert exported[1].simplified
    assert not plain[1].simplified
    assert exported[1].nodes_before == plain[1].nodes_before
    assert exported[1].nodes_after != plain[1].nodes_after
    weights = [stored_bytes(onnx.load(path), over=KEPT_BYTES) for path, _ in (exported, plain)]
    assert weights[0] <= weights[1]
    assert exported[1].notes == plain[1].notes == ()


def test_attention_is_unfused_and_the_module_is_left_as_it_was(module, exported):
    nodes = exported[1].nodes_before
    assert nodes["Softmax"] == 2
    assert nodes["Mul"] == 4, "the two LayerScales of each block; a scale of the query would be more"
    assert "Attention" not in nodes
    assert all(block.attn.fused_attn for block in module.blocks)
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("form", ["exported", "plain"])
def test_a_file_leaves_the_shapes_within_it_to_who_reads_it(form, request):
    assert not onnx.load(request.getfixturevalue(form)[0]).graph.value_info


@pytest.mark.parametrize("form", ["exported", "plain"])
def test_no_byte_tells_where_or_by_what_path_it_was_exported(form, request):
    path, _ = request.getfixturevalue(form)
    data = path.read_bytes()
    for trace in (
        b"site-packages",
        b".py",
        b"timm",
        b"stack_trace",
        str(Path.cwd()).encode(),
        str(path.parent).encode(),
    ):
        assert trace not in data


@pytest.mark.slow
def test_another_process_in_another_folder_writes_the_same_bytes(exported, tmp_path):
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path.cwd())]!r}\n"
        "from pathlib import Path\n"
        "from test_onnx_graph import METADATA, SIZE, low_rank_vit\n"
        "from toolchain.export.onnx_graph import export_onnx\n"
        "metadata = dict(reversed(METADATA.items()))\n"
        "export_onnx(low_rank_vit(), Path('other.onnx'), input_size=SIZE, opset=20, metadata=metadata, simplify=True)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "", "the exporter's own chatter stays out"
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (exported[0], tmp_path / "other.onnx")]
    assert digests[0] == digests[1]


def freeze_batch(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def lose_output_batch(model):
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1


def rename_input(model):
    for node in model.graph.node:
        node.input[:] = ["x" if name == "image" else name for name in node.input]
    model.graph.input[0].name = "x"


def change_opset(model):
    model.opset_import[0].version = 19


def merge_the_pair(model):
    """up · down becomes one weight: what a constant folder could do to a low-rank pair."""
    weights = {t.name: t for t in model.graph.initializer}
    nodes = model.graph.node
    first = next(n for n in nodes if n.op_type == "MatMul" and list(weights[n.input[1]].dims) == [64, 8])
    second = next(n for n in nodes if n.op_type in ("MatMul", "Gemm") and list(weights[n.input[1]].dims) == [8, 192])
    product = numpy_helper.to_array(weights[first.input[1]]) @ numpy_helper.to_array(weights[second.input[1]])
    weights[second.input[1]].CopyFrom(numpy_helper.from_array(product, second.input[1]))
    second.input[0] = first.input[0]
    nodes.remove(first)


def break_graph(model):
    model.graph.node[0].input[0] = "nowhere"


def grow(model):
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(100_000, np.float32), "folded"))


def fold_less_than_the_shapes_take(model):
    """What a file does not hold must not pay for what it does."""
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(300, np.float32), "folded"))
    del model.graph.value_info[:]


def fail(model):
    raise RuntimeError("onnxsim broke\nin many lines")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (freeze_batch, "input of shape"),
        (lose_output_batch, "batch must stay dynamic"),
        (rename_input, "inputs and outputs"),
        (change_opset, "opset 19, expected 20"),
        (merge_the_pair, "other linears"),
        (break_graph, "not valid ONNX"),
        (grow, "bytes"),
        (fold_less_than_the_shapes_take, "bytes"),
        (fail, "onnxsim failed: onnxsim broke"),
    ],
)
def test_a_simplifier_that_changes_the_model_is_not_believed(change, said, plain, from_torch, monkeypatch, tmp_path):
    def simplify(model):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        change(changed)
        return changed, True

    from_torch()
    monkeypatch.setattr(onnxsim, "simplify", simplify)
    facts = export_onnx(
        low_rank_vit(), tmp_path / "m.onnx", input_size=SIZE, opset=20, metadata=METADATA, simplify=True
    )
    assert not facts.simplified
    assert len(facts.notes) == 1
    assert facts.notes[0].startswith("not simplified: ")
    assert said in facts.notes[0]
    assert (tmp_path / "m.onnx").read_bytes() == plain[0].read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (freeze_batch, "input of shape"),
        (change_opset, "opset 19, expected 20"),
        (merge_the_pair, r"lost linears .*\(8, 192\) ×1, \(64, 8\) ×1"),
        (break_graph, "not valid ONNX"),
    ],
)
def test_a_torch_graph_that_is_not_what_was_asked_for_writes_no_file(change, said, from_torch, tmp_path):
    from_torch(change)
    with pytest.raises(ArtifactError, match=said):
        export_onnx(low_rank_vit(), tmp_path / "m.onnx", input_size=SIZE, opset=20, metadata={}, simplify=False)
    assert list(tmp_path.iterdir()) == []


def test_weights_too_large_for_one_file_go_beside_it_and_count(plain, from_torch, monkeypatch, tmp_path):
    from_torch()
    monkeypatch.setattr(large, "INLINE_LIMIT_BYTES", 100_000)
    path = tmp_path / "m.onnx"
    facts = export_onnx(low_rank_vit(), path, input_size=SIZE, opset=20, metadata={}, simplify=True)
    assert [file.name for file in facts.files] == ["m.onnx", "m.onnx.data"]
    assert facts.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert path.stat().st_size < 100_000 < facts.size_bytes
    assert "not simplified" in facts.notes[0]
    feeds = {"image": np.random.default_rng(0).standard_normal((2, *SIZE)).astype(np.float32)}
    np.testing.assert_array_equal(session(path).run(None, feeds)[0], session(plain[0]).run(None, feeds)[0])

    monkeypatch.undo()
    from_torch()
    export_onnx(low_rank_vit(), path, input_size=SIZE, opset=20, metadata={}, simplify=False)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"], "no stale weights stay behind"


def test_a_failed_write_keeps_the_old_file(from_torch, monkeypatch, tmp_path):
    from_torch()
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def full(_model, partial, **__):
        (swept,) = (each.name for each in tmp_path.iterdir() if each != path)
        assert swept == partial.parent.name
        assert fnmatch.fnmatch(swept, ".m.onnx.*.partial"), "the next run removes what a killed one leaves"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    with pytest.raises(StorageError, match="No space left"):
        export_onnx(low_rank_vit(), path, input_size=SIZE, opset=20, metadata={}, simplify=False)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


class Unexportable(nn.Module):
    def forward(self, image):
        return torch.linalg.matrix_exp(image).flatten(1)


class FrozenBatch(nn.Module):
    def forward(self, image):
        return image.reshape(2, -1)


def test_what_torch_cannot_export_is_one_clear_line(tmp_path):
    with pytest.raises(ArtifactError, match=r"torch cannot export Unexportable to ONNX: .*matrix_exp") as caught:
        export_onnx(Unexportable(), tmp_path / "m.onnx", input_size=(1, 4, 4), opset=20, metadata={}, simplify=False)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_freezes_the_batch_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="batch"):
        export_onnx(FrozenBatch(), tmp_path / "m.onnx", input_size=(1, 4, 4), opset=20, metadata={}, simplify=False)
