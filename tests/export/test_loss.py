"""What int8 loses, and what is done about it, on a small ViT in which one channel is planted that is larger than all others."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest
import timm
import torch
from sweeps import swept

from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.errors import ArtifactError, ParityError
from toolchain.export import loss, quantise
from toolchain.export.conversion import Conversion
from toolchain.export.convert import Convert
from toolchain.export.loss import BOUND, FEWEST, STANDS_OUT, Yardstick, alone, least_lossy, standing_out
from toolchain.export.observe import largest_channels, peaks, session
from toolchain.export.onnx_graph import export_onnx, inner_linears
from toolchain.export.precision import PRECISIONS
from toolchain.export.quantise import dynamic, int8_dynamic, int8_qdq
from toolchain.export.smooth import norms, smoothed, smoothing
from toolchain.export.weights import each_linear
from toolchain.model import run_stage
from toolchain.parity import spread_error
from toolchain.pipeline.judge import Judge

SIZE, SEEN, OTHER = (3, 32, 32), 1, 2
INT8 = {"int8-dynamic": int8_dynamic, "int8-qdq": int8_qdq}
NEURON = "blocks.1.mlp.fc2"
"""The linear that reads a planted neuron."""


def blobs(seed, count=32):
    rng = np.random.default_rng(seed)
    return np.kron(rng.standard_normal((count, 3, 4, 4)), np.ones((1, 1, 8, 8))).astype(np.float32)


def plain(module):
    """A model in which nothing stands out."""


def large_neuron(module):
    """One neuron is always about 400, and what reads it is small: the model is hardly another, and its int8 range is."""
    module.blocks[1].mlp.fc1.bias[7] += 400
    module.blocks[1].mlp.fc2.weight[:, 7] /= 400


def large_channel(module):
    """A few channels of a norm are 100 times as large, and what reads them is small: the same model."""
    for block in module.blocks:
        for norm, reader in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight[:3] *= 100
            norm.bias[:3] *= 100
            reader.weight[:, :3] /= 100


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """What is planted → the fp32 file, which gives features."""

    @cache
    def written(plant):
        torch.manual_seed(0)
        small = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="avg", **small)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and "norm" not in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                if parameter.ndim == 2 and "blocks" in name:
                    parameter.mul_(2)
            plant(model)
        path = tmp_path_factory.mktemp("loss") / "features.fp32.onnx"
        how = {"slimvit.output": "features"}
        export_onnx(model, path, input_size=SIZE, opset=20, metadata=how, simplify=True, outputs=("features",))
        return OnnxFile(path)

    return written


@pytest.fixture(scope="module")
def graph(file):
    return cache(lambda plant: onnx.load(file(plant).path))


@pytest.fixture(scope="module")
def judge(graph):
    """What is planted → the loss on images that were never seen."""
    return cache(lambda plant: Yardstick.of(graph(plant), blobs(OTHER)))


@pytest.mark.slow
@pytest.mark.parametrize("plant", swept([plain, large_channel, large_neuron], [large_channel]))
def test_smoothing_changes_no_function_and_its_scales_are_positive(graph, judge, plant):
    model = graph(plant)
    scales = smoothing(model, largest_channels(model, [norm.output for norm in norms(model)], blobs(SEEN)))
    assert len(scales) == 4
    assert all(np.all(np.isfinite(each)) and np.all(each > 0) for each in scales.values())
    assert judge(plant).lost(smoothed(model, scales)) < 1e-9, "fp32 rounding alone"


@pytest.mark.slow
@pytest.mark.parametrize("name", INT8)
def test_a_file_that_loses_little_is_left_as_it_is(graph, judge, name):
    made = INT8[name](graph(plain), blobs(SEEN))
    assert judge(plain).lost(made.model) < BOUND
    assert (made.left, made.notes, made.plain) == (frozenset(), (), None)
    if name == "int8-dynamic":
        without = INT8[name](graph(plain), blobs(SEEN)[:0])
        assert made.model.SerializeToString() == without.model.SerializeToString(), "images decide nothing"


def test_smoothing_wins_back_what_a_large_channel_costs_in_each_call(graph, judge):
    model, lost = graph(large_channel), judge(large_channel).lost
    made = int8_dynamic(model, blobs(SEEN))
    assert made.smoothed
    assert lost(dynamic(model)) > 10 * lost(made.model)
    assert lost(made.model) < BOUND
    assert made.notes[0].startswith("Normalizations are smoothed: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", INT8)
def test_the_linear_that_reads_a_large_neuron_stays_in_fp32(graph, judge, name, monkeypatch):
    model, lost = graph(large_neuron), judge(large_neuron).lost
    made = INT8[name](model, blobs(SEEN))
    assert len(made.left) == 1
    with monkeypatch.context() as patched:
        patched.setattr(quantise, "least_lossy", lambda model, makes, images: makes[0](frozenset()))
        whole = INT8[name](model, blobs(SEEN)).model
    assert lost(whole) > 10 * lost(made.model)
    assert lost(made.model) < BOUND
    assert f"{NEURON} stays in fp32" in " ".join(made.notes)
    assert made.notes[-1].endswith("with all linears in int8.")


@pytest.mark.parametrize("name", INT8)
def test_the_report_says_so_and_the_file_passes_every_rung(file, tmp_path, name):
    stage = Convert(name, tmp_path / f"{name}.onnx", blobs(SEEN), blobs(OTHER), real_images=False)
    made = run_stage(stage, file(large_neuron))
    assert [rung.verdict for rung in made.rungs] == ["pass"] * len(made.rungs)
    assert any(note.startswith(f"{NEURON} stays in fp32: in int8 it alone loses ") for note in made.facts.graph.notes)
    reading = open_linears(made.artifact)
    assert reading == {"FLOAT": 1, "INT8": 7}


def open_linears(artifact):
    kinds = [onnx.TensorProto.DataType.Name(each.kind) for each in each_linear(artifact.model)]
    return {kind: kinds.count(kind) for kind in kinds}


def test_a_linear_in_fp32_that_nobody_decided_is_refused(file, tmp_path, register):
    """Kind: a quantiser that leaves out a linear without a word."""

    def forgetful(model, images):
        made = int8_dynamic(model, images)
        return replace(made, model=dynamic(model, inner_linears(model)[:1]))

    register(PRECISIONS, replace(PRECISIONS["int8-dynamic"], convert=forgetful))
    stage = Convert("int8-dynamic", tmp_path / "x.onnx", blobs(SEEN), blobs(OTHER), real_images=False)
    with pytest.raises(ArtifactError, match=r"linears of other types: \{'FLOAT': 1\}"):
        run_stage(stage, file(plain))


def test_one_linear_alone_computes_what_the_file_does_with_it(graph, judge):
    """What is measured linear by linear is what ONNX Runtime's quantisers make of that linear."""
    model = graph(large_neuron)
    inner = inner_linears(model)
    whole = int8_qdq(model, blobs(SEEN)[: FEWEST - 1])
    for name in inner[2:5]:
        others = [each for each in inner if each != name]
        read = next(node.input[0] for node in whole.reference.graph.node if node.name == name)
        ranges = {read: whole.ranges[read]}
        static = quantise._static(whole.reference, [name], ranges, blobs(SEEN)[:1])
        pairs = [
            (alone(model, name, {}), dynamic(model, others)),
            (alone(whole.reference, name, ranges), static),
        ]
        for ours, theirs in pairs:
            expected = judge(large_neuron).lost(theirs)
            assert expected > 0
            assert judge(large_neuron).lost(ours) == pytest.approx(expected, rel=0.02)


def test_the_share_that_stands_out_is_bounded(graph, judge):
    """However little a file may lose, no more than one linear in STANDS_OUT is tried, the one with the largest numbers first."""
    model = graph(large_neuron)
    inner = inner_linears(model)
    made = int8_qdq(model, blobs(SEEN)[: FEWEST - 1])
    found = standing_out(made, inner, judge(large_neuron), 0.0)
    assert [*found] == [inner[-1]]
    assert len(inner) // STANDS_OUT == 1
    assert found[inner[-1]] == judge(large_neuron).lost(alone(made.reference, inner[-1], made.ranges))
    assert standing_out(made, inner, judge(large_neuron), 1e3) == {}


def test_peaks_are_those_of_the_values(graph):
    model = graph(large_neuron)
    names = sorted({node.input[0] for node in model.graph.node if node.name in inner_linears(model)})
    with session(model, lambda each: each.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)) as run:
        values = run(names, {"image": blobs(SEEN)})
    expected = {name: (x.astype(float) ** 2).max() / (x.astype(float) ** 2).mean() for name, x in values.items()}
    assert peaks(model, names, blobs(SEEN)) == pytest.approx(expected, rel=1e-4)


def test_what_is_not_measured_is_said(graph, monkeypatch):
    asked, model = [], graph(large_neuron)

    def make(left):
        asked.append(left)
        return Conversion(model, model)

    made = least_lossy(model, [make, None], blobs(SEEN)[: FEWEST - 1])
    assert made.model is model
    assert made.notes == (
        "What int8 loses was not measured: that takes at least 8 calibration images, and there are 7.",
    )
    with monkeypatch.context() as patched:
        patched.setattr(loss, "is_large", lambda _: True)
        made = least_lossy(model, [make, None], blobs(SEEN))
    assert made.notes == ("What int8 loses was not measured: the weights need a second file.",)
    assert asked == [frozenset()] * 2


def test_each_image_is_measured_in_a_call_of_its_own(graph, judge):
    """In a batch one image's range would be that of all: here the loss of each is that of a call with it alone."""
    made, images = dynamic(graph(large_channel)), judge(large_channel).images
    with session(graph(large_channel)) as run:
        expected = np.concatenate([run(["features"], {"image": image[None]})["features"] for image in images])
    with session(made) as run:
        alone = np.concatenate([run(["features"], {"image": image[None]})["features"] for image in images])
        together = run(["features"], {"image": images})["features"]
    lost = judge(large_channel).lost(made)
    assert lost == pytest.approx(spread_error(expected, alone), rel=1e-6)
    assert abs(lost - spread_error(expected, together)) > 0.01 * lost, "a batch has other ranges"


@pytest.mark.slow
def test_smoothing_that_fails_its_rung_leaves_the_plain_file(file, tmp_path, monkeypatch):
    """Fault: a smoothed graph that is nearly the model, loses less in int8, and is not within the tolerance of fp32."""

    def sloppy(model, scales):
        even = smoothed(model, scales)
        tensor = next(each for each in even.graph.initializer if each.name == norms(even)[0].parameters[0])
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name)
        )
        return even

    plain_model = dynamic(onnx.load(file(large_channel).path))
    monkeypatch.setattr(quantise, "smoothed", sloppy)
    stage = Convert("int8-dynamic", tmp_path / "x.onnx", blobs(SEEN), blobs(OTHER), real_images=False)
    made = run_stage(stage, file(large_channel))
    assert [rung.verdict for rung in made.rungs] == ["pass"] * len(made.rungs)
    assert "smoothed" not in [rung.to for rung in made.rungs]
    note = made.facts.graph.notes[0]
    assert note.startswith(
        "Normalizations are not smoothed: in fp32 that would be another model than features.fp32.onnx (max |Δ| "
    )
    assert not any(each.startswith("Normalizations are smoothed") for each in made.facts.graph.notes)
    kept = {each.name: each for each in made.artifact.model.graph.initializer}
    for tensor in plain_model.graph.initializer:
        np.testing.assert_array_equal(*(onnx.numpy_helper.to_array(each) for each in (kept[tensor.name], tensor)))
    with pytest.raises(ParityError, match="to smoothed is the first that broke"):
        run_stage(replace(stage, precision="int8-qdq"), file(large_channel))


class Pictures:
    """A data source of blobs: those that judge are other ones than those of the calibration."""

    def __init__(self, synthetic):
        self.synthetic, self.labelled = synthetic, False

    def to_compare(self, count):
        return list(torch.from_numpy(blobs(OTHER))[:count])

    def split(self, name):
        return [(image, 0) for image in torch.from_numpy({"calibration": blobs(SEEN)}[name])]


@pytest.mark.parametrize(
    ("name", "synthetic", "count"), [("int8-dynamic", False, 32), ("int8-dynamic", True, 0), ("int8-qdq", True, 32)]
)
def test_the_images_that_judge_decide_nothing(tmp_path, name, synthetic, count):
    stage = Judge(Pictures(synthetic), "features").convert(name, tmp_path / "x.onnx")
    np.testing.assert_array_equal(stage.calibration, blobs(SEEN)[:count])
    np.testing.assert_array_equal(stage.images, blobs(OTHER)[: len(stage.images)])
