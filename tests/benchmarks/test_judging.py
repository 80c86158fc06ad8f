"""What is recorded of features, image by image, and the probe on them."""

from __future__ import annotations

import base64

import judging
import numpy as np
import probe
import pytest
import timm
import torch
from kinds.compression import unpack
from PIL import Image
from safetensors.torch import load_file, save_file

from toolchain.model import Preprocess
from toolchain.training.features import relative_error


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_errors_by_image_add_up_to_the_toolchains():
    dense = drawn(9, 4, 6)
    ours = dense + 0.3 * drawn(9, 4, 6, seed=1)
    figures = judging.by_image(ours, dense)
    assert judging.relative(figures) == pytest.approx(relative_error(ours, dense), rel=1e-5)
    half = judging.relative(figures, range(4))
    assert half == pytest.approx(sum(figures["wrong"][:4]) / sum(figures["spread"][:4]))
    assert half != judging.relative(figures)


def test_the_dense_model_has_no_error_and_a_constant_has_one():
    dense = drawn(9, 5)
    assert judging.relative(judging.by_image(dense, dense)) == 0
    constant = dense.mean(0).expand(9, 5)
    assert judging.relative(judging.by_image(constant, dense)) == pytest.approx(1, rel=1e-5)


def test_no_picture_votes_for_itself():
    """Of two classes with one picture each among many of a third, neither is ever right."""
    vectors = torch.eye(8)[:7] + 0.01 * drawn(7, 8)
    labels = torch.tensor([0, 1, 2, 2, 2, 2, 2])
    right = judging.right_of(vectors, labels, k=3)
    assert right.tolist() == [False, False, *[True] * 5]


def test_neighbours_of_clusters_are_right_and_are_recorded_bit_by_bit():
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    tokens = torch.zeros(12, 3, 4)
    tokens[:, 0] = drawn(12, 4) * 0.1 + torch.tensor([[1.0, 0, 0, 0]]) * (1 - labels[:, None])
    tokens[:, 0, 1] += labels
    figures = judging.judged(tokens, tokens, labels)
    assert figures["neighbours"]["wrong"] == 0
    assert unpack(figures["neighbours"]).all()
    assert "neighbours" not in judging.judged(tokens, tokens, torch.full((12,), -1))


def test_pictures_are_labelled_by_their_folders_and_ready_for_the_model(tmp_path):
    for name, grey in (("b/one", 0), ("a/two", 255), ("b/three", 128)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (grey, grey, grey)).save(tmp_path / f"{name}.png")
    pictures = judging.Pictures.of(tmp_path, Preprocess((3, 28, 28), (0.5,) * 3, (0.5,) * 3))
    assert pictures.names == ("a/two", "b/one", "b/three")
    assert pictures.images.labels.tolist() == [0, 1, 1]
    assert pictures.images[0][0].shape == (3, 28, 28)
    assert [round(float(pictures.images[at][0].mean()), 2) for at in range(3)] == [1.0, -1.0, 0.0]


def test_a_map_is_recorded_in_bytes():
    drawn_map = torch.zeros(128, 128)
    drawn_map[:64] = 1
    small = np.frombuffer(base64.b64decode(judging.small_map(drawn_map)), np.uint8).reshape(judging.SIDE, judging.SIDE)
    assert (small[: judging.SIDE // 2] == 255).all()
    assert (small[judging.SIDE // 2 :] == 0).all()


def test_a_probe_tells_what_can_be_told_and_is_the_same_twice():
    labels = torch.arange(90) % 3
    features = drawn(90, 5) + 4 * torch.eye(5)[labels]
    weight, bias = probe.fitted(features, labels, 3)
    assert ((features @ weight.T + bias).argmax(1) == labels).float().mean() > 0.95
    again = probe.fitted(features, labels, 3)
    assert torch.equal(weight, again[0])
    assert torch.equal(bias, again[1])


def test_a_probe_is_blind_to_the_scale_of_features():
    """Features in other units, moved: the same logits."""
    labels = torch.arange(60) % 3
    features = drawn(60, 4) + torch.eye(4)[labels]
    moved = features * torch.tensor([1.0, 10, 0.1, 3]) + 5
    logits = [x @ weight.T + bias for x in (features, moved) for weight, bias in [probe.fitted(x, labels, 3)]]
    assert torch.allclose(*logits, atol=1e-3)


def test_the_probe_becomes_the_classifier_of_the_backbone(tmp_path):
    kwargs = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 1, "num_heads": 2}
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs).eval()
    save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
    head = drawn(3, 24), drawn(3, seed=1)
    probe.with_head(tmp_path / "backbone.safetensors", head, tmp_path / "probe.safetensors")
    whole = timm.create_model("vit_tiny_patch16_224", num_classes=3, **kwargs).eval()
    whole.load_state_dict(load_file(tmp_path / "probe.safetensors"))
    x = drawn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.allclose(whole(x), backbone(x) @ head[0].T + head[1], atol=1e-6)
