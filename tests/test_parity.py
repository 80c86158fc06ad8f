"""A rung passes for equal models and for nothing else."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolchain.errors import ParityError, TargetUnavailable
from toolchain.export.engine_parity import TF32
from toolchain.export.precision import PRECISIONS, for_output
from toolchain.parity import TOLERANCES, Rung, Tolerance, compare, compare_outputs, not_run, require

FP32 = TOLERANCES["fp32"]


def logits(seed=0, classes=7, scale=3.0):
    rng = np.random.default_rng(seed)
    return [scale * rng.standard_normal((batch, classes)).astype(np.float32) for batch in (1, 3)]


def rung(expected, got, *, tolerance=FP32, real_images=True):
    return compare_outputs("a", "b", expected, got, tolerance=tolerance, real_images=real_images)


@given(st.integers(0, 10_000), st.floats(0, 4), st.floats(0.1, 100))
def test_the_bound_is_exact_and_relative_to_the_largest_logit(seed, error, scale):
    expected = logits(seed, scale=scale)
    bound = FP32.max_abs * max(1.0, *(float(np.abs(y).max()) for y in expected))
    got = [y.astype(np.float64) for y in expected]
    got[1][2, 3] += error * bound
    result = rung(expected, got)
    if abs(error - 1) > 1e-6:
        assert result.verdict == ("fail" if error > 1 else "pass"), result
    assert result.max_abs == pytest.approx(error * bound, rel=1e-6, abs=1e-12)


def test_a_pass_says_what_was_measured():
    result = rung(logits(), logits())
    assert (result.verdict, result.reason, result.max_abs, result.top1_agreement) == ("pass", "", 0.0, 1.0)
    assert result.cosine_min == pytest.approx(1.0)
    assert rung(logits(), logits(), real_images=False).top1_agreement is None


def set_to(value):
    def change(arrays):
        arrays[1][1, 2] = value

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_anything_non_finite_fails_on_either_side_or_on_both(value, side):
    sides = [logits(), logits()]
    set_to(value)(sides[side])
    assert "non-finite" in rung(*sides).reason
    assert rung(sides[side], sides[side]).verdict == "fail"


@pytest.mark.parametrize(
    "got", [[], logits()[:1], [y[:, :-1] for y in logits()], [y[None] for y in logits()], logits()[::-1]]
)
def test_shapes_must_agree_and_both_are_shown(got):
    result = rung(logits(), got)
    assert result.verdict == "fail"
    assert str([y.shape for y in logits()]) in result.reason
    assert str([y.shape for y in got]) in result.reason


@pytest.mark.parametrize(
    ("vacuous", "said"),
    [
        ([np.zeros((1, 7)), np.zeros((3, 7))], "all zero"),
        ([np.full((1, 7), 2.0), np.full((3, 7), 2.0)], "constant"),
        ([np.arange(7.0)[None], np.tile(np.arange(7.0), (3, 1))], "same for every image"),
        ([np.arange(7.0)[None], np.arange(7.0) + 1e-9 * np.arange(3.0)[:, None]], "same for every image"),
        ([], "shapes"),
    ],
)
def test_outputs_that_say_nothing_cannot_pass(vacuous, said):
    result = rung(vacuous, vacuous)
    assert result.verdict == "fail"
    assert said in result.reason


def tokens(seed=0, positions=64):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((batch, positions, 8)).astype(np.float32) for batch in (1, 3)]


LOOSE = replace(FP32, max_abs=None, cosine_min=0.95)


def test_tokens_are_compared_by_image_and_by_position():
    result = rung(tokens(), tokens())
    assert (result.verdict, result.max_abs, result.top1_agreement) == ("pass", 0.0, None)
    broken = tokens()
    for each in broken:
        each[:, 5] = each[:, 6]  # one of 64: the cosine of an image hardly feels it
    assert rung(tokens(), broken, tolerance=LOOSE).verdict == "fail"
    image = tokens()
    image[1][2] = image[1][1]
    assert rung(tokens(), image, tolerance=LOOSE).verdict == "fail"
    blurred = [each + 0.01 for each in tokens()]
    assert rung(tokens(), blurred, tolerance=LOOSE).verdict == "pass"


def test_of_several_outputs_the_worst_decides():
    def two(change):
        return lambda images: (images[:, 0, 0, :2], change(images[:, 0]))

    images = np.random.default_rng(0).standard_normal((3, 1, 4, 4)).astype(np.float32)
    options = {"tolerance": FP32, "real_images": False}
    same = two(lambda x: x)
    assert compare("a", "b", same, same, images, **options).verdict == "pass"
    assert compare("a", "b", same, two(lambda x: x[:, ::-1]), images, **options).verdict == "fail"
    one = compare("a", "b", same, lambda x: x[:, 0], images, **options)
    assert (one.verdict, one.reason) == ("fail", "a has 2 outputs, b 1")


def test_of_several_outputs_the_largest_errors_are_told():
    """One is large and off by much, the other small and turned: no one of them has both errors."""
    y = np.random.default_rng(0).standard_normal((3, 2, 4))
    loose = Tolerance(max_abs=None, cosine_min=0.5, top1_min=None)
    large = 1e3 * y + np.where(np.arange(4) == 0, 1.0, 0.0)
    turned = y + 0.1 * y[::-1]
    errors = float(np.abs(large - 1e3 * y).max()), float(np.abs(turned - y).max())
    assert errors[0] > 2 * errors[1]

    def called(*outputs):
        return lambda images: tuple(each[: len(images)] for each in outputs)

    options = {"tolerance": loose, "real_images": False, "batches": (3,)}
    one = compare("a", "b", called(1e3 * y, y), called(large, turned), y, **options)
    alone = compare("a", "b", called(y), called(turned), y, **options)
    assert one.max_abs == pytest.approx(errors[0])
    assert one.cosine_min == alone.cosine_min < 0.999


def test_little_variation_is_enough_where_the_error_is_far_smaller():
    """A model whose LayerScales have not grown yet: what it says of an image lies in the sixth digit."""
    rng = np.random.default_rng(0)
    base = 3 * rng.standard_normal(7)
    y = [base + 1e-5 * rng.standard_normal((batch, 7)) for batch in (1, 3)]
    assert rung(y, [each + 1e-6 for each in y]).verdict == "pass"
    same = [np.tile(base, (len(each), 1)) for each in y]  # one that ignores the image
    assert "same for every image" in rung(y, same).reason


def test_a_zero_row_has_cosine_zero_and_not_nan():
    got = logits()
    got[1][0] = 0.0
    assert rung(logits(), got).cosine_min == 0.0


def test_each_bound_of_a_tolerance_is_judged_alone():
    expected = logits()
    loose = replace(FP32, max_abs=None, cosine_min=-1.0)
    turned = [-y for y in expected]
    assert rung(expected, turned, tolerance=loose).verdict == "pass"
    assert "cosine" in rung(expected, turned, tolerance=replace(loose, cosine_min=0.0)).reason
    strict = replace(loose, top1_min=0.99)
    assert "top-1" in rung(expected, turned, tolerance=strict).reason
    assert rung(expected, turned, tolerance=strict, real_images=False).verdict == "pass"


# Mutations of a real model: what a wrong slice, split or export would do.


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=64, depth=2, num_heads=2, num_classes=10)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit.eval()


def drop_bias(vit):
    vit.blocks[1].attn.proj.bias.zero_()


def swap_heads(vit):
    vit.blocks[0].attn.proj.weight.copy_(vit.blocks[0].attn.proj.weight.roll(32, dims=1))


def wrong_scale(vit):
    vit.blocks[0].attn.fused_attn = False
    vit.blocks[0].attn.scale *= 2**0.5


def scale_output(vit):
    vit.head.weight.mul_(1.0001)
    vit.head.bias.mul_(1.0001)


def poison(vit):
    vit.norm.bias[0] = float("nan")


def nothing(vit):
    vit.blocks[0].attn.fused_attn = False


@pytest.mark.parametrize(
    ("mutate", "verdict"),
    [
        (nothing, "pass"),
        (drop_bias, "fail"),
        (swap_heads, "fail"),
        (wrong_scale, "fail"),
        (scale_output, "fail"),
        (poison, "fail"),
    ],
)
def test_a_mutated_model_fails_and_an_equal_one_passes(model, mutate, verdict):
    mutant = copy.deepcopy(model)
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)

    def call(module):
        def run(batch):
            with torch.no_grad():
                return module(torch.from_numpy(batch)).numpy()

        return run

    with torch.no_grad():
        mutate(mutant)
    result = compare("dense", "mutant", call(model), call(mutant), images, tolerance=FP32, real_images=False)
    assert result.verdict == verdict, result
    assert bool(result.reason) == (verdict == "fail")


def test_every_batch_size_is_called_and_a_form_that_cannot_run_one_fails():
    images = np.arange(3 * 4, dtype=np.float32).reshape(3, 4)
    seen = []

    def whole(batch):
        seen.append(len(batch))
        return batch

    def frozen(batch):
        if len(batch) != 1:
            raise RuntimeError("got 3, expected 1\nand a long trace")
        return batch

    options = {"tolerance": FP32, "real_images": False}
    assert compare("a", "b", whole, whole, images, **options).verdict == "pass"
    assert seen == [1, 3, 1, 3]
    result = compare("a", "b", whole, frozen, images, **options)
    assert (result.verdict, result.reason) == ("fail", "b cannot run at batch 3: RuntimeError: got 3, expected 1")
    with pytest.raises(ValueError, match="needs as many images"):
        compare("a", "b", whole, whole, images[:2], **options)

    def absent(batch):
        raise TargetUnavailable("trt", "no GPU")

    with pytest.raises(TargetUnavailable):
        compare("a", "b", whole, absent, images, **options)


def test_the_ladder_names_the_first_rung_that_broke():
    good = rung(logits(), logits())
    broken = replace(rung(logits(0), logits(1)), from_="mask", to="slice")
    later = replace(broken, from_="slice", to="split")
    skipped = not_run("fp32", "engine", tolerance=FP32, reason="no driver")
    with pytest.raises(
        ParityError, match=r"mask and slice must be the same model.*max.*to slice is the first that broke\. Report it"
    ):
        require([good, skipped, broken, later])
    with pytest.raises(ParityError, match=r"is the first that broke\. Choose another precision\.$"):
        require([good, broken], "Choose another precision")

    require([good, skipped])


@pytest.mark.parametrize("rungs", [[], [not_run("a", "b", tolerance=FP32, reason="no driver")]])
def test_a_ladder_on_which_nothing_was_compared_is_not_green(rungs):
    with pytest.raises(ParityError, match="nothing is known"):
        require(rungs)


def test_the_json_has_the_promised_names():
    record = json.loads(json.dumps(rung(logits(), logits()).to_dict(), allow_nan=False))
    assert list(record) == ["from", "to", "max_abs", "cosine_min", "top1_agreement", "tolerance", "verdict", "reason"]
    assert record["tolerance"] == {
        "max_abs": 1e-5,
        "cosine_min": 0.99999,
        "top1_min": None,
        "spread_max": None,
        "centred_min": None,
    }
    assert isinstance(rung(logits(), logits()), Rung)


# One output


def single(seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    return [5 + spread * rng.standard_normal((batch, 1)) for batch in (1, 8)]


def test_a_single_output_is_compared_over_images():
    """Kind: outputs without classes. Two single numbers of one sign have the cosine 1, and always name the same class."""
    loose = replace(FP32, max_abs=None, cosine_min=0.95, top1_min=0.97)
    same = [y * (1 + 1e-3) for y in single()]
    assert rung(single(), same, tolerance=loose).verdict == "pass"
    assert rung(single(), same, tolerance=loose).top1_agreement is None
    for other in (single(seed=1), [y + 3 for y in single()], [5 - (y - 5) for y in single()]):
        result = rung(single(), other, tolerance=loose)
        assert (result.verdict, "cosine" in result.reason) == ("fail", True)
    assert rung(single(), [np.full_like(y, 5.0) for y in single()], tolerance=loose).verdict == "fail"


def images_of(shape, mean=10.0):
    """Outputs [24, *shape] with a mean that is large beside what varies, as of features."""
    return mean + np.random.default_rng(0).standard_normal((24, *shape))


LOOSE = Tolerance(None, 0.95, 0.97, spread_max=0.5)


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 2, 16)])
def test_little_more_than_the_mean_in_place_of_outputs_has_a_good_cosine_and_fails(shape):
    y = images_of(shape)
    mean = np.broadcast_to(y.mean(axis=0), y.shape)
    named = {"real_images": False}
    assert rung([y], [mean], tolerance=replace(LOOSE, spread_max=None), **named).verdict == "fail"
    nearly = mean + 0.01 * (y - mean)
    assert rung([y], [nearly], tolerance=replace(LOOSE, spread_max=None), **named).verdict == "pass"
    result = rung([y], [nearly], tolerance=LOOSE, **named)
    assert (result.verdict, "how outputs differ between images is lost" in result.reason) == ("fail", True)
    assert result.cosine_min > 0.98
    assert rung([y], [y + 0.1 * (y - y.mean(axis=0))], tolerance=LOOSE, **named).verdict == "pass"


def test_one_position_that_is_the_same_for_every_image_fails_unless_it_hardly_varies():
    y = images_of((8, 16))
    still = y.copy()
    still[:, 3] = y[:, 3].mean(axis=0)
    named = {"real_images": False}
    assert "at position 3 > 0.5" in rung([y], [still], tolerance=LOOSE, **named).reason
    calm = y.copy()
    calm[:, 3] = 10 + 0.01 * (y[:, 3] - 10)
    rounded = calm.copy()
    rounded[:, 3] = 10
    assert rung([calm], [rounded], tolerance=LOOSE, **named).verdict == "pass"


def test_the_output_that_broke_is_named():
    y, tolerance = images_of((16,)).astype(np.float32), TOLERANCES["fp32"]
    result = compare("a", "b", lambda x: (y, y), lambda x: (y, y + 1), y, tolerance=tolerance, real_images=False)
    assert result.reason.startswith("output 2 of 2: max |Δ| 1")


# What all classes have in common

DEFAULTS = {**TOLERANCES, "TF32": TF32, **{name: each.tolerance for name, each in PRECISIONS.items()}}


def logits_about(offset, count=256, classes=10):
    return np.random.default_rng(0).standard_normal((count, classes)) + offset


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("real_images", [False, True])
def test_classes_that_trade_places_are_caught_wherever_the_logits_lie(name, real_images):
    """A softmax takes away what all logits of an image have in common, and so does a comparison of them."""
    y = logits_about(1000.0)
    rung = compare_outputs(
        "a", "b", [y], [y[:, [0, 2, 1, *range(3, 10)]]], tolerance=DEFAULTS[name], real_images=real_images
    )
    assert rung.verdict == "fail", rung


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_what_a_precision_rounds_is_no_fault_wherever_the_logits_lie(name, offset):
    y = logits_about(offset).astype(np.float32)
    tolerance = DEFAULTS[name]
    error = 1e-6 if name == "fp32" else 0.5 * np.sqrt(1 - tolerance.cosine_min)
    z = y + (error * np.random.default_rng(1).standard_normal(y.shape)).astype(np.float32)
    assert compare_outputs("a", "b", [y], [z], tolerance=tolerance, real_images=False).verdict == "pass"


def test_what_names_no_class_is_not_held_about_the_mean_of_classes():
    for name, tolerance in DEFAULTS.items():
        assert for_output(tolerance, "logits").centred_min == for_output(tolerance, None).centred_min
        assert (for_output(tolerance, None).centred_min is None) == (name == "fp32")
        assert for_output(tolerance, "multi-label").centred_min is for_output(tolerance, "features").centred_min is None


def test_logits_that_differ_by_their_rounding_alone_say_nothing_of_classes():
    y = np.full((3, 4), 1e6) + np.arange(3)[:, None] + 1e-3 * np.random.default_rng(0).standard_normal((3, 4))
    z = y + 1e-3 * np.random.default_rng(1).standard_normal((3, 4))
    assert compare_outputs("a", "b", [y], [z], tolerance=DEFAULTS["int4"], real_images=False).verdict == "pass"
