"""Kind: more weights than one protobuf message holds. The limit is lowered, so that a small model takes the whole path."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import onnx
import pytest
import torch
from builders import dense_model
from google.protobuf.message import EncodeError
from onnx.external_data_helper import uses_external_data

from toolchain.artifacts import open_artifact
from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.data import open_source
from toolchain.data.transforms import Wanted
from toolchain.errors import ArtifactError, StorageError
from toolchain.export import large
from toolchain.export.accuracy import accuracy_of
from toolchain.export.agreement import parity_of
from toolchain.export.calls import stack_images
from toolchain.export.engine import BuildEngine
from toolchain.export.large import detached, module_bytes, stored_bytes, with_shapes
from toolchain.export.stage import Export
from toolchain.measure.bundle import Question, pack
from toolchain.measure.samples import Design, Workload
from toolchain.model import Preprocess, run_stage
from toolchain.pipeline.judge import Judge
from toolchain.recipe import EngineSection, ExportSection
from toolchain.surgery.replay import save_model
from toolchain.targets import EngineBuild
from toolchain.targets.engine_facts import source_digests
from toolchain.targets.tensorrt import network as trt_network

KWARGS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 10}


@pytest.fixture(scope="module")
def limit():
    """A message holds 20 kB; nothing may ask how large a model is, which fails where it matters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "INLINE_LIMIT_BYTES", 20_000)
        yield


@pytest.fixture(scope="module")
def source():
    return open_source("digits", Wanted((1, 8, 8), {}, calibration_images=32))


@pytest.fixture(scope="module")
def exported(limit, source, tmp_path_factory):
    """(the model's folder, its fp32 file, what is in it), by the real stage."""
    root = tmp_path_factory.mktemp("large")
    model = dense_model(**KWARGS)
    model = type(model)(
        model.ref,
        model.module,
        model.family,
        model.groups,
        Preprocess((1, 8, 8), source.preprocessing.mean, source.preprocessing.std),
        model.provenance,
    )
    save_model(model, root / "m")
    images = stack_images([source.split("validation")[index][0] for index in range(3)])
    made = run_stage(Export(ExportSection(softmax=True), root / "fp32.onnx", images, True, "test"), model)
    return root / "m", made.artifact, made.facts


@pytest.mark.slow
def test_the_weights_go_beside_the_graph_and_never_through_it(exported):
    _, artifact, graph = exported
    assert [file.name for file in graph.files] == ["fp32.onnx", "fp32.onnx.data"]
    assert sorted(file.name for file in artifact.path.parent.iterdir()) == ["fp32.onnx", "fp32.onnx.data", "m"]
    assert artifact.path.stat().st_size < 30_000 < graph.size_bytes
    assert "not simplified" in graph.notes[0]
    model = OnnxFile(artifact.path).model
    assert all(uses_external_data(tensor) for tensor in model.graph.initializer if np.prod(tensor.dims) > 256)
    assert {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"} == {
        "fp32.onnx.data"
    }
    assert stored_bytes(model) > 4 * 50_000


@pytest.fixture(scope="module", params=["fp16", "int8-dynamic", "int8-qdq"])
def converted(request, exported, source):
    path = exported[1].path.with_name(f"{request.param}.onnx")
    return request.param, run_stage(Judge(source).convert(request.param, path), exported[1])


def test_every_precision_is_made_of_it_and_used_like_any_other(converted, exported):
    folder = exported[0]
    name, made = converted
    assert {rung.verdict for rung in made.rungs} == {"pass"}
    assert [file.name for file in made.facts.graph.files] == [f"{name}.onnx", f"{name}.onnx.data"]
    assert parity_of(folder, made.artifact.path, "digits").rung.verdict == "pass"
    assert accuracy_of(made.artifact.path, "digits", "test").accuracy.total == 359


def test_size_digest_parts_and_inspect_count_both_files(exported):
    _, artifact, graph = exported
    assert len(open_artifact(artifact.path).files) == 2
    assert sum(open_artifact(artifact.path).parts.values()) == graph.size_bytes
    assert open_artifact(artifact.path).params > 50_000
    facts = open_artifact(artifact.path).facts()
    assert facts["sha256"] == open_artifact(artifact.path).sha256, "what a gate names, and not of the graph alone"
    assert facts["bytes"] == graph.size_bytes
    assert facts["precision"] == "fp32"


def test_a_bundle_carries_both(exported, tmp_path):
    path = exported[1].path
    pack(path, path, tmp_path / "b.tar", Question("ort-cpu", Workload(), Design()))
    with tarfile.open(tmp_path / "b.tar") as tar:
        assert any(name.endswith("fp32.onnx.data") for name in tar.getnames())


def test_an_engine_is_built_from_it_and_says_which_weights(exported, tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")
    path = exported[1].path
    made = run_stage(BuildEngine(EngineSection(), "openvino-cpu", tmp_path / "engine"), exported[1]).artifact
    assert isinstance(made, EngineBuild)
    assert list(made.facts["onnx_data_sha256"]) == ["fp32.onnx.data"]
    assert (
        json.loads((tmp_path / "engine" / "engine.json").read_text())["onnx_data_sha256"]
        == (source_digests(path)["onnx_data_sha256"])
    )


def test_other_weights_beside_the_same_graph_are_another_source(exported, tmp_path):
    """The graph alone does not tell: a stripped engine would take the weights of any other training."""
    for name in ("fp32.onnx", "fp32.onnx.data"):
        (tmp_path / name).write_bytes(exported[1].path.with_name(name).read_bytes())
    before = source_digests(tmp_path / "fp32.onnx")
    with (tmp_path / "fp32.onnx.data").open("r+b") as file:
        file.write(b"\x01")
    after = source_digests(tmp_path / "fp32.onnx")
    assert before["onnx_sha256"] == after["onnx_sha256"]
    assert before != after


@pytest.mark.slow
def test_a_failed_export_leaves_nothing_behind(limit, source, tmp_path, full_disk):
    model = dense_model(**KWARGS)
    full_disk(onnx, "save_model")
    images = np.zeros((3, 1, 8, 8), np.float32)
    with pytest.raises(StorageError, match=rf"^cannot write {tmp_path / 'a.onnx'}: No space left on device; .+$"):
        run_stage(Export(ExportSection(), tmp_path / "a.onnx", images, False, "test"), model)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_counted_once_and_wherever_they_lie(exported, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    module[1].weight = module[0].weight
    module.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
    assert module_bytes(module) == 4 * (16 + 4 + 4) + 24
    whole = onnx.load(exported[1].path)
    moved = detached(whole, tmp_path / "moved.data")
    assert abs(stored_bytes(moved) - stored_bytes(whole)) < 20_000
    onnx.save_model(moved, tmp_path / "moved.onnx")
    assert {t.name: t.raw_data for t in onnx.load(tmp_path / "moved.onnx").graph.initializer} == {
        t.name: t.raw_data for t in whole.graph.initializer
    }


def test_shapes_need_no_weights(exported):
    whole = onnx.load(exported[1].path)
    bare = with_shapes(whole)
    assert bare.ByteSize() < 50_000
    assert {str(value) for value in bare.graph.value_info} == {
        str(value) for value in onnx.shape_inference.infer_shapes(whole).graph.value_info
    }


def test_tensorrt_is_not_given_what_cannot_be_written(tmp_path):
    class Large:
        def SerializeToString(self):  # noqa: N802 - protobuf's name
            raise EncodeError("Failed to serialize proto")

    with pytest.raises(ArtifactError, match="more than 2 GB of weights"):
        trt_network.bytes_of(Large(), tmp_path / "a.onnx")
