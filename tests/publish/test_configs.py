"""The files that transformers reads say what the run's own metadata say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import input_of
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

from toolchain.artifacts.onnx_file import FP32
from toolchain.data.transforms import Preprocessing
from toolchain.errors import DataError, RecipeError, StorageError
from toolchain.export.precision import PRECISIONS
from toolchain.model import ModelRecord, Preprocess
from toolchain.plan import ModelRef
from toolchain.publish.configs import architecture, config, preprocessor
from toolchain.publish.layout import places
from toolchain.publish.repository import read_labels
from toolchain.surgery.huggingface.processor import preparation
from toolchain.surgery.replay import create_dense

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WAYS = [
    {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"},
    {"crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bilinear"},
    {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"},
    {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"},
    {"crop_pct": 0.95, "crop_mode": None, "interpolation": "bilinear"},
]


@pytest.fixture
def picture():
    """Smooth and wide, so that two libraries' filters differ by rounding alone."""
    rows, columns = np.mgrid[0:300, 0:420] / 50
    waves = [np.sin(rows + phase) * np.cos(columns - phase) for phase in (0.0, 1.0, 2.0)]
    return Image.fromarray(np.round(127.5 + 120 * np.stack(waves, -1)).astype(np.uint8))


@pytest.mark.parametrize("way", WAYS)
def test_transformers_prepares_pictures_as_the_run_did(tmp_path, picture, way):
    how = {"input_size": (3, 224, 224), "mean": MEAN, "std": STD, **way}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor(Preprocess(**how))))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(picture, return_tensors="np")["pixel_values"][0]
    ours = input_of(Preprocessing(**how), picture).numpy()
    assert theirs.shape == ours.shape == (3, 224, 224)
    assert np.abs(theirs - ours).mean() < 0.03  # a crop that begins between two pixels is rounded either way


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_is_read_back(tmp_path, way):
    how = Preprocess((3, 224, 224), MEAN, STD, **way)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor(how)))
    read = preparation(tmp_path, "ViT")
    assert read.crop == (224, 224)
    assert read.fields["mean"] == pytest.approx(MEAN)
    assert read.fields["std"] == pytest.approx(STD)
    assert read.fields["interpolation"] == how.interpolation
    assert read.fields["crop_mode"] == (how.crop_mode or "center")
    assert math.floor(224 / read.fields["crop_pct"]) == math.floor(224 / (how.crop_pct or 1))


KWARGS = {
    "img_size": [32, 48],
    "patch_size": 8,
    "in_chans": 1,
    "num_classes": 3,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "init_values": 1e-5,
    "qkv_bias": True,
    "class_token": True,
    "reg_tokens": 0,
    "norm_layer": None,
    "act_layer": "gelu_tanh",
}


def record_of(**kwargs):
    return ModelRecord(
        stage="deploy",
        model=ModelRef(name="vit_tiny_patch16_224", kwargs=kwargs),
        preprocess=Preprocess((1, 32, 48), (0.5,), (0.5,)),
        provenance={},
        weights_sha256="",
        structure=[],
        plan=None,
    )


def test_of_the_arguments_those_are_written_that_say_what_the_model_computes():
    others = {
        "drop_path_rate": 0.1,
        "drop_rate": 0.2,
        "weight_init": "jax",
        "table": "/home/me/table.pt",
        "tables": {"first": ["C:\\mine\\a.pt"]},
        "home": "~me",
        "scale": float("nan"),
        "scales": [1.0, float("inf")],
    }
    assert architecture({**KWARGS, **others}) == KWARGS


def test_what_is_written_makes_the_same_model_again():
    record = record_of(**KWARGS, drop_path_rate=0.1)
    written = json.loads(json.dumps(config(record, "logits", ["a", "b", "c"], {}), allow_nan=False))
    again = create_dense(ModelRef(name=written["slimvit"]["timm"], kwargs=written["slimvit"]["kwargs"]))
    ours = create_dense(record.model)
    shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (ours, again)]
    assert shapes[0] == shapes[1]
    again.load_state_dict(ours.state_dict())
    images = torch.randn(2, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(images), again(images))


def test_transformers_reads_the_configuration(tmp_path):
    record = record_of(**KWARGS)
    (tmp_path / "config.json").write_text(json.dumps(config(record, "logits", ["a", "b", "c"], {"dtype": "fp32"})))
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read).__name__ == "ViTConfig"
    assert (read.hidden_size, read.num_hidden_layers, read.num_attention_heads) == (32, 2, 2)
    assert (read.patch_size, read.num_channels) == (8, 1)
    assert read.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize(("mode", "size"), [("border", (3, 224, 224)), ("center", (3, 224, 160))])
def test_what_no_processor_does_is_refused(mode, size):
    with pytest.raises(RecipeError, match=r"crop_mode '\w+' .*; run the recipe with"):
        preprocessor(Preprocess(size, MEAN, STD, crop_pct=0.9, crop_mode=mode))


def test_pictures_that_were_never_cropped_are_only_resized():
    said = preprocessor(Preprocess((1, 8, 12), (0.3,), (0.4,)))
    assert said["size"] == {"height": 8, "width": 12}
    assert said["do_center_crop"] is False
    assert said["do_convert_rgb"] is False


@pytest.mark.parametrize(
    ("precisions", "paths"),
    [
        (["fp32"], ["onnx/model.onnx"]),
        (["int8-qdq", "fp16"], ["onnx/model_quantized.onnx", "onnx/model_fp16.onnx"]),
        (["int8-qdq", "int8-dynamic"], ["onnx/model_int8.onnx", "onnx/model_quantized.onnx"]),
        (
            ["int4", "bf16", "of-a-plugin"],
            ["onnx/model_q4f16.onnx", "onnx/model_bf16.onnx", "onnx/model_of_a_plugin.onnx"],
        ),
    ],
)
def test_no_two_precisions_have_one_file(precisions, paths):
    assert [place.path for place in places(precisions).values()] == paths


def test_the_page_lists_every_file():
    page = (Path(__file__).resolve().parents[2] / "docs/hub.md").read_text(encoding="utf-8")
    assert [
        place.path for place in places([FP32, *PRECISIONS]).values() if place.path.rpartition("/")[2] not in page
    ] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.txt", "cat\n\n big dog \n"),
        ("labels.json", '["cat", "big dog"]'),
        ("config.json", '{"id2label": {"1": "big dog", "0": "cat"}}'),
    ],
)
def test_labels_are_read_as_people_have_them(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_labels(tmp_path / name) == ("cat", "big dog")


@pytest.mark.parametrize(
    "text", ['{"1": "cat", "2": "dog"}', '{"id2label": {"0": "cat", "2": "dog"}}', '{"0": "a", "01": "b"}']
)
def test_labels_that_are_not_numbered_from_0_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"numbers 2 classes, and none of them is [01]: number them from 0 to 1"):
        read_labels(tmp_path / "a.json")


def test_labels_that_are_none_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("3")
    with pytest.raises(DataError, match="holds no names of classes: write one a line"):
        read_labels(tmp_path / "a.json")
    with pytest.raises(
        StorageError, match=r"cannot read .*none\.txt: No such file or directory; name one that is there"
    ):
        read_labels(tmp_path / "none.txt")
    (tmp_path / "old.txt").write_bytes("grün\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"old\.txt is no text: save the names as UTF-8"):
        read_labels(tmp_path / "old.txt")
