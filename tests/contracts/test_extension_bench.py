"""A run times what it does not know: registered targets, formats and precisions find each other by what they are made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import toy_format
import toy_plugin
from measuring import Stopwatch
from test_extension_target import toy_target

from toolchain.artifacts import ARTIFACTS, open_artifact
from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.errors import TargetUnavailable
from toolchain.export.precision import PRECISIONS, expanded
from toolchain.measure.compare import plan_comparison
from toolchain.measure.samples import Design
from toolchain.pipeline.run import run
from toolchain.recipe import Recipe
from toolchain.targets import TARGETS

MODEL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 2}
RECIPE = {
    "model": {"name": "vit_tiny_patch16_224", "kwargs": MODEL, "pretrained": False},
    "data": {"source": "none"},
    "compress": {"method": "hybrid", "attention": "none", "neurons": "magnitude", "allocation": "uniform"},
    "budget": {"params": 0.6},
}


class Planned(Stopwatch):
    """Plans each comparison as it would be run, and makes its numbers up."""

    def __call__(self, a, b, device, workload, **rest):
        plan_comparison(a, b, device.runtime, workload, Design())
        return super().__call__(a, b, device, workload, **rest)


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Target → precision → file that a run timed there."""
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))

    def carried_out(**sections):
        report = run(Recipe.from_dict({**RECIPE, **sections}), tmp_path / "run", compare=Planned())
        targets = {row.target: {} for row in report.bench}
        for row in report.bench:
            targets[row.target][row.precision] = tmp_path / "run" / row.path
        return targets

    return carried_out


@pytest.mark.slow
def test_a_precision_is_timed_on_every_target_that_multiplies_its_type_and_no_other(timed, register):
    """Both are registered; neither names the other. The precision's name says nothing of its graph's type."""
    register(TARGETS, toy_target())
    register(PRECISIONS, replace(toy_plugin.HALF, name="ours"))
    targets = timed(
        export={"precisions": ["fp32", "ours"]}, bench={"targets": ["toy", "eager", "ort-cpu"], "batch": [1]}
    )
    assert {name: set(files) for name, files in targets.items()} == {
        "toy": {"fp32", "ours"},
        "ort-cpu": {"fp32", "ours"},
        "eager": {"fp32"},
    }
    file = OnnxFile(targets["toy"]["ours"])
    assert (file.own_precision, str(file.precision)) == ("ours", "ours")


@pytest.mark.slow
def test_a_precision_that_multiplies_floats_is_not_timed_as_an_fp32_folder(timed, register):
    """Kind: numbers of one model under another's name. A model folder is fp32, whatever a precision's graph multiplies."""
    register(PRECISIONS, replace(toy_plugin.HALF, name="ours", product="FLOAT"))
    targets = timed(export={"precisions": ["fp32", "ours"]}, bench={"targets": ["eager", "ort-cpu"], "batch": [1]})
    assert {name: set(files) for name, files in targets.items()} == {"eager": {"fp32"}, "ort-cpu": {"fp32", "ours"}}


def test_a_format_is_timed_as_what_its_target_built_of_both_models(timed, register):
    register(ARTIFACTS, toy_format.ToyFormat)
    register(TARGETS, toy_format.TOY)
    bench = {"targets": ["toy"], "batch": [1]}
    with pytest.raises(
        TargetUnavailable,
        match=r"toy files alone, and this recipe builds none\. Add it to engine\.targets, or remove it from bench\.targets",
    ):
        timed(bench=bench)
    (files,) = timed(bench=bench, engine={"targets": ["toy"]}).values()
    assert {precision: open_artifact(path).name for precision, path in files.items()} == {"fp32": "toy"}


def test_a_recipe_that_asks_for_int8_means_a_registered_kind_of_it_too(register):
    register(PRECISIONS, replace(PRECISIONS["int8-qdq"], name="ours"))
    assert expanded(["int8"]) == {"int8-dynamic": False, "int8-qdq": False, "ours": False}
