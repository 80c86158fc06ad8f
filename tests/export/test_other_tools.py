"""Kind: files that slimvit did not write, or that others made of its files. They are compared and evaluated, or refused in plain words."""

from __future__ import annotations

import contextlib
import json
from itertools import product

import numpy as np
import onnx
import pytest
from builders import dense_model, write_classifier, write_stack
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from PIL import Image

from toolchain.artifacts import open_artifact
from toolchain.artifacts.onnx_file import UINT8, OnnxFile
from toolchain.errors import ArtifactError, DataError, ModelError, RecipeError
from toolchain.export.accuracy import accuracy_of
from toolchain.export.agreement import parity_of
from toolchain.export.calls import in_parts
from toolchain.export.engine import BuildEngine
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.preparation import Preparation
from toolchain.model import run_stage
from toolchain.outputs import CLASSES
from toolchain.parity import Tolerance
from toolchain.recipe import EngineSection
from toolchain.surgery.replay import save_model

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((48, 5)).astype(np.float32)
DIGITS = Preparation(mean=(0.0,), std=(1.0,))


HALVES = Preparation(mean=(0.5,), std=(0.5,))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A source of five classes, ten pictures to test."""
    root = tmp_path_factory.mktemp("classes")
    for split, index, number in product(("train", "test"), range(5), range(2)):
        (folder := root / split / f"class{index}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return f"imagefolder:{root}"


def write(
    path, *, name="input.1", shape=("batch", 3, 4, 4), kind=TensorProto.FLOAT, weight=WEIGHT, outputs=("logits",)
):
    """A linear classifier of 3×4×4 images under any names, shapes and types; more outputs are its negative."""
    batch = shape[0]
    nodes, tensors = [], {"w": weight}
    source = name
    if kind == TensorProto.UINT8:
        nodes += [
            helper.make_node("Cast", [source], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["f", "scale"], ["g"]),
            helper.make_node("Sub", ["g", "shift"], ["h"]),
        ]
        tensors |= {"scale": np.float32(1 / 255 / 0.25), "shift": np.float32(2)}
        source = "h"
    elif kind != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [source], ["f"], to=TensorProto.FLOAT))
        source = "f"
    if shape[-1] == 3:
        nodes.append(helper.make_node("Transpose", [source], ["t"], perm=[0, 3, 1, 2]))
        source = "t"
    nodes += [
        helper.make_node("Flatten", [source], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], [outputs[0]]),
        *(helper.make_node("Neg", [outputs[0]], [other]) for other in outputs[1:]),
    ]
    values = [helper.make_tensor_value_info(each, TensorProto.FLOAT, [batch, weight.shape[1]]) for each in outputs]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape)],
        values,
        [numpy_helper.from_array(value, key) for key, value in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def several(path, weights, shift=0.0):
    """Name → linear outputs of one input, to which a number is added."""
    model = onnx.load(write(path))
    del model.graph.node[1:], model.graph.output[:], model.graph.initializer[:]
    model.graph.initializer.append(numpy_helper.from_array(np.float32(shift), "shift"))
    for name, weight in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(weight, f"{name}.w"))
        model.graph.node.append(helper.make_node("MatMul", ["flat", f"{name}.w"], [f"{name}.product"]))
        model.graph.node.append(helper.make_node("Add", [f"{name}.product", "shift"], [name]))
        shape = ["batch", weight.shape[1]]
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    onnx.save(model, path)
    return path


def foreign(source, path):
    """The same file without a word of where it is from."""
    model = onnx.load(source)
    del model.metadata_props[:]
    onnx.save(model, path)
    return path


OPEN = ("batch", 3, "height", "width")
FORMS = {
    "other input names": {"name": "pixel_values"},
    "a fixed batch": {"shape": (4, 3, 4, 4)},
    "fp16 inputs": {"kind": TensorProto.FLOAT16},
    "fp64 inputs": {"kind": TensorProto.DOUBLE},
    "other output names": {"outputs": ("output",)},
    "several outputs": {"outputs": ("embedding", "logits")},
    "open height and width": {"shape": OPEN},
}


@pytest.mark.parametrize("form", FORMS)
def test_two_files_are_compared_on_noise_whatever_they_are_called(form, tmp_path):
    a = write(tmp_path / "a.onnx", outputs=("embedding", "logits") if form == "several outputs" else ("logits",))
    assert parity_of(a, write(tmp_path / "b.onnx", **FORMS[form]), "none").rung.verdict == "pass"
    other = WEIGHT + 0.01 * RNG.standard_normal(WEIGHT.shape).astype(np.float32)
    rung = parity_of(a, write(tmp_path / "c.onnx", **FORMS[form], weight=other), "none").rung
    assert rung.verdict == "fail", "fp32 is held to fp32's bound"


def test_the_output_that_is_compared_is_the_one_of_the_same_name(tmp_path):
    a = write(tmp_path / "a.onnx", outputs=("second",), weight=-WEIGHT)
    b = write(tmp_path / "b.onnx", outputs=("first", "second"))
    agreement = parity_of(a, b, "none")
    assert agreement.rung.verdict == "pass"
    assert "Not compared: first of b.onnx." in agreement.notes


def test_an_output_that_only_the_first_file_has_is_missed(tmp_path):
    """Kind: a verdict over a part of what is judged, that reads as if it were the whole."""
    a = several(tmp_path / "a.onnx", {"logits": WEIGHT, "boxes": WEIGHT[:, :4]})
    for others in ({"boxes": WEIGHT[:, :4]}, {"scores": -WEIGHT, "boxes": WEIGHT[:, :4]}):
        rung = parity_of(a, several(tmp_path / "b.onnx", others), "none").rung
        assert (rung.verdict, rung.reason) == ("fail", "b.onnx lacks logits of a.onnx")


CHOICES = {
    "ArgMax": ("label", TensorProto.INT64, [helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=1)]),
    "TopK, indices": ("label", TensorProto.INT64, [helper.make_node("TopK", ["logits", "k"], ["best", "label"])]),
    "TopK, scores": (
        "label",
        TensorProto.FLOAT,
        [helper.make_node("Softmax", ["logits"], ["p"]), helper.make_node("TopK", ["p", "k"], ["label", "i"])],
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_outputs_that_say_which_classes_were_chosen_are_no_scores(case, tmp_path, data):
    """Kind: a verdict on numbers that mean something else. Two models may choose alike, and the first of sorted scores is the largest."""
    name, kind, nodes = CHOICES[case]

    def chosen(path, weight, *, alone):
        model = onnx.load(write(path, weight=weight))
        model.graph.node.extend(nodes)
        model.graph.initializer.append(numpy_helper.from_array(np.array([5]), "k"))
        scores = [] if alone else list(model.graph.output)
        del model.graph.output[:]
        model.graph.output.extend([helper.make_tensor_value_info(name, kind, ["batch", None]), *scores])
        onnx.save(model, path)
        return path

    other = WEIGHT + 0.01 * RNG.standard_normal(WEIGHT.shape).astype(np.float32)
    a, b = (chosen(tmp_path / f"{each}.onnx", WEIGHT, alone=True) for each in "ab")
    rung = parity_of(a, b, "none").rung
    assert rung.verdict == "not_run"
    assert "which files can share that are not the same model: compare files that give" in rung.reason
    with pytest.raises(RecipeError, match=r"in its output 'label': name a file that gives the scores of all classes"):
        accuracy_of(a, data, "test", asked=HALVES)
    a, b, c = (chosen(tmp_path / f"{k}.onnx", w, alone=False) for k, w in (("a", WEIGHT), ("b", WEIGHT), ("c", other)))
    same, differing = (parity_of(a, each, "none") for each in (b, c))
    assert (same.rung.verdict, differing.rung.verdict) == ("pass", "fail")
    assert "Not compared: label of a.onnx." in same.notes
    judged = accuracy_of(a, data, "test", asked=HALVES)
    assert judged.accuracy.total == 10
    assert "Of a.onnx, logits is judged, and not label." in judged.notes


def test_a_file_is_not_judged_by_labels_in_another_order_than_it_names_its_classes(tmp_path, data):
    """Kind: accuracy by the labels of other classes."""
    model = onnx.load(write(tmp_path / "a.onnx"))
    names = [f"class{index}" for index in (1, 0, 2, 3, 4)]
    helper.set_model_props(model, {CLASSES: json.dumps(names)})
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(ModelError, match=r"'class0' is class 0 .* and output 1 of the model"):
        accuracy_of(tmp_path / "a.onnx", data, "test", asked=HALVES)
    (tmp_path / "c.txt").write_text("\n".join(names))
    assert accuracy_of(tmp_path / "a.onnx", data, "test", asked=HALVES, classes=str(tmp_path / "c.txt"))


def test_what_is_the_same_for_every_image_is_not_what_differs_however_large_the_mean(tmp_path):
    a, b = (
        several(tmp_path / f"{name}.onnx", {"logits": weight}, shift=1e4)
        for name, weight in (("a", WEIGHT), ("b", np.zeros_like(WEIGHT)))
    )
    assert parity_of(a, a, "none", Tolerance(None, 0.99, None)).rung.verdict == "pass"
    rung = parity_of(a, b, "none", Tolerance(None, 0.99, None)).rung
    assert (rung.verdict, rung.reason) == ("fail", "the output of b.onnx is constant, and that of a.onnx is not")


def test_top1_of_several_outputs_is_that_of_the_classes_and_of_none_it_is_refused(tmp_path):
    for number in range(12):
        Image.fromarray(RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    data, asked, bounds = f"images:{tmp_path}", Preparation(mean=(0.5,), std=(0.25,)), Tolerance(None, 0.5, 0.9)
    a = several(tmp_path / "a.onnx", {"logits": WEIGHT, "boxes": WEIGHT[:, :4]})
    b = several(tmp_path / "b.onnx", {"logits": WEIGHT, "boxes": WEIGHT[:, :4] + 0.1 * WEIGHT[:, 1:5]})
    rung = parity_of(a, b, data, bounds, asked=asked).rung
    assert (rung.verdict, rung.tolerance, rung.top1_agreement) == ("pass", bounds, 1.0)
    single = several(tmp_path / "single.onnx", {"logits": WEIGHT[:, :1]})
    with pytest.raises(RecipeError, match="name no class, so that top1_min cannot be judged"):
        parity_of(single, single, data, bounds, asked=asked)


@pytest.mark.parametrize("broken", [0, 1])
def test_every_output_that_both_have_is_compared_and_the_worst_decides(broken, tmp_path):
    """Kind: a verdict over a part of what is judged, that reads as if it were the whole."""
    a = several(tmp_path / "a.onnx", {"logits": WEIGHT, "boxes": WEIGHT[:, :4]})
    assert parity_of(a, a, "none").rung.verdict == "pass"
    weights = [WEIGHT, WEIGHT[:, :4]]
    weights[broken] = np.zeros_like(weights[broken])
    b = several(tmp_path / "b.onnx", dict(zip(("logits", "boxes"), weights, strict=True)))
    rung = parity_of(a, b, "none").rung
    assert rung.verdict == "fail"
    assert f"output {('logits', 'boxes')[broken]!r}: " in rung.reason


def test_outputs_without_a_common_name_are_the_logits_of_who_has_them(tmp_path):
    a = several(tmp_path / "a.onnx", {"output": WEIGHT})
    for name in ("logits", "logits_2"):  # as some tools number their names
        b = several(tmp_path / "b.onnx", {"hidden": -WEIGHT, name: WEIGHT})
        agreement = parity_of(a, b, "none")
        assert agreement.rung.verdict == "pass"
        assert f"Compared are output of a.onnx and {name} of b.onnx." in agreement.notes
        assert "Not compared: hidden of b.onnx." in agreement.notes


def test_a_constant_output_beside_the_others_does_not_fail_and_one_that_differs_does(tmp_path):
    a, b, c = (
        several(tmp_path / f"{name}.onnx", {"logits": WEIGHT, "count": np.zeros((48, 1), np.float32)}, shift=shift)
        for name, shift in (("a", 3.0), ("b", 3.0), ("c", 4.0))
    )
    assert parity_of(a, b, "none").rung.verdict == "pass"
    assert parity_of(a, c, "none").rung.verdict == "fail"


OTHER_LAYOUTS = {
    "the batch second": (helper.make_node("Transpose", ["rows"], ["logits"], perm=[1, 0]), [5, "batch"]),
    "one number for all images": (helper.make_node("ReduceSum", ["rows"], ["logits"], keepdims=0), []),
}


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
@pytest.mark.parametrize("batch", ["batch", 4])
def test_outputs_without_one_row_per_image_are_not_judged_or_told(layout, batch, tmp_path):
    """Kind: an output of another form than the code beside it thinks of, and an internal error."""
    node, shape = OTHER_LAYOUTS[layout]
    path = write(tmp_path / "a.onnx", shape=(batch, 3, 4, 4), outputs=("rows",))
    model = onnx.load(path)
    model.graph.node.append(node)
    shape = [batch if dim == "batch" else dim for dim in shape]
    both = [*model.graph.output, helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)]
    del model.graph.output[:]
    model.graph.output.append(both[1])
    onnx.save(model, path)
    rung = parity_of(path, path, "none").rung
    assert rung.verdict == "not_run"
    assert "give them an output whose first dimension is the batch" in rung.reason
    model.graph.output.append(both[0])
    onnx.save(model, path)
    agreement = parity_of(path, path, "none")
    assert agreement.rung.verdict == "pass"
    assert "Not compared: logits of a.onnx." in agreement.notes


REFUSED = {
    "channels last against channels first": ({}, {"shape": ("batch", 4, 4, 3)}, "channels first, the other last"),
    "other sizes": (
        {},
        {"shape": ("batch", 3, 8, 2)},
        r"a\.onnx takes \[3, 4, 4\], channels first; height and width .* fixed at export",
    ),
    "open shapes": (
        {"shape": OPEN},
        {"shape": OPEN},
        r"leave the shape of an image open, \[3, \?, \?\]; .*--input-shape",
    ),
    "pixels against images": ({}, {"kind": TensorProto.UINT8}, "Compare them on pictures: --data, --mean and --std"),
    "integers": ({}, {"kind": TensorProto.INT32}, "is int32; images are given as float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused_in_plain_words(case, tmp_path):
    ours, theirs, said = REFUSED[case]
    with pytest.raises(RecipeError, match=said):
        parity_of(write(tmp_path / "a.onnx", **ours), write(tmp_path / "b.onnx", **theirs), "none")


def test_a_shape_that_both_leave_open_can_be_named_and_a_fixed_one_cannot(tmp_path):
    a, b = (write(tmp_path / f"{name}.onnx", shape=OPEN) for name in "ab")
    assert parity_of(a, b, "none", input_shape=(3, 4, 4)).rung.verdict == "pass"
    fixed = write(tmp_path / "c.onnx")
    with pytest.raises(
        RecipeError, match=r"asked for \[3, 8, 8\]; height and width of an ONNX file are fixed at export"
    ):
        parity_of(fixed, fixed, "none", input_shape=(3, 8, 8))


def test_outputs_of_other_shapes_fail_even_where_they_are_as_many_numbers(tmp_path):
    a, b = write(tmp_path / "a.onnx"), onnx.load(write(tmp_path / "b.onnx", outputs=("rows",)))
    b.graph.node.append(helper.make_node("Unsqueeze", ["rows", "axis"], ["logits"]))
    b.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    b.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, 5]))
    onnx.save(b, tmp_path / "b.onnx")
    rung = parity_of(a, tmp_path / "b.onnx", "none").rung
    assert rung.verdict == "fail"
    assert "outputs have other shapes per image: a.onnx [5] and b.onnx [1, 5]" in rung.reason


@pytest.mark.slow
def test_a_model_folder_is_compared_with_a_file_of_another_tool(tmp_path):
    model = dense_model()
    folder = save_model(model, tmp_path / "m")
    export_onnx(model.module, tmp_path / "a.onnx", input_size=(3, 32, 32), opset=18, metadata={}, simplify=False)
    agreement = parity_of(tmp_path / "m", tmp_path / "a.onnx", "none")
    assert folder
    assert agreement.rung.verdict == "pass"
    assert agreement.notes == ("a.onnx is fp32 (10 of 10 linears and convolutions hold fp32 weights).",)


def test_an_unknown_precision_is_told_and_not_judged(tmp_path):
    def sigmoid(path):
        graph = helper.make_graph(
            [helper.make_node("Sigmoid", ["x"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 6])],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return path

    a, b = sigmoid(tmp_path / "a.onnx"), sigmoid(tmp_path / "b.onnx")
    rung = parity_of(a, b, "none").rung
    assert (rung.verdict, rung.max_abs) == ("not_run", 0.0)
    assert "a.onnx is of no known precision" in rung.reason
    assert "--cosine-min" in rung.reason
    assert parity_of(a, b, "none", Tolerance(None, 0.9, None)).rung.verdict == "pass"


# Images: what a file does not say of its preprocessing has to be named.


def test_accuracy_of_a_file_that_does_not_say_needs_mean_and_std(tmp_path):
    own = write_classifier(tmp_path / "own.onnx")
    theirs = foreign(own, tmp_path / "theirs.onnx")
    with pytest.raises(ArtifactError, match=r"--mean and --std, and --crop-pct .* \[data\]"):
        accuracy_of(theirs, "digits", "test")
    asked = Preparation(mean=(0.0,), std=(1.0,))
    evaluation = accuracy_of(theirs, "digits", "test", asked=asked)
    assert evaluation.accuracy.wrong == accuracy_of(own, "digits", "test").accuracy.wrong < 100


@pytest.mark.parametrize("keep", [True, False])
def test_fp16_files_of_another_tool_are_evaluated_and_compared_as_fp16(keep, tmp_path):
    own = write_classifier(tmp_path / "own.onnx")
    onnx.save(convert_float_to_float16(onnx.load(own), keep_io_types=keep), tmp_path / "half.onnx")
    half = tmp_path / "half.onnx"
    assert (
        abs(accuracy_of(half, "digits", "test").accuracy.wrong - accuracy_of(own, "digits", "test").accuracy.wrong) < 3
    )
    agreement = parity_of(own, half, "digits")
    assert agreement.rung.verdict == "pass"
    assert agreement.rung.tolerance.cosine_min == 0.9999
    rounded = () if keep else ("Both are given images rounded to fp16, which is what half.onnx takes.",)
    assert agreement.notes == (*rounded, "half.onnx is fp16 (1 of 1 linears and convolutions hold fp16 weights).")
    assert accuracy_of(own, "digits", "test").notes == (), "of its own files nothing is assumed"


def test_what_is_asked_for_replaces_what_a_file_says_and_is_told(tmp_path):
    own = write_classifier(tmp_path / "own.onnx")
    same = accuracy_of(own, "digits", "test", asked=Preparation(mean=(0.0,), std=(1.0,)))
    assert same.notes == ()
    evaluation = accuracy_of(own, "digits", "test", asked=Preparation(mean=(0.7,), std=(0.2,)))
    assert evaluation.notes == (
        "mean is [0.7], as asked for; own.onnx says [0.0].",
        "std is [0.2], as asked for; own.onnx says [1.0].",
    )
    assert evaluation.accuracy.wrong != same.accuracy.wrong


@pytest.mark.parametrize(
    "asked",
    [
        {"mean": (123.675,), "std": (0.2,)},
        {"mean": (0.5,), "std": (58.4,)},
        {"mean": (float("nan"),), "std": (0.2,)},
        {"mean": (0.5,), "std": (float("inf"),)},
    ],
)
def test_statistics_of_pixels_up_to_255_are_refused(asked, tmp_path):
    """Kind: a number in another unit than it is taken for, and an answer that is wrong and looks right."""
    own = write_classifier(tmp_path / "own.onnx")
    with pytest.raises(DataError, match=r"for pixels in 0…1 .* Divide by 255"):
        accuracy_of(own, "digits", "test", asked=Preparation(**asked))
    with pytest.raises(DataError, match="Divide by 255"):
        parity_of(own, own, "digits", asked=Preparation(**asked))


def test_options_that_would_do_nothing_are_refused(tmp_path):
    own = write_classifier(tmp_path / "own.onnx")
    with pytest.raises(RecipeError, match="seeded noise is fed as it is"):
        parity_of(own, own, "none", asked=DIGITS)
    with pytest.raises(RecipeError, match="resized by bilinear, always"):
        accuracy_of(own, "digits", "test", asked=Preparation(interpolation="lanczos"))
    pixels = write(tmp_path / "pixels.onnx", kind=TensorProto.UINT8)
    with pytest.raises(RecipeError, match="normalises them by itself"):
        accuracy_of(pixels, "digits", "test", asked=DIGITS)


def test_pixels_are_fed_where_a_file_takes_them(tmp_path):
    """The second file normalises by mean 0.5 and std 0.25 itself: so do the images of the first."""
    images = write(tmp_path / "images.onnx")
    for shape in (("batch", 3, 4, 4), ("batch", 4, 4, 3)):
        pixels = write(tmp_path / "pixels.onnx", kind=TensorProto.UINT8, shape=shape)
        assert open_artifact(pixels).image.channels_last == (shape[-1] == 3)
        asked = Preparation(mean=(0.5,), std=(0.25,))
        agreement = parity_of(images, pixels, "digits", asked=asked)
        assert agreement.rung.verdict == "pass", agreement
        assert "pixels.onnx takes uint8 and is fed pixels, 0…255." in agreement.notes
        assert parity_of(pixels, pixels, "none").rung.verdict == "pass"
        asked = Preparation(mean=(0.4,), std=(0.25,))
        assert parity_of(images, pixels, "digits", asked=asked).rung.verdict == "fail"


def test_a_file_without_images_is_no_classifier_of_images(tmp_path):
    with pytest.raises(RecipeError, match=r"takes \[96\] per sample, which is no image"):
        accuracy_of(write_stack(tmp_path / "a.onnx"), "digits", "test", asked=DIGITS)


def test_what_a_runtime_raises_is_no_internal_error(tmp_path):
    model = onnx.load(write_classifier(tmp_path / "a.onnx"))
    shape = next(each for each in model.graph.initializer if each.name == "shape")
    shape.CopyFrom(numpy_helper.from_array(np.array([2, 64]), "shape"))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(ArtifactError, match=r"a\.onnx cannot run on images \[1, 1, 8, 8\]"):
        accuracy_of(tmp_path / "a.onnx", "digits", "test")


def test_a_fixed_batch_is_filled_and_what_fills_it_is_dropped():
    seen = []

    def call(images):
        seen.append(len(images))
        return {"sum": images.sum(axis=1, keepdims=True)}

    images = RNG.standard_normal((7, 5)).astype(np.float32)
    for fill, sizes in ((True, [3, 3, 3]), (False, [3, 3, 1])):
        given = in_parts(call, 3, fill=fill)(images)
        np.testing.assert_array_equal(given["sum"], images.sum(axis=1, keepdims=True))
        assert [seen.pop(0) for _ in range(3)] == sizes


@pytest.mark.parametrize("form", ["other input names", "fp16 inputs", "open height and width"])
def test_an_engine_of_another_tools_file_is_compared_on_noise(form, tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")
    from toolchain.cli.stages import _engine_rung

    path = write(tmp_path / "a.onnx", **FORMS[form])
    sample = (3, 4, 4) if form == "open height and width" else None
    stage = BuildEngine(
        EngineSection(),
        "openvino-cpu",
        tmp_path / "engine",
        lambda built: _engine_rung(OnnxFile(path), built, (1, 1, 8), sample),
        input_shape=sample,
    )
    assert run_stage(stage, OnnxFile(path)).artifact.facts["parity"]["verdict"] == "pass"
    if sample:
        with pytest.raises(RecipeError, match="what is fixed stays as it is"):
            run_stage(
                BuildEngine(EngineSection(), "openvino-cpu", tmp_path / "other", input_shape=(4, 4, 4)),
                OnnxFile(path),
            )


# Layouts: where the channels are follows from the file, and an input shape that is named is in the file's own layout.

LAST = ("batch", "height", "width", 3)


def marked(path, **metadata):
    """The file with entries in its metadata."""
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {f"slimvit.{key}": value for key, value in metadata.items()})
    onnx.save(model, path)
    return path


def said(channels, height, width):
    size = {"input_size": [channels, height, width], "mean": [0.5] * channels, "std": [0.25] * channels}
    return json.dumps(size)


@pytest.mark.parametrize("form", [{}, {"input": UINT8}])
def test_pixels_of_a_file_with_metadata_of_another_are_fed_in_the_layout_of_the_file(form, tmp_path):
    """Kind: metadata that is left over and is believed against the graph. The channels are first here, and stay so."""
    own = write(tmp_path / "images.onnx")
    pixels = marked(write(tmp_path / "a.onnx", kind=TensorProto.UINT8), preprocess=said(3, 4, 4), **form)
    assert not open_artifact(pixels).image.channels_last
    asked = Preparation(mean=(0.5,), std=(0.25,))
    assert parity_of(own, pixels, "digits", asked=asked).rung.verdict == "pass"


def test_a_declared_size_that_the_graph_contradicts_is_told_or_refused(tmp_path):
    path = marked(write(tmp_path / "a.onnx"), preprocess=said(3, 8, 8))
    note = "a.onnx says that images are [3, 8, 8] and takes [3, 4, 4], channels first; they are given as it takes them."
    assert note in parity_of(path, path, "none").notes
    path = marked(write(tmp_path / "b.onnx"), preprocess=said(1, 4, 4))
    with pytest.raises(ArtifactError, match="its metadata is of another file"):
        parity_of(path, path, "none")


def test_an_input_shape_is_in_the_layout_of_the_file_everywhere(tmp_path):
    """Kind: one option that means one thing to one verb and another to the next."""
    path = write(tmp_path / "a.onnx", shape=LAST, weight=np.hstack([WEIGHT, -WEIGHT]))
    for shape, fits in (((4, 4, 3), True), ((3, 4, 4), False)):
        with contextlib.nullcontext() if fits else pytest.raises(RecipeError, match=r"\[3, 4, 4\]"):
            assert open_artifact(path).signature(2, shape).inputs[0].shape == (2, 4, 4, 3)
        with contextlib.nullcontext() if fits else pytest.raises(RecipeError, match=r"asked for \[3, 4, 4\]$"):
            assert parity_of(path, path, "none", input_shape=shape).rung.verdict == "pass"
        with contextlib.nullcontext() if fits else pytest.raises(RecipeError, match=r"asked for \[3, 4, 4\]$"):
            assert accuracy_of(path, "digits", "test", asked=DIGITS, input_shape=shape).accuracy.total > 100


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.UINT8])
def test_an_engine_is_compared_at_the_shape_that_it_was_built_for(kind, tmp_path):
    """Of a file with the channels last, and as `refit` reads the shape from the profile: [H, W, C]."""
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")
    from toolchain.cli.stages import _engine_rung

    path = write(tmp_path / "a.onnx", shape=LAST, kind=kind)
    stage = BuildEngine(
        EngineSection(),
        "openvino-cpu",
        tmp_path / "engine",
        lambda built: _engine_rung(OnnxFile(path), built, (1, 1, 8), (4, 4, 3)),
        input_shape=(4, 4, 3),
    )
    assert run_stage(stage, OnnxFile(path)).artifact.facts["parity"]["verdict"] == "pass"


def test_a_sample_that_is_no_image_is_told_with_what_is_taken_for_the_batch(tmp_path):
    model = onnx.load(write(tmp_path / "a.onnx"))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [3, 4, 12]))
    onnx.save(model, tmp_path / "a.onnx")
    assert (
        "a.onnx takes [3, 4, 12], of which the first is taken for a fixed batch."
        in open_artifact(tmp_path / "a.onnx").notes
    )


def test_what_two_files_share_is_told_once(tmp_path):
    path = write(tmp_path / "a.onnx", shape=(4, 3, 4, 4))
    notes = parity_of(path, path, "none").notes
    assert len(notes) == len(set(notes)) == 2
