"""Off-the-shelf models take the dense model's images, are what timm says they are, and stand in one table."""

from __future__ import annotations

import json

import pytest
import timm
from builders import TINY, dense_model

from toolchain.bench import references
from toolchain.bench.products import products, read_graph
from toolchain.bench.reference_table import References
from toolchain.bench.references import classifier_shape, export_reference, reference_rows, stored_params
from toolchain.bench.verify import verify
from toolchain.cost import trace
from toolchain.errors import ArtifactError, ModelError, RecipeError
from toolchain.export.onnx_graph import export_onnx, read_onnx
from toolchain.families import family_of

SHORT = {"sessions": 1, "blocks": 4, "slot_ms": 1.0, "warmup_s": 0.01}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("references") / "dense.onnx"
    export_onnx(dense_model().module, path, input_size=(3, 32, 32), opset=20, metadata={}, simplify=True)
    return path


def test_the_shape_of_a_classifier(dense, stack, tmp_path):
    assert classifier_shape(dense) == ((3, 32, 32), TINY["num_classes"])
    with pytest.raises(RecipeError, match="one image"):
        classifier_shape(stack(tmp_path / "stack.onnx"))


@pytest.fixture(scope="module")
def deit_tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("deit") / "r.onnx"
    return export_reference("deit_tiny_patch16_224", path, input_size=(3, 64, 64), classes=11)


def test_a_reference_is_timms_model_at_the_asked_size(deit_tiny):
    assert classifier_shape(deit_tiny) == ((3, 64, 64), 11)
    module = timm.create_model("deit_tiny_patch16_224", num_classes=11, img_size=64)
    assert stored_params(deit_tiny) == sum(p.numel() for p in module.parameters())
    shape = trace(module, family_of(module, "deit_tiny_patch16_224"), (3, 64, 64))
    assert sum(product.total_macs for product in products(read_graph(deit_tiny, 1))) == shape.macs


def test_no_bias_of_a_reference_is_folded_away(deit_tiny):
    """A fresh timm model has zero biases, which graph tools drop: it would be timed as what nobody ships."""
    gemms = [node for node in read_onnx(deit_tiny).graph.node if node.op_type == "Gemm"]
    assert len(gemms) == 12 * 4 + 1
    assert all(len(node.input) == 3 and node.input[2] for node in gemms)


def test_a_reference_need_not_be_a_transformer(tmp_path):
    path = export_reference("test_efficientnet", tmp_path / "r.onnx", input_size=(3, 64, 64), classes=11)
    assert classifier_shape(path) == ((3, 64, 64), 11)
    assert {product.op for product in products(read_graph(path, 1))} == {"Conv", "Gemm"}


def test_a_model_that_timm_does_not_know_is_refused(tmp_path):
    with pytest.raises(ModelError, match="did you mean 'deit_tiny_patch16_224'"):
        export_reference("deit_tinny_patch16_224", tmp_path / "r.onnx", input_size=(3, 32, 32), classes=5)


def test_all_models_stand_beside_the_dense_one(dense, tmp_path, monkeypatch):
    def small(name, path, *, input_size, classes, seed):
        size = {"deep": {**TINY, "depth": 8}, "shallow": {**TINY, "depth": 1}}[name]
        return export_onnx(
            dense_model(**size).module, path, input_size=input_size, opset=20, metadata={}, simplify=True
        ).files[0]

    monkeypatch.setattr(references, "export_reference", small)
    seen = []
    rows = reference_rows(
        dense, dense, ["deep", "shallow"], settings=SHORT, on_progress=lambda text, share: seen.append(share)
    )
    assert [(row.name, row.kind) for row in rows] == [
        ("dense.onnx", "dense"),
        ("dense.onnx", "compressed"),
        ("deep", "timm, untrained"),
        ("shallow", "timm, untrained"),
    ]
    assert rows[0].comparison is None
    assert rows[0].latency_ms == rows[1].comparison.latency_ms("A")
    assert all(row.comparison.artifacts["A"].name == "dense.onnx" for row in rows[1:])
    assert rows[2].params > rows[0].params > rows[3].params
    assert rows[2].macs > rows[0].macs > rows[3].macs
    assert rows[2].comparison.ratio.point > 0 > rows[3].comparison.ratio.point
    assert seen == sorted(seen)
    path, table = tmp_path / "table.json", References(tuple(rows))
    table.save(path)
    assert References.load(path).to_dict() == table.to_dict() == verify(path).to_dict()
    for edit in (
        lambda found: found["rows"][0].update(latency_ms=1.0),
        lambda found: found["rows"][2].update(ratio={"point": 0.5, "lo": 0.4, "hi": 0.6}),
        lambda found: found["rows"][3].update(size_bytes=1),
        lambda found: found["rows"][1]["comparison"]["ratio"].update(point=0.5),
        lambda found: found["rows"][1].pop("comparison"),
        lambda found: found.update(rows=found["rows"][:1]),
    ):
        found = json.loads(path.read_text())
        edit(found)
        (tmp_path / "edited.json").write_text(json.dumps(found))
        with pytest.raises(ArtifactError, match=r"altered|no table"):
            verify(tmp_path / "edited.json")
    with pytest.raises(RecipeError, match="several artifacts"):
        verify(path, here=True)
    with pytest.raises(RecipeError, match="name some"):
        reference_rows(dense, None, [])
