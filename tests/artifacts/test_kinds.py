"""What each kind of artifact tells of itself, and how a path becomes one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from builders import dense_model, write_classifier, write_ncnn
from safetensors.torch import save_file

from toolchain.artifacts import ARTIFACTS, PlainFile, open_artifact
from toolchain.cli.screen import fact_lines
from toolchain.errors import ArtifactError, RecipeError, StorageError, TargetUnavailable
from toolchain.surgery.replay import save_model
from toolchain.targets import BuildOptions, get_target

TINY = Path(__file__).parents[1] / "targets/litert/tiny.int8-dynamic.tflite"


@pytest.fixture
def paths(tmp_path):
    """One of each kind that slimvit has, by name."""
    onnx = write_classifier(tmp_path / "x.onnx", padding=50)
    engine = tmp_path / "e" / "x.engine"
    engine.parent.mkdir()
    engine.write_bytes(b"engine")
    record = {"engine": "x.engine", "matmul_dtypes": {"HALF": 3, "FLOAT": 1}, "target": "trt"}
    (engine.parent / "engine.json").write_text(json.dumps(record))
    for target in ("openvino-cpu", "coreml"):
        try:
            get_target(target).probe()
        except TargetUnavailable as error:
            pytest.skip(str(error))
    ir = get_target("openvino-cpu").build(onnx, tmp_path, BuildOptions()).path
    package = get_target("coreml").build(onnx, tmp_path, BuildOptions()).path
    folder = save_model(dense_model(), tmp_path / "dense")
    pytest.importorskip("ai_edge_litert", reason="pip install 'slimvit[litert]'")
    tflite = Path(shutil.copy(TINY, tmp_path))
    pte = tmp_path / "p" / "x.pte"
    pte.parent.mkdir()
    pte.write_bytes(b"\0\0\0\0ET12")
    record = {"engine": "x.pte", "matmul_dtypes": {"INT8-DYNAMIC": 3, "FLOAT": 1}, "target": "executorch-xnnpack"}
    (pte.parent / "engine.json").write_text(json.dumps(record))
    ncnn = write_ncnn(tmp_path / "n.param")
    return {
        "onnx": onnx,
        "tensorrt-engine": engine,
        "openvino-ir": ir,
        "mlpackage": package,
        "model-folder": folder,
        "tflite": tflite,
        "pte": pte,
        "ncnn": ncnn,
    }


def test_every_kind_is_recognised_and_accounts_for_its_bytes(paths):
    assert set(paths) == set(ARTIFACTS)
    for name, path in paths.items():
        artifact = open_artifact(path)
        assert artifact.name == name
        assert (
            artifact.size_bytes == sum(file.stat().st_size for file in artifact.files) == sum(artifact.layers.values())
        )
        assert artifact.facts()["bytes"] == artifact.size_bytes
        assert json.loads(json.dumps(artifact.facts())) == artifact.facts(), "typed facts are JSON values"


def test_what_is_printed_of_a_kind_is_no_python(paths):
    for path in paths.values():
        text = "\n".join(fact_lines(open_artifact(path).facts()))
        text = "\n".join(row for row in text.splitlines() if "slimvit.preprocess" not in row)  # JSON of the file's own
        assert not any(sign in text for sign in ("{", "'", "None", "True"))
    assert "nodes      Reshape 1, Gemm 1" in "\n".join(fact_lines(open_artifact(paths["onnx"]).facts())).splitlines()
    assert "    image  [batch, 1, 8, 8]" in "\n".join(fact_lines(open_artifact(paths["onnx"]).facts())).splitlines()


def test_an_openvino_model_is_read_without_openvino(paths):
    """Its bytes are attributed to the layers of the file that it was built from, and its types and shapes are that file's."""
    ours, source = open_artifact(paths["openvino-ir"]), open_artifact(paths["onnx"])
    assert ours.parts["head", "weight"] == 64 * 10 * 2 < source.parts["head", "weight"] / 2
    assert [(port.name, port.type) for port in ours.inputs] == [("image", "float32")]
    assert ours.signature(3) == source.signature(3)
    assert ours.precision.name == "fp16"
    assert [file.suffix for file in ours.files] == [".bin", ".xml"]
    ours.path.with_suffix(".bin").unlink()
    with pytest.raises(StorageError, match=r"x\.bin"):
        _ = open_artifact(ours.path).size_bytes
    ours.path.write_text("<net><layers>")
    with pytest.raises(ArtifactError, match=r"x\.xml is not an OpenVINO model, or is truncated"):
        _ = open_artifact(ours.path).inputs
    ours.path.write_text("<project/>")
    with pytest.raises(ArtifactError, match="XML of another kind"):
        _ = open_artifact(ours.path).nodes


def test_a_core_ml_package_is_read_from_its_own_description(paths):
    ours, source = open_artifact(paths["mlpackage"]), open_artifact(paths["onnx"])
    assert ours.signature(1) == source.signature(1)
    with pytest.raises(RecipeError, match="batch"):
        ours.signature(3)
    assert [port.name for port in ours.outputs] == ["logits"]
    assert ours.outputs[0].shape == (1, 10)
    assert ours.precision.name == "fp32"
    assert ours.params == 64 * 10 + 10
    assert ours.facts()["nodes"]["linear"] == 1
    assert ours.preprocess == source.preprocess
    before = ours.sha256
    ours.model_path.write_bytes(b"no model")
    damaged = open_artifact(ours.path)
    assert damaged.sha256 != before, "the digest is that of the whole folder"
    with pytest.raises(ArtifactError, match=r"x\.mlpackage"):
        _ = damaged.inputs
    (ours.path / "Manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"Manifest\.json names no model"):
        _ = open_artifact(ours.path).inputs


def test_an_engine_is_known_by_the_record_beside_it_and_by_no_other(paths):
    engine = open_artifact(paths["tensorrt-engine"])
    assert engine.precision.name == "fp16"
    other = engine.path.rename(engine.path.with_name("other.engine"))
    assert open_artifact(other).precision.name == ""
    with pytest.raises(RecipeError, match=r"other\.engine"):
        _ = open_artifact(other).inputs


def test_any_other_file_has_a_size_and_a_digest(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"123")
    found = open_artifact(tmp_path / "x.bin")
    assert isinstance(found, PlainFile)
    assert (found.size_bytes, found.parts) == (3, {("(file x.bin)", ""): 3})
    with pytest.raises(StorageError, match="there is no file or folder"):
        open_artifact(tmp_path / "y")


def test_another_file_of_an_artifact_is_refused_by_the_name_of_the_one_to_take(tmp_path):
    """Kind: the weights of a model in the place of its graph, which would be taken for a plain file of some size."""
    weights, graph = tmp_path / "m.bin", tmp_path / "m.param"
    weights.write_bytes(b"123")
    graph.write_text("7767517\n")
    with pytest.raises(RecipeError, match=r"m\.bin is a part of the ncnn model .*m\.param: name that file instead"):
        open_artifact(weights)
    graph.write_text("something else")
    assert isinstance(open_artifact(weights), PlainFile)


def test_safetensors_are_counted_wherever_they_lie(tmp_path):
    """Kind: weights that others wrote, as one file or below a folder."""
    below = tmp_path / "folder" / "unet"
    below.mkdir(parents=True)
    for path in (tmp_path / "model.safetensors", below / "x.safetensors"):
        save_file({"w": torch.ones(3, 4), "b": torch.ones(4)}, path)
    for path in (tmp_path / "model.safetensors", tmp_path / "folder"):
        artifact = open_artifact(path)
        assert artifact.params == 16
        assert artifact.layers["w"] == 48
        assert sum(artifact.layers.values()) == artifact.size_bytes


@pytest.mark.parametrize(("kind", "size", "precision"), [("u8", 32, "int8"), ("u4", 16, "int4"), ("nf4", 16, "fp4")])
def test_an_openvino_model_with_weights_of_few_bits_says_so(tmp_path, kind, size, precision):
    """Kind: what NNCF writes: bytes, or halves of them, with scales of fp16 beside them."""
    constant = (
        '<layer id="{id}" name="{name}" type="Const" version="opset1"><data element_type="{kind}" shape="{shape}" '
        'offset="{offset}" size="{size}"/><output><port id="0"/></output></layer>'
    )
    layers = constant.format(id=0, name="w", kind=kind, shape="4, 8", offset=0, size=size)
    layers += constant.format(id=1, name="scale", kind="f16", shape="4, 1", offset=size, size=8)
    (tmp_path / "model.xml").write_text(f'<net name="m" version="11"><layers>{layers}</layers><edges/></net>')
    (tmp_path / "model.bin").write_bytes(bytes(size + 8))
    artifact = open_artifact(tmp_path / "model.xml")
    assert artifact.precision.name == precision
    assert artifact.params == 36
    assert not artifact.fixed_scales


def test_an_engine_of_another_size_than_its_record_tells_is_shown_as_truncated(tmp_path):
    (tmp_path / "x.engine").write_bytes(bytes(10))
    (tmp_path / "engine.json").write_text(json.dumps({"engine": "x.engine", "size_bytes": 12}))
    with pytest.raises(ArtifactError, match=r"has 10 bytes, and the engine\.json beside it tells of 12"):
        open_artifact(tmp_path / "x.engine").facts()


def test_a_file_that_went_away_cannot_be_read(tmp_path):
    path = tmp_path / "x.pte"
    path.write_bytes(b"\0\0\0\0ET12")
    artifact = open_artifact(path)
    path.unlink()
    for ask in (lambda: artifact.inputs, artifact.require_whole):
        with pytest.raises(StorageError, match=r"cannot read .*x\.pte"):
            ask()


def test_constants_of_one_name_in_an_openvino_model_all_count(tmp_path):
    """Kind: a graph and the body of its loop, whose layers are named without regard to each other."""
    constant = '<layer name="w" type="Const"><data element_type="f32" shape="2, 2" offset="{}" size="16"/></layer>'
    layers = f"{constant.format(0)}{constant.format(16)}"
    (tmp_path / "model.xml").write_text(f'<net name="m" version="11"><layers>{layers}</layers><edges/></net>')
    (tmp_path / "model.bin").write_bytes(bytes(32))
    artifact = open_artifact(tmp_path / "model.xml")
    assert artifact.params == 8
    assert artifact.parts["w", ""] == 32
