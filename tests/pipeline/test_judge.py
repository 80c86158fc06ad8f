"""Figures and rungs: what passes is the same model, and nothing passes because it merely loads."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import numpy as np
import onnx
import pytest
from builders import TINY, dense_model, random_plan
from torch import nn

from toolchain.artifacts import open_artifact
from toolchain.cost import Widths, trace
from toolchain.data import open_source
from toolchain.data.transforms import Wanted
from toolchain.errors import ArtifactError, ModelError
from toolchain.export.accuracy import accuracy_of
from toolchain.export.calls import STEP
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.precision import PRECISIONS
from toolchain.export.preparation import Preparation
from toolchain.model import run_stage
from toolchain.on_device.runner import OrtRunner
from toolchain.pipeline.judge import Judge, require_cost
from toolchain.surgery.mask import mask_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split
from toolchain.targets import EngineBuild

SIZE = (3, 32, 32)


@pytest.fixture(scope="module")
def judge():
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bilinear"}
    return Judge(open_source("none", Wanted(SIZE, config)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same model twice, and another one."""
    folder = tmp_path_factory.mktemp("onnx")
    for name, seed in (("a", 0), ("b", 0), ("other", 1)):
        module = dense_model(seed=seed, **{"name": "vit_tiny_patch16_224", **TINY}).module
        export_onnx(module, folder / f"{name}.onnx", input_size=SIZE, opset=20, metadata={}, simplify=False)
    return folder


def engine(path, loaded="pass"):
    """An "engine" that ONNX Runtime runs, so that this needs no GPU."""
    reason = "" if loaded == "pass" else "no GPU"
    return EngineBuild(path, {"target": "ort-cpu", "loaded": loaded, "loaded_reason": reason})


@pytest.mark.parametrize("profile", [(1, 1, 8), (1, 1, 1), (2, 2, 2), (5, 5, 8)])
def test_an_engine_is_compared_within_its_profile(judge, files, profile):
    rung = judge.engine(open_artifact(files / "a.onnx"), engine(files / "b.onnx"), profile)
    assert (rung.from_, rung.to, rung.verdict) == ("a.onnx", "b.onnx", "pass")
    assert rung.cosine_min > 0.9999
    assert rung.tolerance.max_abs == 1e-5, "what computes fp32 in fp32 is held to it"


class Twice(nn.Module):
    """Two outputs, of which the second may overflow alone."""

    def __init__(self, module, factor):
        super().__init__()
        self.module, self.factor = module, factor

    def forward(self, images):
        return self.module(images), self.factor * self.module(images)


@pytest.mark.parametrize("several", [False, True])
def test_a_model_that_overflows_is_named_before_anything_is_held_against_it(judge, several):
    model = dense_model()
    for factor, finite in ((1.0, True), (3e38, False)):
        module = copy.deepcopy(model.module)
        module.head.weight.data.mul_(1.0 if several else factor).mul_(100)
        changed = replace(model, module=Twice(module, factor) if several else module)
        error = pytest.raises(ModelError, match="the dense model gives NaN or infinity for 3 of 3 images: check that")
        with contextlib.nullcontext() if finite else error:
            judge.require_finite(changed)


def test_an_engine_that_loads_but_computes_something_else_fails(judge, files):
    rung = judge.engine(open_artifact(files / "a.onnx"), engine(files / "other.onnx"), (1, 1, 8))
    assert rung.verdict == "fail"
    assert "cosine" in rung.reason


def test_an_engine_that_cannot_be_run_is_not_judged(judge, files):
    rung = judge.engine(open_artifact(files / "a.onnx"), engine(files / "b.onnx", "not_run"), (1, 1, 8))
    assert (rung.verdict, rung.reason, rung.max_abs) == ("not_run", "no GPU", None)


def test_three_images_are_enough(judge):
    assert judge.images().shape == (3, *SIZE)


def test_the_deploy_model_must_cost_what_its_widths_predict(tiny):
    plan = random_plan(tiny, low_rank=False)
    deploy = run_stage(Split(), run_stage(Slice(), mask_model(tiny, tiny.module, plan)).artifact).artifact
    dense = trace(tiny.module, tiny.family, tiny.preprocess.input_size)
    predicted = dense.shrunk(Widths.of(plan), tiny.groups)
    require_cost(deploy, predicted)
    for wrong in (replace(predicted, other_params=1), replace(predicted, other_macs=1), dense):
        with pytest.raises(ArtifactError, match="its plan's widths give"):
            require_cost(deploy, wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "largest"), [("int8-dynamic", 1), ("int4", 1), ("int8-qdq", STEP)])
def test_a_file_whose_scales_depend_on_the_call_is_judged_one_picture_at_a_time(
    tmp_path, monkeypatch, precision, largest
):
    """What it gives for a picture would depend on the others, and no app calls it with those."""
    model = dense_model(**{**TINY, "img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10})
    whole, path = tmp_path / "fp32.onnx", tmp_path / "m.onnx"
    export_onnx(model.module, whole, input_size=(1, 8, 8), opset=20, metadata={}, simplify=False)
    digits = open_source("digits", Wanted((1, 8, 8), {}))
    shown = np.stack([digits.split("calibration")[index][0] for index in range(16)])
    onnx.save(PRECISIONS[precision].convert(onnx.load(whole), shown).model, path)
    sizes, infer = [], OrtRunner.infer

    def noted(runner, feeds):
        sizes.append(len(feeds["image"]))
        return infer(runner, feeds)

    monkeypatch.setattr(OrtRunner, "infer", noted)
    judged = Judge(digits).graph(path)
    assert max(sizes) == largest
    how = Preparation(mean=digits.preprocessing.mean, std=digits.preprocessing.std)
    sizes.clear()
    assert accuracy_of(path, "digits", "test", asked=how).accuracy.wrong == judged.wrong
    assert max(sizes) == largest
